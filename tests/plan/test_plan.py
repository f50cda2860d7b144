"""The Plan: frozen, JSON-able, checked on creation."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from nbdist.errors import PlanError
from nbdist.plan import Mesh, Plan
from nbdist.plan.plan import OPTIONS


def create(ranks=2, cores=8, **options):
    return Plan.create(ranks=ranks, cores=cores, **options)


def test_defaults_depend_on_ranks_and_cores():
    """One epoch, all ranks on the data axis, the cores divided among them."""
    plan = create()
    assert (Mesh(dp=2), 1, None, 32, 4) == (plan.mesh, plan.epochs, plan.steps, plan.batch_size, plan.threads)
    assert 1 == create(ranks=4, cores=2).threads
    assert (None, 5) == (create(steps=5).epochs, create(steps=5).steps)


def test_none_means_not_given():
    """Options that a user left out keep their default."""
    assert create() == create(**dict.fromkeys(OPTIONS))


def test_a_plan_is_pure_data():
    """It cannot be changed, and survives JSON."""
    plan = create(lr=0.1, clip_norm=1, seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lr = 1.0
    data = json.loads(json.dumps(plan.to_dict()))
    assert plan == Plan(**{**data, "mesh": Mesh(**data["mesh"])})


@pytest.mark.parametrize(
    ("batch_size", "flat", "microbatches"),
    [(64, False, 4), (64, True, 2), (127, True, 2), (128, True, 4), (4, False, 2), (4, True, 2), (2, True, 1)],
)
def test_a_pipeline_gets_fewer_microbatches_of_flat_samples(batch_size, flat, microbatches):
    """Each costs its layers a pass over their weights, which few rows do not pay for."""
    plan = Plan.create(ranks=2, cores=2, strategy="pp", batch_size=batch_size, flat_samples=flat)
    assert microbatches == plan.slices_per_rank
    given = Plan.create(ranks=2, cores=2, strategy="pp", batch_size=64, microbatches=4, flat_samples=flat)
    assert 4 == given.microbatches


def test_slices_are_ranks_times_microbatches():
    """Each slice is one forward and backward."""
    assert 6 == create(accumulate=3).slices


def test_every_option_has_a_sentence():
    """Each field but the mesh, and what is found of the step, is an option, with a help and a placeholder."""
    assert {field.name for field in dataclasses.fields(Plan)} - {"mesh", "checked", "updates", "carries"} == set(
        OPTIONS
    )
    for name, option in OPTIONS.items():
        assert option.help.endswith("."), name
        assert option.metavar, name


class Index:
    """Counts as a whole number, as NumPy's integers do."""

    def __index__(self):
        return 7


