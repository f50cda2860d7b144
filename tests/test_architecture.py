"""Imports between rooms match the room table of nbdist/README.md; a fresh process loads no torch too early."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import nbdist

ROOT = Path(nbdist.__file__).parent
EVERYWHERE = {
    "nbdist.errors",
    "nbdist.interrupts",
    "nbdist.keepalive",
    "nbdist.listening",
    "nbdist.peer_auth",
    "nbdist.process_mark",
    "nbdist.segment_path",
}
PICTURES = {"matplotlib", "pandas", "rich", "torch.utils.tensorboard"}
NOTEBOOK_WORLD = {"IPython", "ipyparallel", "ipykernel", "anywidget", "ipywidgets", "traitlets"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement: what it names, where, and whether it runs when the module is imported."""

    name: str
    at: str
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.at} imports {self.name}"


def imports(layer):
    """Every import of the layer `layer`, a folder or a file of nbdist; those for type checkers only are left out."""
    place = ROOT / layer
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        yield from _imports(ast.parse(path.read_text()), str(path.relative_to(ROOT.parent)), False)


def _imports(node, path, inside):
    for child in ast.iter_child_nodes(node):
        at = f"{path}:{getattr(child, 'lineno', 0)}"
        if isinstance(child, ast.Import):
            yield from (Import(name=alias.name, at=at, inside_function=inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{at} is a relative import: write it out"
            yield from (_from(child.module, alias.name, at, inside) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, path, inside or function)


def _from(module, name, at, inside):
    """``from nbdist import errors`` imports a module, ``from nbdist.errors import suggest`` a name in one."""
    below = ROOT.parent.joinpath(*module.split("."), name)
    submodule = module.split(".")[0] == "nbdist" and (below.is_dir() or below.with_suffix(".py").is_file())
    return Import(name=f"{module}.{name}" if submodule else module, at=at, inside_function=inside)


def within(name, modules):
    return any(name == module or name.startswith(module + ".") for module in modules)


def standard(name):
    return name.split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("layer", ["plan", "telemetry"])
def test_the_lowest_layers_stand_on_the_standard_library(layer):
    """plan and telemetry import neither each other nor torch; telemetry imports drawing libraries in functions."""
    allowed = EVERYWHERE | {f"nbdist.{layer}"}
    drawing = PICTURES if layer == "telemetry" else set()
    found = [i for i in imports(layer) if not standard(i.name) and not within(i.name, allowed)]
    assert [] == [str(i) for i in found if not (i.inside_function and within(i.name, drawing))]


def test_errors_import_nothing():
    """They are below everything."""
    assert [] == [str(i) for i in imports("errors.py") if not standard(i.name)]


def rooms():
    """Room -> the rooms that it may import, as nbdist/README.md has it."""
    rows = re.findall(r"^\| `([\w/]+)` \| .+ \| (.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"`([\w/]+)`", allowed)) for room, allowed in rows}


def room_of(name):
    """The folder, below nbdist, of the module in which a name is; of a package its own."""
    parts = name.split(".")[1:]
    while parts and not ROOT.joinpath(*parts).is_dir():
        parts.pop()
    return "/".join(parts)


def files_of(room):
    """The modules of a room, without those of the rooms inside it where these are in the table too."""
    inside = [ROOT / other for other in rooms() if other.startswith(f"{room}/")]
    for path in sorted((ROOT / room).rglob("*.py")):
        if not any(folder in path.parents for folder in inside):
            yield str(path.relative_to(ROOT))


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_the_table_says(room):
    """Nothing else of nbdist, and every room in its row."""
    found = {}
    for i in (i for file in files_of(room) for i in imports(file)):
        if within(i.name, {"nbdist"}) and not within(i.name, EVERYWHERE) and room_of(i.name) != room:
            found.setdefault(room_of(i.name), str(i))
    assert {other: found.get(other, "nobody") for other in rooms()[room] | set(found)} == found
    assert rooms()[room] == set(found)


def test_every_folder_is_a_room():
    """Each folder of modules stands in the table, and each room there is a folder."""
    assert {str(path.parent.relative_to(ROOT)) for path in ROOT.rglob("__init__.py")} - {"."} == set(rooms())


def test_the_rooms_form_no_cycle():
    """They can be sorted, with at most nine floors within a layer."""
    table, floors = rooms(), {}
    while len(floors) < len(table):
        ready = [room for room in table if room not in floors and table[room] <= set(floors)]
        assert ready, f"a cycle among {sorted(set(table) - set(floors))}"
        for room in ready:
            layer = room.partition("/")[0]
            below = [floors[other] for other in table[room] if other.partition("/")[0] == layer]
            floors[room] = 1 + max(below, default=0)
    assert max(floors.values()) <= 9


def test_core_knows_no_notebook():
    """core runs under torchrun: it imports no notebook package."""
    assert [] == [str(i) for i in imports("core") if within(i.name, NOTEBOOK_WORLD)]


def test_ipyparallel_stays_in_one_room():
    """In the kernel where engines are launched; on an engine, a process of its own, one runs it."""
    room = {f"cluster/launch/{name}.py" for name in ("forked_controller", "ipyparallel_client", "launcher")}
    on_hosts = "engine_shell", "ipyparallel_patches", "mpi", "running_cluster", "ssh"
    room |= {f"cluster/hosts/{name}.py" for name in on_hosts}
    engine = {"engine/parent_watch.py"}
    found = {i.at.partition(":")[0] for i in imports(".") if within(i.name, {"ipyparallel"})}
    assert {f"nbdist/{file}" for file in room | engine} == found


def test_notebook_uses_the_cluster_only():
    """notebook imports neither torch nor core, in functions neither."""
    for i in imports("notebook"):
        assert not within(i.name, {"torch", "nbdist.core", "nbdist.engine", "nbdist.cli"}), i


def test_the_command_line_is_a_way_in_of_its_own():
    """cli and the demo use core, plan and telemetry; they import modules that need IPython in functions."""
    allowed = EVERYWHERE | {"nbdist.core", "nbdist.plan", "nbdist.telemetry", "nbdist.cli", "nbdist.demo"}
    for i in (i for file in ("cli.py", "demo.py", "__main__.py") for i in imports(file)):
        if within(i.name, {"nbdist.cluster", "nbdist.engine", "nbdist.notebook"} | NOTEBOOK_WORLD):
            assert i.inside_function, i
        else:
            assert within(i.name, allowed) or i.name == "nbdist" or not within(i.name, {"nbdist"}), i


def test_every_module_has_a_layer():
    """Each top-level module is a layer, an entry point, or used by all layers."""
    layers, ways_in = (
        {"plan", "telemetry", "upstream", "core", "engine", "cluster", "notebook"},
        {"__init__", "__main__", "cli", "demo"},
    )
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert (
        layers
        | ways_in
        | {
            "errors",
            "interrupts",
            "keepalive",
            "listening",
            "peer_auth",
            "process_mark",
            "segment_path",
            "store_server",
        }
        == found
    )


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    """A forbidden import is found in each of its forms."""
    (tmp_path / "nbdist" / "plan").mkdir(parents=True)
    (tmp_path / "nbdist" / "core.py").touch()
    (tmp_path / "nbdist" / "plan" / "wrong.py").write_text(
        "import torch.nn as nn\nfrom nbdist import core\nif True:\n    from IPython.display import HTML\n"
        "def f():\n    import nbdist.core\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "nbdist")
    found = [(i.name, i.inside_function) for i in imports("plan")]
    assert [("torch.nn", False), ("nbdist.core", False), ("IPython.display", False), ("nbdist.core", True)] == found


@pytest.mark.programs
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import nbdist", {"torch", "numpy", *NOTEBOOK_WORLD}),
        ("import nbdist.plan, nbdist.telemetry", {"torch", "numpy", *NOTEBOOK_WORLD}),
        ("import nbdist.core", NOTEBOOK_WORLD),
        ("from nbdist import train", NOTEBOOK_WORLD),
        ("import nbdist.cli", {"torch", *NOTEBOOK_WORLD}),
        ("import nbdist.cluster", {"torch"}),
        ("import nbdist.notebook.magics", {"torch"}),
    ],
)
def test_what_a_clean_process_loads(statement, absent):
    """Neither torch for ``%load_ext nbdist`` nor IPython for a script: each is seconds, and may not be installed."""
    code = f"import sys\n{statement}\nprint(*sorted({absent!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [] == loaded
