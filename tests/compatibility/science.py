"""Networks for graphs, points, fields and equations."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case
from torch.utils.data import DataLoader, Dataset


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.lin2, self.readout = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x, adj):
        a = adj + torch.eye(adj.shape[-1], dtype=adj.dtype, device=adj.device)
        d = a.sum(-1).pow(-0.5)
        a = d.unsqueeze(-1) * a * d.unsqueeze(-2)
        h = F.relu(self.lin1(a @ x))
        h = F.relu(self.lin2(a @ h))
        return self.readout(h.mean(1))


def dense_graphs(n):
    adj = (torch.rand(n, 5, 5) < 0.4).float()
    return torch.randn(n, 5, 4), torch.maximum(adj, adj.mT), torch.randint(0, 3, (n,))


class Graphs(Dataset):
    """Graphs of different sizes: features, edges and a number."""

    def __init__(self, n):
        sizes = torch.randint(2, 6, (n,)).tolist()
        self.x = [torch.randn(s, 4) for s in sizes]
        self.edges = [torch.randint(0, s, (2, 2 * s)) for s in sizes]
        self.y = torch.randn(n, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.edges[i], self.y[i]


def collate_graphs(items):
    """One large graph, and which small one each of its points belongs to."""
    xs, edges, ys = zip(*items, strict=True)
    sizes = torch.tensor([len(x) for x in xs])
    starts = torch.cumsum(sizes, 0) - sizes
    edge_index = torch.cat([e + s for e, s in zip(edges, starts, strict=True)], dim=1)
    batch = torch.repeat_interleave(torch.arange(len(xs)), sizes)
    return {"x": torch.cat(xs), "edge_index": edge_index, "batch": batch, "y": torch.stack(ys)}


def graphs(n):
    return DataLoader(Graphs(n), batch_size=12, collate_fn=collate_graphs)


class GATLayer(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.W, self.a = nn.Linear(n_in, n_out, bias=False), nn.Linear(2 * n_out, 1, bias=False)

    def forward(self, x, edge_index):
        h = self.W(x)
        src, dst = edge_index
        e = F.leaky_relu(self.a(torch.cat([h[src], h[dst]], dim=-1)), 0.2).squeeze(-1)
        weight = torch.exp(e - e.detach().max())
        total = torch.zeros(len(x), dtype=h.dtype, device=h.device).index_add_(0, dst, weight)
        alpha = weight / (total[dst] + 1e-12)
        return torch.zeros_like(h).index_add_(0, dst, alpha.unsqueeze(-1) * h[src])


class GAT(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.lin = GATLayer(4, 8), GATLayer(8, 8), nn.Linear(8, 1)

    def forward(self, x, edge_index, batch):
        x = F.elu(self.conv1(x, edge_index))
        x = self.conv2(x, edge_index)
        pooled = x.new_zeros(int(batch.max()) + 1, x.shape[1]).index_add(0, batch, x)
        return self.lin(pooled)


class MessagePassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.update, self.out = nn.GRUCell(4, 4), nn.Linear(4, 1)

    def forward(self, x, edge_index, batch):
        src, dst = edge_index
        for _ in range(2):
            m = self.message(torch.cat([x[src], x[dst]], dim=1))
            agg = torch.zeros_like(x).scatter_add(0, dst.unsqueeze(1).expand_as(m), m)
            x = self.update(agg, x)
        size = int(batch[-1]) + 1
        top = x.new_full((size, 4), -1e9).scatter_reduce(0, batch[:, None].expand_as(x), x, "amax")
        return self.out(top)


def graph_step(model, batch):
    out = model(batch["x"], batch["edge_index"], batch["batch"])
    return F.mse_loss(out, batch["y"])


def graph_step_samples(model, batch):
    out = model(batch["x"], batch["edge_index"], batch["batch"])
    return F.mse_loss(out, batch["y"]), len(batch["y"])


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp1, self.mlp2 = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 16, 1)
        self.tnet = nn.Linear(3, 9)
        self.fc = nn.Linear(16, 4)

    def forward(self, pts):
        t = self.tnet(pts.mean(1)).view(-1, 3, 3) + torch.eye(3, dtype=pts.dtype, device=pts.device)
        x = torch.bmm(pts, t).transpose(1, 2)
        x = F.relu(self.mlp2(F.relu(self.mlp1(x))))
        return self.fc(x.max(dim=2)[0])


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi, self.rho = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, elements, mask):
        h = F.relu(self.phi(elements)) * mask.unsqueeze(-1)
        return self.rho(h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


def sets(n):
    mask = torch.arange(6) < torch.randint(1, 7, (n, 1))
    return torch.randn(n, 6, 3), mask, torch.randn(n, 1)


class SpectralConv1d(nn.Module):
    def __init__(self, channels, modes):
        super().__init__()
        self.modes = modes
        self.weights = nn.Parameter(0.1 * torch.randn(channels, channels, modes, dtype=torch.cfloat))

    def forward(self, x):
        x_ft = torch.fft.rfft(x)
        out_ft = torch.zeros_like(x_ft)
        out_ft[:, :, : self.modes] = torch.einsum("bix,iox->box", x_ft[:, :, : self.modes], self.weights)
        return torch.fft.irfft(out_ft, n=x.size(-1))


class FNO(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.lift = nn.Conv1d(2, width, 1)
        self.spectral = nn.ModuleList([SpectralConv1d(width, 4) for _ in range(2)])
        self.local = nn.ModuleList([nn.Conv1d(width, width, 1) for _ in range(2)])
        self.project = nn.Conv1d(width, 1, 1)

    def forward(self, u):
        grid = torch.linspace(0, 1, u.shape[-1], device=u.device, dtype=u.dtype).expand(u.shape[0], 1, -1)
        x = self.lift(torch.cat([u, grid], dim=1))
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.project(x)


class PINN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)


def residual_step(model, batch):
    """u'' = -sin(x), and u(0) = 0."""
    (x,) = batch
    x = x.clone().requires_grad_(True)
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    boundary = model(torch.zeros(1, 1, dtype=x.dtype, device=x.device)) ** 2
    return ((ddu + torch.sin(x)) ** 2).mean() + boundary.mean()


class KANLayer(nn.Module):
    """Every edge is a spline over radial basis functions."""

    def __init__(self, n_in, n_out, grid=5):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, grid))
        self.coef = nn.Parameter(0.1 * torch.randn(n_in, n_out, grid))
        self.base = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)

    def forward(self, x):
        basis = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2))
        return F.linear(F.silu(x), self.base) + torch.einsum("big,iog->bo", basis, self.coef)


class Siren(nn.Module):
    def __init__(self, omega=10.0):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 3)])
        self.omega = omega
        with torch.no_grad():
            for layer in self.layers[1:]:
                layer.weight.uniform_(-0.06, 0.06)

    def forward(self, coords):
        h = coords
        for layer in self.layers[:-1]:
            h = torch.sin(self.omega * layer(h))
        return self.layers[-1](h)


def clouds(n):
    return torch.randn(n, 10, 3), torch.randint(0, 4, (n,))


CASES = {
    "GCN, dense adjacency": Case(make=GCN, data=dense_graphs, loss="cross_entropy", split_at="lin2"),
    "GAT, collated graphs": Case(make=GAT, data=graphs, step=graph_step, double=False, split_at="conv2"),
    "message passing": Case(
        make=MessagePassing, data=graphs, step=graph_step_samples, double=False, split_at="out"
    ),
    "PointNet": Case(make=PointNet, data=clouds, loss="cross_entropy", split_at="mlp2"),
    "Deep Sets, masks": Case(make=DeepSets, data=sets, loss="mse", split_at="rho"),
    "neural operator, complex": Case(
        make=FNO, data=lambda n: (torch.randn(n, 1, 16), torch.randn(n, 1, 16)), loss="mse", double=False,
        split_at="spectral.1",
    ),
    "physics-informed": Case(
        make=PINN, data=lambda n: (torch.rand(n, 1) * 3,), step=residual_step, lr=0.01, split_at="layers.2"
    ),
    "KAN": Case(
        make=lambda: nn.Sequential(KANLayer(2, 5), KANLayer(5, 1)), split_at="1",
        data=lambda n: (torch.randn(n, 2), torch.randn(n, 1)), loss="mse",
    ),
    "SIREN": Case(
        make=Siren, data=lambda n: (torch.rand(n, 2), torch.rand(n, 3)), loss="l1", optimizer="adamw", lr=0.001,
        split_at="layers.1",
    ),
}  # fmt: skip