def test_numbers_of_other_libraries_become_pythons():
    """So that the plan stays JSON-able."""
    plan = create(batch_size=Index(), seed=Index(), lr="0.5")
    assert (int, int, float) == (type(plan.batch_size), type(plan.seed), type(plan.lr))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs 0 is too small: use 1 or more\."),
        ({"steps": -3}, "steps -3 is too small: use 1 or more"),
        ({"epochs": 2, "steps": 3}, "epochs=2 and steps=3: give one of the two"),
        ({"epochs": 1.5}, r"epochs must be a whole number, not 1\.5"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        (
            {"batch_size": 1},
            r"batch_size 1 is smaller than its 2 slices \(2 ranks x 1 micro.*: use 2 or more, or fewer",
        ),
        ({"batch_size": 5, "accumulate": 3}, r"batch_size 5 is smaller than its 6 slices \(2 ranks x 3 microbatches\)"),
        ({"accumulate": 0}, "accumulate 0 is too small"),
        ({"threads": 0}, "threads 0 is too small"),
        ({"seed": "one"}, "seed must be a whole number, not 'one'"),
        ({"lr": 0}, "lr 0 must be a positive number"),
        ({"lr": float("nan")}, "lr nan must be a positive number"),
        ({"clip_norm": -1.0}, r"clip_norm -1\.0 must be a positive number"),
        ({"bucket_mib": float("inf")}, "bucket_mib inf must be a positive number"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"shuffle": "no"}, "shuffle must be True or False, not 'no'"),
        ({"learning_rate": 0.1}, r"unknown option 'learning_rate'\. Did you mean 'lr'\?"),
        ({"batchsize": 3}, r"unknown option 'batchsize'\. Did you mean 'batch_size'\?"),
        ({"precision": "bf8"}, "unknown precision 'bf8': use full, bf16, fp16"),
        ({"schedule_by": "epoch"}, "schedule_by=epoch is for an lr_scheduler, and none is"),
        ({"schedule_by": "epochs"}, r"unknown schedule_by 'epochs': use step, epoch. Did you mean 'epoch'\?"),
        ({"schedule": "1f2b", "strategy": "pp"}, "unknown schedule '1f2b': use gpipe, 1f1b, interleaved"),
        ({"microbatches": 4}, "microbatches is given, but mesh dp=2 has no pp: use --strategy pipeline"),
        ({"split_at": "a"}, "split_at is given, but mesh dp=2 has no pp"),
        ({"split_at": "a b", "strategy": "pp"}, "split_at names 2 modules, but 2 stages have 1 cuts between them"),
        ({"tensor_plan": {"a": "row"}}, "tensor_plan is given, but mesh dp=2 has no tp: use --strategy tensor"),
        ({"tensor_plan": "a", "strategy": "tp"}, "tensor_plan must be a dict of layer names and kinds, not 'a'"),
        ({"checkpoint_every": 5}, r"checkpoint_every=5 needs a folder: name one with checkpoint \(--checkpoint DIR\)"),
        ({"checkpoint_keep": 0}, "checkpoint_keep 0 is too small: use 1 or more"),
        ({"stop_on_nan": "yes"}, "stop_on_nan must be True or False, not 'yes'"),
        ({"strategy": "pipelin"}, "unknown strategy 'pipelin': use data, .*Did you mean 'pipeline'"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    """The error names the value and the cure."""
    with pytest.raises(PlanError, match=message):
        create(**options)


@pytest.mark.parametrize(
    ("words", "cadence"),
    [
        ("", (0, 0.0)), (None, (0, 0.0)), (200, (200, 0.0)), ("200", (200, 0.0)), ("90s", (0, 90.0)),
        ("5min", (0, 300.0)), ("5 min", (0, 300.0)), ("0.5h", (0, 1800.0)), ("1.5s", (0, 1.5)),
    ],
)  # fmt: skip
def test_how_often_a_checkpoint_is_written(words, cadence):
    """In steps, or in time."""
    assert cadence == create(checkpoint="here", checkpoint_every=words).checkpoint_cadence


@pytest.mark.parametrize("words", ["often", "-3", "0", "0s", "1.5", "3 days", "1.2.3s", "s", "5 min ago", True, 2.5])
def test_how_often_that_is_neither_steps_nor_time(words):
    """The error shows how to write it."""
    with pytest.raises(PlanError, match="is neither steps nor a time: write 200, 90s, 5min or 1h"):
        create(checkpoint="here", checkpoint_every=words)


def test_what_a_person_writes_is_checked_without_assertions():
    """`python -O` removes asserts."""
    code = "from nbdist.plan import Plan\n"
    for words in ("often", "0", "0s"):
        code += f"try: print(Plan.create(ranks=1, cores=1, checkpoint='x', checkpoint_every={words!r}))\n"
        code += "except ValueError as error: print(type(error).__name__)\n"
    reported = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True).stdout
    assert ["PlanError"] * 3 == reported.split()


def test_folders_are_whole_paths(monkeypatch, tmp_path):
    """Ranks may have another working directory; to resume from the newest in `checkpoint` is no folder."""
    monkeypatch.chdir(tmp_path)
    plan = create(checkpoint="here", resume="~/there")
    assert (str(tmp_path / "here"), os.path.expanduser("~/there")) == (plan.checkpoint, plan.resume)
    assert create(checkpoint="here", resume=True).resume is True
    assert "" == create().resume
