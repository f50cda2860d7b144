"""Restore: a checkpoint is loaded into any model of the same shapes, or refused before anything changes."""

from __future__ import annotations

import functools
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from problems import ADAMW, alone, assert_same_bits, classes, mlp, seeded, stop_after, train, weights
from saved_checkpoints import WIDTH, fused, keep, mounted, net, newest, over, pulled, sgd
from test_shard_plan import Noting
from torch import nn

import nbdist
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.optimizers import OPTIMIZERS
from nbdist.core.params.param_table import ParamTable
from nbdist.core.state import checkpoint_reader
from nbdist.core.state.checkpoint_reader import NEWEST, CheckpointReader
from nbdist.core.state.restore import load, load_whole, open_on_all_ranks
from nbdist.errors import PeerLostError, PlanError, TaskError
from nbdist.plan import Mesh
from nbdist.telemetry import RunStarted


def test_views_and_odd_layouts(tmp_path):
    """Buffers that share memory, channels last, empty, half precision: all are restored, strides too."""

    def make():
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(3, 4).bfloat16(), nn.Linear(0, 4))
        model.to(memory_format=torch.channels_last)
        model.register_buffer("all", torch.arange(6))
        model.register_buffer("some", model.all[:3])
        model.register_buffer("scratch", torch.randn(2), persistent=False)
        model.register_buffer("flags", torch.tensor([True, False]).expand(3, 2))
        return model

    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    keep(tmp_path, model, optimizer)
    again = make()
    again.flags = again.flags.clone()
    strides = [p.stride() for p in again.parameters()]
    other = torch.optim.AdamW(again.parameters())
    nbdist.load_checkpoint(str(tmp_path), again, other)
    for a, b in zip([*model.parameters(), *model.buffers()], [*again.parameters(), *again.buffers()], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert strides == [p.stride() for p in again.parameters()]
    assert all(other.state[p]["exp_avg"].stride() == p.stride() for p in again.parameters())
    assert other.state[again[0].weight]["step"].dtype == torch.float32
    assert 0.1 == other.param_groups[0]["lr"]
    other.step()


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon"}))
def test_every_optimizer_of_torch(tmp_path, name):
    """Saved and loaded, it continues with the same bits."""
    model = net()
    optimizer = over(OPTIMIZERS[name], model)
    keep(tmp_path, model, optimizer)
    again = net()
    other = over(OPTIMIZERS[name], again)
    nbdist.load_checkpoint(str(tmp_path), again, other)
    for made in (optimizer, other):
        for parameter in made.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 0.5)
        made.step()
    assert_same_bits(weights(model), weights(again))


