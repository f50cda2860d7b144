"""Models and optimizers that are kept and loaded again, and ways to look at all that was kept of them."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from problems import alone, seeded, weights
from torch import nn

import nbdist
from nbdist.core.state.checkpoint_format import FORMATS
from nbdist.core.state.checkpoint_reader import MANIFEST, checkpoints, sealed

WIDTH = 8
_NEW_USER, _NEW_MOUNTS, _PRIVATE = 0x10000000, 0x00020000, 0x00044000


class Net(nn.Module):
    """Blocks that can be split any way; a tie over all of its length, running statistics, a scalar, frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))
        self.downs[3].weight = self.downs[0].weight
        self.ups[1].requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norms[0](self.first(x))
        for up, down in zip(self.ups, self.downs, strict=True):
            hidden = hidden + down(torch.tanh(up(hidden)))
        return self.last(self.norms[1](hidden) * self.scale)


def net() -> nn.Module:
    """A `Net` in float64, always the same one."""
    return seeded(Net, torch.float64)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Two groups, one with a learning rate in a tensor."""
    first, rest = parameters[:4], parameters[4:]
    return torch.optim.AdamW(
        [{"params": first, "lr": 0.02, "betas": (0.8, 0.95)}, {"params": rest, "lr": torch.tensor(0.003)}], eps=1e-3
    )


def fused(parameters: Any) -> torch.optim.Optimizer:
    """One group, stepped by a fused kernel."""
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Two groups in another order than the model's parameters."""
    return torch.optim.SGD([{"params": parameters[5:], "lr": 0.02}, {"params": parameters[:5]}], lr=0.01, momentum=0.9)


def over(make: Any, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the parameters that train."""
    return make([p for p in model.parameters() if p.requires_grad])


def pulled(model: nn.Module, _batch: Any) -> torch.Tensor:
    """A step that gives every trainable parameter a gradient of ones, whatever the model is."""
    return sum(parameter.double().sum() for parameter in model.parameters() if parameter.requires_grad)


def keep(folder: Any, model: nn.Module, optimizer: Any, steps: int = 1, **options: Any) -> Any:
    """Train some steps with gradients of ones, and leave a checkpoint behind."""
    data = torch.zeros(16, 1)
    return alone(model, data, step=pulled, optimizer=optimizer, steps=steps, checkpoint=str(folder), **options)


def loaded(folder: Any, make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A checkpoint of a `Net` in one process: the model and its optimizer, both of which were zeros before."""
    model = net()
    optimizer = over(make, model)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(9.0) if isinstance(group["lr"], torch.Tensor) else 9.0
    nbdist.load_checkpoint(str(folder), model, optimizer)
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], ...]:
    """Weights and buffers; the optimizer's state; its settings."""
    names = {id(p): n for n, p in model.named_parameters()}
    state = {f"{names[id(p)]}/{k}": v for p, own in optimizer.state.items() for k, v in own.items() if v is not None}
    groups = {
        f"{i}/{k}": torch.as_tensor(v)
        for i, group in enumerate(optimizer.param_groups)
        for k, v in group.items()
        if k != "params" and v is not None
    }
    return weights(model), state, groups


def newest(folder: Any) -> Path:
    """The newest checkpoint in a folder of several."""
    return Path(folder, checkpoints(Path(folder))[-1])


def reseal(place: Path) -> None:
    """Give the files of a checkpoint the checksums that they have now, as a hostile process would."""
    files = {
        name: [(place / name).stat().st_size, hashlib.sha256((place / name).read_bytes()).hexdigest()]
        for name in json.loads((place / MANIFEST).read_text())["files"]
    }
    (place / MANIFEST).write_text(sealed({"format": FORMATS[-1], "files": files}))


def mounted(folder: str, options: bytes | None) -> bool:
    """Put an empty disk in the place of a folder, for this process alone; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    unshared = not (libc.unshare(_NEW_USER | _NEW_MOUNTS) and libc.unshare(_NEW_MOUNTS))
    private = unshared and libc.mount(b"none", b"/", None, _PRIVATE, None) == 0
    return private and libc.mount(b"none", folder.encode(), b"tmpfs", 0, options) == 0
