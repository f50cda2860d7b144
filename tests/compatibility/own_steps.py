"""Steps that do more than to compute one loss: update several modules in turn, or carry values on."""

from __future__ import annotations

import itertools

import torch
from case import Case
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.task.lightning_module import training_step


def layers(*widths):
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())))[:-1]


def adversaries():
    return {"critic": layers(6, 16, 1), "generator": layers(3, 16, 6)}


def gan_step(model, batch):
    real, noise = batch
    fake = model["generator"](noise)
    scores = model["critic"](real), model["critic"](fake.detach())
    nbdist.update(F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean(), "critic")
    nbdist.update(F.softplus(-model["critic"](fake)).mean(), "generator")


def wasserstein_step(model, batch):
    """The critic twice, with a gradient in its loss; then the generator."""
    real, noise = batch
    fake = model["generator"](noise)
    for share in (0.3, 0.7):
        between = (share * real + (1 - share) * fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(model["critic"](between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        scores = model["critic"](fake.detach()), model["critic"](real)
        nbdist.update(scores[0].mean() - scores[1].mean() + 10 * penalty, "critic")
    nbdist.update(-model["critic"](fake).mean(), "generator")


def cycle():
    return {"there": layers(6, 8, 4), "back": layers(4, 8, 6), "judge": layers(4, 8, 1)}


def cycle_step(model, batch):
    """Two modules that one loss goes through, each updated by it in turn, and a third by another loss."""
    x, y = batch
    there = model["there"](x)
    judged = F.softplus(model["judge"](there)).mean()
    nbdist.update((model["back"](there) - x).square().mean(), "back", retain_graph=True)
    nbdist.update(judged + (model["back"](model["there"](x)) - x).abs().mean(), "there")
    nbdist.update(F.softplus(-model["judge"](y)).mean() - model["judge"](model["there"](x).detach()).mean(), "judge")


def actor_and_critic():
    return {"actor": layers(6, 16, 3), "critic": layers(6, 16, 1)}


def actor_critic_step(model, batch):
    states, actions, returns = batch
    values = model["critic"](states).squeeze(1)
    nbdist.update(F.mse_loss(values, returns), "critic")
    advantages = (returns - values).detach()
    nbdist.update((F.cross_entropy(model["actor"](states), actions, reduction="none") * advantages).mean(), "actor")


def regularized_step(model, batch):
    """Two modules in one loss: both optimizers step by it."""
    states, actions, returns = batch
    scores, values = model["actor"](states), model["critic"](states).squeeze(1)
    return F.cross_entropy(scores, actions) + F.mse_loss(values, returns) + 0.1 * scores.square().mean()


class Reader(nn.Module):
    """Reads the next piece of each sequence from where the piece before has ended."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x, hidden=None):
        out, hidden = self.rnn(x, hidden)
        return self.head(out), hidden


def reading_step(model, batch):
    """Truncated backpropagation through time."""
    x, y = batch
    state = nbdist.carried(hidden=None)
    out, hidden = model(x, state.hidden)
    state.hidden = tuple(part.detach() for part in hidden)
    return F.mse_loss(out, y)


class SelfTrained(nn.Module):
    """With the methods of a LightningModule, which calls its parts itself."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = layers(6, 16, 8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        states, actions, _ = batch
        loss = F.cross_entropy(self.head(self.encoder(states)), actions)
        self.log("loss_of_step", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def games(n):
    return torch.randn(n, 6), torch.randint(3, (n,)), torch.randn(n)


CASES = {
    "GAN": Case(make=adversaries, data=lambda n: (torch.randn(n, 6), torch.rand(n, 3)), step=gan_step),
    "WGAN-GP": Case(
        make=adversaries, data=lambda n: (torch.randn(n, 6), torch.rand(n, 3)), step=wasserstein_step,
        optimizer="adamw", lr=0.003,
    ),
    "cycle, three optimizers": Case(
        make=cycle, data=lambda n: (torch.randn(n, 6), torch.randn(n, 4)), step=cycle_step
    ),
    "actor and critic": Case(make=actor_and_critic, data=games, step=actor_critic_step, optimizer="adamw", lr=0.003),
    "LightningModule": Case(make=SelfTrained, data=games, step=training_step),
    "LSTM, hidden state carried on": Case(
        make=Reader, data=lambda n: (torch.randn(n, 5, 4), torch.randn(n, 5, 4)), step=reading_step,
        carries=True,
    ),
    "two modules, one loss": Case(make=actor_and_critic, data=games, step=regularized_step, split_at="critic"),
}  # fmt: skip