def test_loaded_state_does_not_map_the_file(tmp_path):
    """It must not change with the file, nor hold it open."""
    model = net()
    optimizer = over(functools.partial(torch.optim.AdamW, lr=0.1), model)
    keep(tmp_path, model, optimizer)
    nbdist.load_checkpoint(str(tmp_path), model, optimizer)
    before = {id(p): {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    (newest(tmp_path) / "rank0.safetensors").write_bytes(b"\0" * 100_000)
    for parameter, state in optimizer.state.items():
        assert_same_bits(before[id(parameter)], state)


def test_another_dtype(tmp_path):
    """Weights and state take the dtype of the model that they are loaded into."""
    keep(tmp_path, net(), fused)
    again = net().float()
    other = over(fused, again)
    nbdist.load_checkpoint(str(tmp_path), again, other)
    assert {torch.float32} == {v.dtype for state in other.state.values() for v in state.values()}
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()


def test_state_that_is_no_tensor(tmp_path):
    """Numbers, strings, lists and dicts are restored."""
    kept = {"a": [1, 2.5, None], "b": "text"}
    keep(tmp_path, net(), functools.partial(Noting, kept=kept))
    again = net()
    other = over(Noting, again)
    nbdist.load_checkpoint(str(tmp_path), again, other)
    assert len(other.state) == len(other.param_groups[0]["params"])
    assert all(state["note"] == kept for state in other.state.values())


def test_without_an_optimizer_its_state_stays(tmp_path):
    """Only weights are loaded."""
    keep(tmp_path, net(), fused)
    model = net()
    nbdist.load_checkpoint(str(tmp_path), model)
    other = net()
    nbdist.load_checkpoint(str(tmp_path), other, over(fused, other))
    assert_same_bits(weights(model), weights(other))


@pytest.fixture
def refused(monkeypatch):
    """Checks that a folder is refused by every way to load it, and that nothing has changed."""
    monkeypatch.setattr("nbdist.core.api.fit", lambda *a, **k: pytest.fail("it began"))

    def check(place, error, match, model, optimizer=fused):
        before = weights(model)
        made = over(optimizer, model)
        with pytest.raises(error, match=match):
            nbdist.load_checkpoint(str(place), model, made)
        with pytest.raises(error, match=match):
            nbdist.train(
                model, classes(16), loss="cross_entropy", optimizer=made, epochs=9, resume=str(place), device="cpu"
            )
        assert_same_bits(before, weights(model))
        assert not made.state

    return check


def test_mistakes_are_reported_before_anything_changes(tmp_path, refused):
    """No checkpoint, another model, other groups, files that are missing."""
    folder = tmp_path / "good"
    keep(folder, net(), sgd)
    refused(tmp_path / "none", PlanError, "holds no checkpoint .* give the folder that was written to", net())
    refused(folder, TaskError, r"is of another model: 0.weight \[8, 6\] is not in it", mlp())
    wider = net()
    wider.last = nn.Linear(WIDTH, 4)
    refused(folder, TaskError, r"last.weight \[4, 8\] has shape \[3, 8\] in it", wider)
    less = net()
    less.scale = None
    less.register_parameter("scale", None)
    refused(folder, TaskError, "scale is only in it", less)
    refused(folder, TaskError, "has other parameter groups", net())
    next(newest(folder).glob("*.safetensors")).unlink()
    refused(folder, PlanError, "is not whole", net(), sgd)


def resume(folder, **options):
    return nbdist.train(
        mlp(), classes(40), loss="cross_entropy", optimizer="sgd", resume=str(folder), device="cpu", record=False,
        verbose=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"epochs": 2}, {"epochs": 2}, r"was saved after 2 epochs: give a larger total \(--epochs 3\)"),
        ({"epochs": 2}, {"epochs": 1}, r"was saved after 2 epochs"),
        ({"epochs": 2}, {}, r"was saved after 2 epochs"),
        ({"epochs": 2}, {"steps": 10}, r"was saved after 10 steps: give a larger total \(--steps 11\)"),
        ({"steps": 7}, {"steps": 7}, r"was saved after 7 steps"),
        ({"steps": 7}, {"steps": 3}, r"was saved after 7 steps"),
        ({"steps": 7}, {"epochs": 1}, r"was saved after 1 epoch:"),
        ({"steps": 7}, {"epochs": 3, "batch_size": 10},
         "from the middle of epoch 2 of a run with batch_size=8, but batch_size=10 is given: give the same"),
        ({"steps": 7}, {"epochs": 3, "seed": 1}, "with seed=0, but seed=1 is given: give"),
        ({"steps": 7}, {"epochs": 3, "shuffle": False}, "with shuffle=True, but shuffle=False is given: give"),
    ],
)  # fmt: skip
def test_checkpoints_that_a_plan_cannot_resume_from(tmp_path, made, asked, message):
    """All epochs or steps are complete, or the remaining samples of the epoch would be other ones."""
    alone(mlp(), classes(40), optimizer="sgd", batch_size=8, checkpoint=str(tmp_path), **made)
    with pytest.raises(PlanError, match=message):
        resume(tmp_path, **{"batch_size": 8, **asked})


@pytest.mark.parametrize(
    ("asked", "message"), [({"epochs": 1}, "after 1 epoch: give a larger"), ({"steps": 7}, "after 8 steps")]
)
def test_a_checkpoint_from_a_later_step_is_not_resumed_from(tmp_path, asked, message):
    """It is from the middle of an epoch, whose row is not complete, as after an interrupt."""
    alone(mlp(), classes(40), optimizer="sgd", batch_size=8, steps=9, checkpoint=str(tmp_path), checkpoint_every=8)
    with pytest.raises(PlanError, match=message):
        resume(next(tmp_path.glob("*8")), batch_size=8, **asked)


@pytest.mark.parametrize("asked", [{"batch_size": 10}, {"seed": 3}, {"shuffle": False}])
def test_between_epochs_the_sample_order_may_change(tmp_path, asked):
    """There is no partial epoch to complete."""
    alone(mlp(), classes(40), optimizer="sgd", batch_size=8, epochs=1, checkpoint=str(tmp_path))
    result = resume(tmp_path, epochs=2, **{"batch_size": 8, **asked})
    assert [1, 2] == [row["epoch"] for row in result.history]


