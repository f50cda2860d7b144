"""Networks whose path, weights or number of steps depends on their input."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case
from torch.func import functional_call


def classes(n):
    return torch.randn(n, 8), torch.randint(0, 3, (n,))


def targets(n):
    x = torch.randn(n, 4)
    return x, x.sin().sum(1, keepdim=True)


def expert(width=8):
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))


class TopKMoE(nn.Module):
    """Each sample goes to the two experts it likes best."""

    def __init__(self, n_experts=4, k=2):
        super().__init__()
        self.gate = nn.Linear(8, n_experts)
        self.experts = nn.ModuleList([expert() for _ in range(n_experts)])
        self.k, self.head = k, nn.Linear(8, 3)

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        weights, chosen = probs.topk(self.k, dim=-1)
        out = torch.zeros_like(x)
        for i, net in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            if len(rows) == 0:
                continue
            out = out.index_add(0, rows, weights[rows, place].unsqueeze(-1) * net(x[rows]))
        share = F.one_hot(chosen, len(self.experts)).to(x).mean(dim=(0, 1))
        self.aux_loss = len(self.experts) * (share * probs.mean(0)).sum()
        return self.head(x + out)


def moe_step(model, batch):
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    return loss + 0.1 * model.aux_loss


class SwitchMoE(nn.Module):
    """The best expert, which takes only so many samples of a batch."""

    def __init__(self, n_experts=4, capacity_factor=1.0):
        super().__init__()
        self.router = nn.Linear(8, n_experts)
        self.experts = nn.ModuleList([expert() for _ in range(n_experts)])
        self.capacity_factor, self.head = capacity_factor, nn.Linear(8, 3)

    def forward(self, x):
        gate, index = self.router(x).softmax(-1).max(-1)
        capacity = int(self.capacity_factor * len(x) / len(self.experts)) or 1
        out = x.clone()
        for e, net in enumerate(self.experts):
            mine = (index == e).nonzero().flatten()[:capacity]
            out[mine] = out[mine] + gate[mine].unsqueeze(1) * net(x[mine])
        return self.head(out)


class AdaptiveSteps(nn.Module):
    """Each sample runs until its halting probabilities add up to one."""

    def __init__(self, max_steps=6):
        super().__init__()
        self.cell, self.halt = nn.GRUCell(8, 8), nn.Linear(8, 1)
        self.out, self.max_steps = nn.Linear(8, 3), max_steps

    def forward(self, x):
        state = torch.zeros_like(x)
        total = x.new_zeros(len(x), 1)
        result = torch.zeros_like(x)
        step = 0
        while step < self.max_steps and bool((total < 0.99).any()):
            state = self.cell(x, state)
            p = torch.sigmoid(self.halt(state))
            running = (total < 0.99).to(x)
            p = torch.minimum(p * running, 1 - total)
            result = result + p * state
            total = total + p
            step += 1
        return self.out(result)


class DEQ(nn.Module):
    """A fixed point, found without gradients; then one step with them."""

    def __init__(self):
        super().__init__()
        self.inject, self.W = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def f(self, z, x):
        return torch.tanh(0.5 * self.W(z) + self.inject(x))

    def forward(self, x):
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(200):
                new = self.f(z, x)
                done = (new - z).abs().max() < 1e-14
                z = new
                if done:
                    break
        return self.head(self.f(z, x))


class ODEFunc(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, t, y):
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1))


class NeuralODE(nn.Module):
    def __init__(self, steps=4):
        super().__init__()
        self.func, self.readout = ODEFunc(), nn.Linear(4, 1)
        self.register_buffer("times", torch.linspace(0, 1, steps + 1))

    def forward(self, y):
        for t0, t1 in zip(self.times[:-1], self.times[1:], strict=True):
            h = t1 - t0
            k1 = self.func(t0, y)
            k2 = self.func(t0 + h / 2, y + h / 2 * k1)
            k3 = self.func(t0 + h / 2, y + h / 2 * k2)
            k4 = self.func(t1, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.readout(y)


class TreeNet(nn.Module):
    """Merges the leaves of a tree in an order that the sample gives."""

    def __init__(self):
        super().__init__()
        self.leaf, self.merge, self.root = nn.Embedding(10, 6), nn.Linear(12, 6), nn.Linear(6, 2)

    def encode(self, leaves, left_first):
        if len(leaves) == 1:
            return self.leaf(leaves[0])
        middle = 1 if left_first else len(leaves) // 2
        parts = self.encode(leaves[:middle], left_first), self.encode(leaves[middle:], left_first)
        return torch.tanh(self.merge(torch.cat(parts)))

    def forward(self, leaves):
        return self.root(torch.stack([self.encode(row, bool(row[0] % 2)) for row in leaves]))


class HyperNet(nn.Module):
    """A net writes the weights of another one, for each sample."""

    def __init__(self):
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2 * 5 + 5 + 5))

    def forward(self, x):
        w = self.hyper(x[:, :2])
        w1, b1, w2 = w.split([10, 5, 5], dim=1)
        h = torch.tanh(torch.bmm(w1.view(-1, 5, 2), x[:, 2:].unsqueeze(-1)).squeeze(-1) + b1)
        return (h * w2).sum(1, keepdim=True)


class Functional(nn.Module):
    """One net is called with weights of its own plus what another parameter adds."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.scale = nn.ParameterDict(
            {k.replace(".", "_"): nn.Parameter(torch.ones(1)) for k in self.base.state_dict()}
        )

    def forward(self, x):
        params = {k: v * self.scale[k.replace(".", "_")] for k, v in self.base.named_parameters()}
        return functional_call(self.base, params, (x,))


class EarlyExits(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
        self.exits = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def forward(self, x):
        outputs = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = stage(x)
            outputs.append(leave(x))
        return outputs


def exits_loss(outputs, target):
    return sum((i + 1) * F.cross_entropy(out, target) for i, out in enumerate(outputs)) / 6


def leaves(n):
    return torch.randint(0, 10, (n, 5)), torch.randint(0, 2, (n,))


CASES = {
    "MoE, top 2, balance loss": Case(make=TopKMoE, data=classes, step=moe_step, split_at="head"),
    "the same, check=mesh": Case(
        make=TopKMoE, data=classes, step=moe_step, split_at="head", check="mesh", sliced=True
    ),
    "MoE, top 2": Case(make=TopKMoE, data=classes, loss="cross_entropy", split_at="head"),
    "Switch MoE, capacity": Case(make=SwitchMoE, data=classes, loss="cross_entropy", split_at="head"),
    "adaptive computation": Case(make=AdaptiveSteps, data=classes, loss="cross_entropy", split_at="out"),
    "deep equilibrium": Case(make=DEQ, data=classes, loss="cross_entropy", split_at="head"),
    "neural ODE": Case(make=NeuralODE, data=targets, loss="mse", split_at="readout"),
    "tree": Case(make=TreeNet, data=leaves, loss="cross_entropy", split_at="root"),
    "hypernetwork": Case(make=HyperNet, data=targets, loss="mse", split_at="hyper.2"),
    "functional_call": Case(make=Functional, data=targets, loss="mse", split_at="base.2"),
    "early exits": Case(make=EarlyExits, data=classes, loss=exits_loss, split_at="stages.1"),
}  # fmt: skip
