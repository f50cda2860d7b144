"""The compatibility tables: ``make compatibility`` writes them into README.md beside this file, tests read them.

python tests/compatibility/table.py [MODEL|DATA|TRAINING ...]    with names, only their rows are filled anew
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent)]

import cells
import source_cells
import training_cells

README = Path(__file__).parent / "README.md"


class Table(NamedTuple):
    """What a table is about, and how its rows are filled.

    Args:
        head: Of its first column.
        what: Of which kind its rows are, in the plural.
        begin: Stands before it in the README.
        end: Stands behind it.
        cases: Its rows.
        meshes: Its columns.
        row: Fills a row: the cells of a name on some meshes, whose ranks the first argument starts.
    """

    head: str
    what: str
    begin: str
    end: str
    cases: dict[str, Any]
    meshes: list[str]
    row: Callable[..., dict[str, str]]


MODELS = Table(
    "model", "models", "<!-- compatibility: written by make compatibility -->", "<!-- end of compatibility -->",
    cells.CASES, cells.MESHES, cells.row,
)  # fmt: skip
SOURCES = Table(
    "data", "forms of data", "<!-- data: written by make compatibility -->", "<!-- end of data -->",
    source_cells.CASES, source_cells.MESHES, source_cells.row,
)  # fmt: skip
TRAININGS = Table(
    "training", "kinds of training", "<!-- trainings: written by make compatibility -->", "<!-- end of trainings -->",
    training_cells.CASES, training_cells.MESHES, training_cells.row,
)  # fmt: skip
TABLES = (MODELS, SOURCES, TRAININGS)
EQUAL, FAULTS = "equal", ("DIFFERS", "FAILS")


def as_text(rows: dict[str, dict[str, str]], table: Table = MODELS) -> str:
    """The table, with a numbered line below it for each sentence."""
    sentences = list(dict.fromkeys(cell for found in rows.values() for cell in found.values() if cell != EQUAL))
    meshes = table.meshes
    lines = [f"| {table.head} | {' | '.join(f'`{mesh}`' for mesh in meshes)} |", f"| --- |{' --- |' * len(meshes)}"]
    for name, found in rows.items():
        texts = [EQUAL if found[m] == EQUAL else f"({sentences.index(found[m]) + 1})" for m in meshes]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    counts = ", ".join(f"{sum(found[mesh] == EQUAL for found in rows.values())} on `{mesh}`" for mesh in meshes)
    lines += ["", f"{len(rows)} {table.what}, of which are equal: {counts}.", ""]
    lines += [f"{i}. {sentence}" for i, sentence in enumerate(sentences, start=1)]
    return "\n".join(lines)


def read(table: Table = MODELS) -> dict[str, dict[str, str]]:
    """The table as it was written: each row's cells, by mesh."""
    text = README.read_text().partition(table.begin)[2].partition(table.end)[0]
    sentences = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    rows = {}
    for line in text.splitlines():
        name, *texts = [part.strip() for part in line.strip("|").split(" | ")]
        if name in table.cases:
            found = [text if text == EQUAL else sentences[text.strip("()")] for text in texts]
            rows[name] = dict(zip(table.meshes, found, strict=True))
    return rows


def gist(cell: str) -> str:
    """A cell without measured numbers, whose last digits depend on the machine, and without places in files."""
    return re.sub(r"line \d+|\d+\.\d+(e[-+]?\d+)?", "_", cell)


def write(rows: dict[str, dict[str, str]], table: Table = MODELS) -> None:
    """Put the table into the README."""
    start, _, rest = README.read_text().partition(table.begin)
    text = as_text(rows, table)
    README.write_text(f"{start}{table.begin}\n\n{text}\n\n{table.end}{rest.partition(table.end)[2]}")


def fill(table: Table, pool: Any, chosen: list[str]) -> int:
    """Fill a table's rows; returns how many cells are faults."""
    began_s, before = time.perf_counter(), read(table)
    rows = {name: before.get(name, {}) for name in table.cases}
    for name in chosen:
        found = rows[name] = table.row(pool, name, table.meshes)
        marks = [cell if cell.startswith(FAULTS) else EQUAL if cell == EQUAL else "refused" for cell in found.values()]
        print(f"{name:34}" + "".join(f"{mark:>14}" for mark in marks), flush=True)
        for mesh, cell in found.items():
            was = before.get(name, {}).get(mesh, "")
            if before and gist(was) != gist(cell):
                print(f"    {mesh} was: {was or '-'}\n    {mesh} is: {cell}", flush=True)
    write({name: found for name, found in rows.items() if found}, table)
    faults = sum(cell.startswith(FAULTS) for found in rows.values() for cell in found.values())
    print(f"{len(rows) * len(table.meshes)} cells, {faults} faults, {time.perf_counter() - began_s:.0f} s")
    return faults


def main(chosen: list[str]) -> int:
    """Fill the tables, or the rows of these names; returns how many cells are faults."""
    import torch
    from ranks import RankPool

    torch.set_num_threads(1)
    pool, faults = RankPool(), 0
    for table in TABLES:
        names = [name for name in table.cases if not chosen or name in chosen]
        faults += fill(table, pool, names) if names else 0
    return faults


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]) > 0)
