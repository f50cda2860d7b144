"""A training that the tests over hosts share: small, and with a place at which it can be held."""

from __future__ import annotations

import torch
from gate import Gate
from torch import nn
from torch.nn import functional as F

import nbdist

X = torch.randn(512, 6, generator=torch.Generator().manual_seed(1))
DATA = X, X.sum(1, keepdim=True).sin()
OPTIONS = {"optimizer": "adamw", "lr": 0.01, "batch_size": 64}


def model() -> nn.Module:
    """The same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def bits(trained: nn.Module) -> list[bytes]:
    """Of all its parameters."""
    return [parameter.detach().numpy().tobytes() for parameter in trained.parameters()]


def held(gate: Gate | None, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss, which waits in the 7th step, where an interrupt leaves the 6th complete."""
    if gate is not None and torch.is_grad_enabled() and nbdist.current_step() == 6:
        gate.hold("forward")
    return F.mse_loss(y, target)


def hosts_of(cluster: nbdist.Cluster) -> list[str]:
    """The host of each rank."""
    return [engine.host for engine in cluster.engines]
