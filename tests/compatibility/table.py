"""The compatibility table: ``make compatibility`` writes it into README.md beside this file, tests compare with it.

python tests/compatibility/table.py [MODEL ...]    with models, only their rows are filled anew
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from cells import CASES, MESHES, row

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- compatibility: written by make compatibility -->", "<!-- end of compatibility -->"
EQUAL, FAULTS = "equal", ("DIFFERS", "FAILS")


def as_text(rows: dict[str, dict[str, str]]) -> str:
    """The table, with a numbered line below it for each sentence."""
    sentences = list(dict.fromkeys(cell for cells in rows.values() for cell in cells.values() if cell != EQUAL))
    lines = [f"| model | {' | '.join(f'`{mesh}`' for mesh in MESHES)} |", f"| --- |{' --- |' * len(MESHES)}"]
    for name, cells in rows.items():
        texts = [EQUAL if cells[m] == EQUAL else f"({sentences.index(cells[m]) + 1})" for m in MESHES]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    counts = ", ".join(f"{sum(cells[mesh] == EQUAL for cells in rows.values())} on `{mesh}`" for mesh in MESHES)
    lines += ["", f"{len(rows)} models, of which are equal: {counts}.", ""]
    lines += [f"{i}. {sentence}" for i, sentence in enumerate(sentences, start=1)]
    return "\n".join(lines)


def read() -> dict[str, dict[str, str]]:
    """The table as it was written: each model's cells, by mesh."""
    text = README.read_text().partition(BEGIN)[2].partition(END)[0]
    sentences = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    rows = {}
    for line in text.splitlines():
        name, *texts = [part.strip() for part in line.strip("|").split(" | ")]
        if name in CASES:
            cells = [text if text == EQUAL else sentences[text.strip("()")] for text in texts]
            rows[name] = dict(zip(MESHES, cells, strict=True))
    return rows


def gist(cell: str) -> str:
    """A cell without measured numbers, whose last digits depend on the machine, and without places in files."""
    return re.sub(r"line \d+|\d+\.\d+(e[-+]?\d+)?", "_", cell)


def write(rows: dict[str, dict[str, str]]) -> None:
    """Put the table into the README."""
    start, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{start}{BEGIN}\n\n{as_text(rows)}\n\n{END}{rest.partition(END)[2]}")


def main(chosen: list[str]) -> int:
    """Fill the table; returns how many cells are faults."""
    import torch
    from ranks import RankPool

    torch.set_num_threads(1)
    pool, began_s, before = RankPool(), time.perf_counter(), read()
    rows = {name: before.get(name, {}) for name in CASES}
    for name in chosen or CASES:
        cells = rows[name] = row(pool, name, MESHES)
        marks = [cell if cell.startswith(FAULTS) else EQUAL if cell == EQUAL else "refused" for cell in cells.values()]
        print(f"{name:34}" + "".join(f"{mark:>14}" for mark in marks), flush=True)
        for mesh, cell in cells.items():
            was = before.get(name, {}).get(mesh, "")
            if before and gist(was) != gist(cell):
                print(f"    {mesh} was: {was or '-'}\n    {mesh} is: {cell}", flush=True)
    write({name: cells for name, cells in rows.items() if cells})
    faults = sum(cell.startswith(FAULTS) for cells in rows.values() for cell in cells.values())
    print(f"{len(rows) * len(MESHES)} cells, {faults} faults, {time.perf_counter() - began_s:.0f} s")
    return faults


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]) > 0)