@pytest.mark.parametrize(("first", "then"), [({"epochs": 1}, {"steps": 12}), ({"steps": 7}, {"epochs": 3})])
def test_steps_and_epochs_may_follow_each_other(tmp_path, first, then):
    """A run in epochs resumes in steps, and vice versa, with the bits of an undisturbed run."""
    options = {"optimizer": ADAMW, "batch_size": 8}
    _, expected = alone(mlp(dropout=0.1), classes(40), **options, **then)
    alone(mlp(dropout=0.1), classes(40), checkpoint=str(tmp_path), **options, **first)
    _, actual = alone(mlp(dropout=0.1), classes(40), resume=str(tmp_path), **options, **then)
    assert_same_bits(expected, actual)


def test_resume_without_a_folder(tmp_path):
    """True means the newest in `checkpoint`, or a start from scratch if there is none; without a folder, an error."""
    options = {"batch_size": 8, "checkpoint": str(tmp_path), "optimizer": "sgd"}
    _, expected = alone(mlp(), classes(40), batch_size=8, optimizer="sgd", epochs=2)
    alone(mlp(), classes(40), epochs=1, resume=True, **options)
    result, actual = alone(mlp(), classes(40), epochs=2, resume=True, **options)
    assert [1, 2] == [row["epoch"] for row in result.history]
    assert_same_bits(expected, actual)
    with pytest.raises(PlanError, match="there is nothing to resume: name a folder, or use checkpoint"):
        nbdist.train(mlp(), classes(8), loss="cross_entropy", resume=True, device="cpu", record=False, verbose=False)


@pytest.mark.parametrize("then", ["LambdaLR", "none"])
def test_another_scheduler(tmp_path, then):
    """It is refused; without a scheduler the rates stay as they were."""
    options = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8}
    made = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    alone(mlp(), classes(40), steps=2, lr_scheduler=made, checkpoint=str(tmp_path), **options)
    if then == "none":
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        alone(model, classes(40), steps=3, resume=str(tmp_path), **options | {"optimizer": optimizer, "lr": None})
        assert 0.025 == optimizer.param_groups[0]["lr"]
        return
    other = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
    with pytest.raises(TaskError, match=re.escape("the saved state is of another lr_scheduler: give the same one")):
        alone(mlp(), classes(40), steps=3, lr_scheduler=other, resume=str(tmp_path), **options)


def test_counts_continue_with_another_number_of_ranks(run_ranks, tmp_path):
    """A row counts each sample once, whichever rank has read it."""
    expected, _ = alone(mlp(), classes(40), optimizer="sgd", batch_size=8, epochs=1)
    options = {"optimizer": "sgd", "batch_size": 8}

    alone(mlp(), classes(40), epochs=1, checkpoint=str(tmp_path), commands=stop_after(2), **options)
    for row in run_ranks(2, epoch_on, str(tmp_path)):
        assert {**expected.history[0], "seconds": 0} == {**row, "seconds": 0, "loss": pytest.approx(row["loss"])}


def epoch_on(world, folder):
    result, _ = train(world, mlp(), classes(40), optimizer="sgd", batch_size=8, epochs=1, resume=folder)
    return result.history[0]


def resumed_beside_a_writer(world, folder, newer):
    """Resume from a folder in which a newer checkpoint is published as soon as rank 0 has listed it."""
    looked, look = Path(folder, "looked"), checkpoint_reader.checkpoints

    def gated(path):
        if world.rank == 0:
            names = look(path)
            Path(newer, NEWEST).replace(Path(folder, NEWEST))
            looked.touch()
            return names
        while not looked.exists():
            time.sleep(0.001)
        return look(path)

    begun = []
    sink = type("Sink", (), {"emit": lambda _, event: isinstance(event, RunStarted) and begun.append(event.step)})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_reader, "checkpoints", gated)
        train(world, mlp(), torch.zeros(16, 1), step=pulled, optimizer="sgd", steps=9, resume=folder, sinks=[sink])
    return begun


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_chooses(run_ranks, tmp_path):
    """Even if a newer one is published before other ranks look."""
    keep(tmp_path / "run", mlp(), "sgd", steps=2)
    shutil.copytree(tmp_path / "run", tmp_path / "newer")
    keep(tmp_path / "newer", mlp(), "sgd", steps=5)
    shutil.copytree(tmp_path / "newer", tmp_path / "run", dirs_exist_ok=True, ignore=lambda *_: [NEWEST])
    assert [[2], [2]] == run_ranks(2, resumed_beside_a_writer, str(tmp_path / "run"), str(tmp_path / "newer"))


