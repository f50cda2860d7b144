"""Models of many shapes on meshes: each cell of the compatibility table is as it is written."""

from __future__ import annotations

import pytest
import source_cells
import table
import training_cells
from cells import CASES, MESHES, outcome, row, run_cell

# What `make test` runs: a model on each mesh that asks something of it.
PART = {
    ("dp=2", "packed bidirectional GRU"), ("dp=2", "MoE, top 2, balance loss"), ("dp=2", "early exits"),
    ("dp=2", "VQ-VAE, moving codebook"), ("dp=2", "GAT, collated graphs"), ("shard=2", "neural operator, complex"),
    ("shard=2", "critic, gradient penalty"), ("pp=2", "checkpoint"), ("pp=2", "U-Net, ignored labels"),
    ("pp=2", "own autograd.Function"), ("tp=2", "LoRA"), ("tp=2", "capsules"), ("dp=2,shard=2", "masked LM, own loss"),
    ("dp=2,pp=2", "diffusion"), ("dp=2", "SimCLR, gathered"), ("pp=2", "a sum"), ("shard=2", "WGAN-GP"),
    ("pp=2", "two modules, one loss"),
}  # fmt: skip
CELLS = [
    pytest.param(mesh, name, marks=[] if (mesh, name) in PART else pytest.mark.compatibility)
    for name in CASES for mesh in MESHES
]  # fmt: skip


# What `make test` runs of the data: a form on each mesh.
SOURCES_PART = {
    ("dp=1", "batches, mappings"), ("dp=2", "loader, own iter, a worker"), ("dp=2", "stream by get_rank"),
    ("dp=2", "database"), ("dp=3", "buckets by length"), ("dp=3", "images of other sizes"),
    ("dp=3", "stream, two workers"), ("tp=2", "sampler of pairs"), ("dp=2,pp=2", "batches of other sizes"),
}  # fmt: skip
SOURCE_CELLS = [
    pytest.param(mesh, name, marks=[] if (mesh, name) in SOURCES_PART else pytest.mark.compatibility)
    for name in source_cells.CASES for mesh in source_cells.MESHES
]  # fmt: skip


# What `make test` runs of the trainings: a mesh of each that needs no notebook.
TRAININGS_PART = {
    ("dp=2", "a rate by steps"), ("dp=2,pp=2", "a rate by epochs"), ("shard=2", "a rate by val_loss"),
    ("dp=2,shard=2", "numbers and objects that are measured"), ("tp=2", "a function after each epoch"),
    ("pp=2", "the best epoch, an early stop"), ("dp=2", "layers frozen, then thawed"),
    ("shard=2", "a rehearsal before"), ("dp=2", "episodes, advantages of a batch"),
}  # fmt: skip
TRAINING_CELLS = [
    pytest.param(mesh, name, marks=[] if (mesh, name) in TRAININGS_PART else pytest.mark.compatibility)
    for name in training_cells.CASES for mesh in training_cells.MESHES
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "name"), TRAINING_CELLS)
def test_a_kind_of_training_is_as_it_is_written(run_ranks, mesh, name):
    """Losses, numbers and weights are those of a plain loop, or a sentence refuses the mesh."""
    written = table.read(table.TRAININGS)[name][mesh]
    assert table.gist(written) == table.gist(training_cells.row(run_ranks, name, [mesh])[mesh])


def test_the_table_of_trainings_is_whole():
    """No row is missing, no cell empty, and no fault; a part of it, with every mesh, is in `make test`."""
    rows = table.read(table.TRAININGS)
    assert list(training_cells.CASES) == list(rows)
    cells = [cell for row in rows.values() for cell in row.values()]
    assert not [cell for cell in cells if not cell or cell.startswith(table.FAULTS)]
    assert set(training_cells.MESHES) == {mesh for mesh, _ in TRAININGS_PART}
    assert {name for _, name in TRAININGS_PART} <= set(training_cells.CASES)


@pytest.mark.parametrize(("mesh", "name"), SOURCE_CELLS)
def test_a_form_of_data_is_as_it_is_written(run_ranks, mesh, name):
    """The weights are those of a plain loop over the same batches, or a sentence refuses the data."""
    written = table.read(table.SOURCES)[name][mesh]
    assert table.gist(written) == table.gist(source_cells.row(run_ranks, name, [mesh])[mesh])


def test_the_table_of_data_is_whole():
    """At least thirty forms, no cell empty, and no fault; a part of it, with every mesh, is in `make test`."""
    rows = table.read(table.SOURCES)
    assert list(source_cells.CASES) == list(rows)
    assert 30 <= len(rows)
    cells = [cell for row in rows.values() for cell in row.values()]
    assert not [cell for cell in cells if not cell or cell.startswith(table.FAULTS)]
    assert set(source_cells.MESHES) == {mesh for mesh, _ in SOURCES_PART}
    assert {name for _, name in SOURCES_PART} <= set(source_cells.CASES)


@pytest.mark.parametrize(("mesh", "name"), CELLS)
def test_a_cell_is_as_it_is_written(run_ranks, mesh, name):
    """Equal to a loop in plain PyTorch, or refused with the sentence of the table."""
    written = table.read()[name][mesh]
    assert table.gist(written) == table.gist(row(run_ranks, name, [mesh])[mesh])


def test_the_table_is_whole():
    """At least forty models, no cell empty, and no fault; a part of it, with every mesh, is in `make test`."""
    rows = table.read()
    assert list(CASES) == list(rows)
    assert 40 <= len(rows)
    cells = [cell for row in rows.values() for cell in row.values()]
    assert not [cell for cell in cells if not cell or cell.startswith(table.FAULTS)]
    assert set(MESHES) == {mesh for mesh, _ in PART}
    assert {name for _, name in PART} <= set(CASES)


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    """Sentences below it included."""
    rows = {name: dict.fromkeys(MESHES, table.EQUAL) | {"tp=2": f"why {len(name)}."} for name in list(CASES)[:3]}
    monkeypatch.setattr(table, "README", tmp_path / "README.md")
    table.README.write_text(f"before {table.MODELS.begin}\n{table.MODELS.end} after")
    table.write(rows)
    assert table.README.read_text().endswith(f"{table.MODELS.end} after")
    assert rows == table.read()


def test_a_difference_is_seen():
    """A loss or a tensor beside the plain loop's by more than rounding is a fault, by name."""
    from nbdist.core.comm.world import World

    name = "MLP, summed loss"
    loss, tensors, checked = run_cell(World(), name, "dp=1")
    assert table.EQUAL == outcome(name, "dp=1", (loss, tensors, checked))
    tensors["0.bias"] += 1e-8
    assert "DIFFERS: 0.bias by 1.0e-08" == outcome(name, "dp=1", (loss, tensors, checked))
