"""An error that a step raises on a mesh only is one sentence, with the strategy on which it works."""

from __future__ import annotations

import functools

import pytest
from problems import classes, mlp, train
from torch.nn import functional as F

from nbdist.errors import PlanError

RUN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": 2, "shuffle": False}


def hooked(model, batch):
    """Reads the output of a layer by a hook of its own, which a pipeline calls on no rank."""
    seen = {}
    handle = model[0].register_forward_hook(lambda _module, _args, output: seen.update(hidden=output))
    out = model(batch[0])
    handle.remove()
    return F.cross_entropy(out, batch[1]) + seen["hidden"].square().mean()


def broken(model, batch):
    return F.cross_entropy(model(batch[0]), batch[2])


def run(world, step, **options):
    return train(world, mlp(), classes(16), step=step, **RUN, **options)


def test_an_error_that_one_process_has_not_is_explained(run_ranks):
    """It names the error, the mesh and the cure."""
    with pytest.raises(PlanError, match=r"runs in one process, but on mesh pp=2 it raises KeyError: 'hidden': use the"):
        run_ranks(2, functools.partial(run, step=hooked, strategy="pipeline", split_at=["3"]))


def test_an_error_of_the_step_itself_stays_as_it_is(run_ranks):
    """One process raises it too."""
    with pytest.raises(IndexError, match="index out of range"):
        run_ranks(2, functools.partial(run, step=broken, strategy="shard"))