def resumed_beside_another_disk(world, folder, other):
    """Rank 1 sees another checkpoint under the same name."""
    if world.rank == 1:
        if not mounted(folder, None):
            world.leave()
            return "no disk can be made here"
        shutil.copytree(other, folder, dirs_exist_ok=True)
    try:
        train(world, mlp(), torch.zeros(16, 1), step=pulled, optimizer="sgd", steps=9, resume=folder)
    except (PlanError, PeerLostError) as error:
        return str(error)
    return "it went on"


def test_a_rank_that_sees_another_checkpoint_is_named(run_ranks, tmp_path):
    """Weights of two checkpoints are never mixed."""
    keep(tmp_path / "run", mlp(), "sgd", steps=2)
    keep(tmp_path / "other", mlp(), "sgd", steps=3)
    place = newest(tmp_path / "run")
    reported = run_ranks(2, resumed_beside_another_disk, str(place), str(newest(tmp_path / "other")))
    if "no disk can be made here" in reported:
        pytest.skip("no disk can be made here")
    assert 1 == len({*reported})
    assert re.match(
        r"rank 0 resumes from .*step00000002', of which rank 1 does not see the same files \(it has", reported[0]
    )


def bytes_read_to_resume(world, folder):
    """How many bytes this rank reads from files to resume from a folder."""

    def read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    open_on_all_ranks(folder, world)
    return read() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is read")
def test_a_host_reads_a_checkpoint_through_once(run_ranks, tmp_path):
    """Each byte is hashed by one rank, however many there are."""
    run_ranks(3, save_12_mb_per_rank, str(tmp_path))
    size = sum(file.stat().st_size for file in newest(tmp_path).iterdir())
    reported = run_ranks(3, bytes_read_to_resume, str(tmp_path))
    assert size <= sum(reported) < 1.2 * size
    assert max(reported) < 0.6 * size


def save_12_mb_per_rank(world, folder):
    """A checkpoint with 12 MB of each rank."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))
    options = {"step": summed, "optimizer": "sgd", "steps": 1, "batch_size": 48, "strategy": "shard"}
    train(world, model, torch.zeros(48, 512), checkpoint=folder, **options)


def summed(model, x):
    """A step without a target."""
    return model(x).sum(1).mean()


def test_a_file_that_one_rank_finds_changed_is_taken_by_none(run_ranks, tmp_path):
    """All ranks load the checkpoint before it."""
    for steps in (1, 2):
        keep(tmp_path, mlp(), "sgd", steps=steps)
    file = newest(tmp_path) / "rank0.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [1, 1] == run_ranks(2, step_resumed, str(tmp_path))


def step_resumed(world, folder):
    """The step of the checkpoint that this rank loads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = open_on_all_ranks(folder, world).ranks[0]["position"]["step"]
    assert (world.rank == 0) == any("was changed: copy all" in str(warning.message) for warning in caught)
    return step


def normed():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), torch.float64)


def stopped_in_mid_epoch(world, folder, strategy):
    options = {"optimizer": "sgd", "batch_size": 8, "epochs": 2, "commands": stop_after(2)}
    train(world, normed(), classes(40), checkpoint=folder, strategy=strategy, **options)


def statistics(world, folder, mesh):
    model = normed()
    load(CheckpointReader.in_folder(folder), model, ParamTable.of(model), {}, MeshChannels(world, mesh))
    return model[1].running_mean


@pytest.mark.parametrize(("kept", "then"), [("dp=4", Mesh(dp=2, pp=2)), ("dp=2,pp=2", Mesh(dp=4))])
def test_statistics_on_another_mesh_of_as_many_ranks(run_ranks, tmp_path, kept, then):
    """Every rank gets the mean over all saved ones, as one process does, and not those of one other rank."""
    run_ranks(4, stopped_in_mid_epoch, str(tmp_path), kept)
    whole = normed()
    load_whole(CheckpointReader.in_folder(str(tmp_path)), whole)
    for found in run_ranks(4, statistics, str(tmp_path), then):
        torch.testing.assert_close(found, whole[1].running_mean, rtol=0, atol=0)
