"""Networks that make or score samples."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case


def points(n):
    return (torch.randn(n, 6),)


class VAE(nn.Module):
    def __init__(self, latent=3):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.mu, self.logvar = nn.Linear(16, latent), nn.Linear(16, latent)
        self.dec = nn.Sequential(nn.Linear(latent, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        std = torch.exp(0.5 * logvar)
        z = mu + torch.randn_like(std) * std
        return self.dec(z), mu, logvar


def elbo_step(model, batch):
    (x,) = batch
    recon, mu, logvar = model(x)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1)
    return (F.mse_loss(recon, x, reduction="none").sum(dim=1) + kl).mean()


def elbo_sum_step(model, batch):
    (x,) = batch
    recon, mu, logvar = model(x)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return F.mse_loss(recon, x, reduction="sum") + kl


class GeneratorWithCritic(nn.Module):
    """Trains the generator; the discriminator is frozen."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.discriminator.requires_grad_(False)

    def forward(self, z):
        return self.discriminator(self.generator(z))


def generator_step(model, batch):
    scores = model(batch[0])
    return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))


class VQVAE(nn.Module):
    """The codebook moves towards the means of what it encodes, in buffers."""

    def __init__(self, codes=5, dim=4, decay=0.9):
        super().__init__()
        self.enc, self.dec, self.decay = nn.Linear(6, dim), nn.Linear(dim, 6), decay
        self.register_buffer("codebook", torch.randn(codes, dim))
        self.register_buffer("cluster_size", torch.ones(codes))
        self.register_buffer("embed_avg", self.codebook.clone())

    def forward(self, x):
        z = self.enc(x)
        index = torch.cdist(z, self.codebook).argmin(1)
        q = F.embedding(index, self.codebook)
        if self.training:
            with torch.no_grad():
                onehot = F.one_hot(index, len(self.codebook)).to(z.dtype)
                self.cluster_size.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
                self.embed_avg.mul_(self.decay).add_(onehot.T @ z, alpha=1 - self.decay)
                self.codebook.copy_(self.embed_avg / self.cluster_size.unsqueeze(1))
        commit = F.mse_loss(z, q.detach())
        q = z + (q - z).detach()
        return self.dec(q), commit


class LearnedVQ(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec, self.codes = nn.Linear(6, 4), nn.Linear(4, 6), nn.Embedding(5, 4)

    def forward(self, x):
        z = self.enc(x)
        d = z.pow(2).sum(1, keepdim=True) - 2 * z @ self.codes.weight.t() + self.codes.weight.pow(2).sum(1)
        q = self.codes(d.argmin(dim=1))
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.dec(z + (q - z).detach()), loss


def vq_step(model, batch):
    x = batch[0]
    recon, extra = model(x)
    return F.mse_loss(recon, x) + extra


class Coupling(nn.Module):
    def __init__(self, flip):
        super().__init__()
        self.net, self.flip = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6)), flip

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        if self.flip:
            a, b = b, a
        s, t = self.net(a).chunk(2, dim=1)
        s = torch.tanh(s)
        b = b * s.exp() + t
        return torch.cat([b, a] if self.flip else [a, b], dim=1), s.sum(1)


class RealNVP(nn.Module):
    """Its output is a dict with the loss."""

    def __init__(self, layers=4):
        super().__init__()
        self.flows = nn.ModuleList([Coupling(i % 2 == 1) for i in range(layers)])

    def forward(self, x):
        log_det = 0.0
        for flow in self.flows:
            x, ld = flow(x)
            log_det = log_det + ld
        log_prob = -0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return {"loss": -(log_prob + log_det).mean(), "z": x}


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x)


def gradient_penalty_step(model, batch):
    real, fake, eps = batch
    mixed = (eps * real + (1 - eps) * fake).requires_grad_(True)
    grad = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)[0]
    penalty = ((grad.norm(2, dim=1) - 1) ** 2).mean()
    return model(fake).mean() - model(real).mean() + 10 * penalty


class ScoreModel(nn.Module):
    """An energy whose gradient, taken in the forward, is the output."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            e = self.energy(x).sum()
            (score,) = torch.autograd.grad(e, x, create_graph=True)
        return -score


class Diffusion(nn.Module):
    def __init__(self, steps=10):
        super().__init__()
        betas = torch.linspace(1e-3, 0.2, steps)
        self.register_buffer("alpha_bar", torch.cumprod(1 - betas, 0))
        self.time = nn.Embedding(steps, 8)
        self.inp, self.mid, self.out = nn.Linear(6, 16), nn.Linear(24, 16), nn.Linear(16, 6)

    def forward(self, x, t):
        h = F.silu(self.inp(x))
        h = F.silu(self.mid(torch.cat([h, self.time(t)], dim=-1)))
        return self.out(h)


def diffusion_step(model, batch):
    x0 = batch[0]
    t = torch.randint(0, len(model.alpha_bar), (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    a = model.alpha_bar[t].unsqueeze(1)
    return F.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t), noise)


class MDN(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 12), nn.Tanh())
        self.pi, self.mu, self.sigma = nn.Linear(12, k), nn.Linear(12, k), nn.Linear(12, k)

    def forward(self, x):
        h = self.trunk(x)
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=self.pi(h)),
            torch.distributions.Normal(self.mu(h), F.softplus(self.sigma(h)) + 1e-3),
        )


def nll(dist, target):
    return -dist.log_prob(target).mean()


def real_and_fake(n):
    return torch.randn(n, 6), torch.rand(n, 6), torch.rand(n, 1)


CASES = {
    "VAE": Case(make=VAE, data=points, step=elbo_step, sliced=True, lr=0.01, split_at="dec"),
    "VAE, sums": Case(make=VAE, data=points, step=elbo_sum_step, sliced=True, lr=0.001, split_at="dec"),
    "generator, frozen critic": Case(
        make=GeneratorWithCritic, data=lambda n: (torch.randn(n, 4),), step=generator_step, optimizer="adamw",
        lr=0.003, split_at="discriminator",
    ),
    "VQ-VAE, moving codebook": Case(make=VQVAE, data=points, step=vq_step, sliced=True, split_at="dec"),
    "VQ-VAE, learned codebook": Case(make=LearnedVQ, data=points, step=vq_step, split_at="dec"),
    "RealNVP, own loss": Case(
        make=RealNVP, data=lambda n: {"x": torch.randn(n, 6)}, optimizer="adamw", lr=0.003, split_at="flows.2"
    ),
    "critic, gradient penalty": Case(
        make=Critic, data=real_and_fake, step=gradient_penalty_step, lr=0.01, split_at="net.2"
    ),
    "energy's gradient": Case(make=ScoreModel, data=lambda n: 2 * points(n), loss="mse", split_at="energy.2"),
    "diffusion": Case(make=Diffusion, data=points, step=diffusion_step, sliced=True, split_at="mid"),
    "mixture density": Case(
        make=MDN, data=lambda n: (torch.randn(n, 2), torch.randn(n)), loss=nll, lr=0.01, split_at="pi"
    ),
}  # fmt: skip
