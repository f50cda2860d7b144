"""Which statements of cells make what a run uses."""

from __future__ import annotations

import pytest

from nbdist.errors import PlanError
from nbdist.notebook.cell_slice import names_in, sliced, statements_of


def texts(cells, names, **options):
    statements = [one for number, cell in enumerate(cells, 1) for one in statements_of(cell, number)]
    return [one.text for one in sliced(statements, names, **options)]


@pytest.mark.parametrize(
    ("cells", "names", "expected"),
    [
        (["a = 1\nb = 2", "c = a"], "c", ["a = 1", "c = a"]),
        (["a = 1", "a = 2", "c = a", "a = 3"], "c", ["a = 2", "c = a"]),
        (["a = 1", "a += 1", "c = a"], "c", ["a = 1", "a += 1", "c = a"]),
        (["a, b = 1, 2", "c = b"], "c", ["a, b = 1, 2", "c = b"]),
        (["import os, sys", "import json", "c = os.sep"], "c", ["import os, sys", "c = os.sep"]),
        (["from math import *", "c = pi"], "c", ["from math import *", "c = pi"]),
        (["def f():\n    return g()", "def g():\n    return 1", "c = f"], "c",
         ["def f():\n    return g()", "def g():\n    return 1", "c = f"]),
        (["def f():\n    return 1", "def f():\n    return 2", "c = f()"], "c", ["def f():\n    return 2", "c = f()"]),
        (["k = 2", "def f(x, n=k, *a, **b):\n    y = x\n    return [y for z in a]", "c = f"], "c",
         ["k = 2", "def f(x, n=k, *a, **b):\n    y = x\n    return [y for z in a]", "c = f"]),
        (["W = 3", "H = 4", "class N:\n    w = W\n\n    def f(self):\n        return H + self.w", "c = N()"], "c",
         ["W = 3", "H = 4", "class N:\n    w = W\n\n    def f(self):\n        return H + self.w", "c = N()"]),
        (["class A: pass", "class B(A): pass", "def d(f): return f", "@d\ndef f(x: A) -> B: return x", "c = f"], "c",
         ["class A: pass", "class B(A): pass", "def d(f): return f", "@d\ndef f(x: A) -> B: return x", "c = f"]),
        (["x = 1", "# what\n# and how\nc = x  # here"], "c", ["x = 1", "# what\n# and how\nc = x  # here"]),
        (["a = 1; b = 2; c = 3"], "c", ["c = 3"]),
        (["x = [3]\nx.append(4)\nlen(x)\nprint(x)", "c = x"], "c", ["x = [3]", "x.append(4)", "c = x"]),
        (["x = [3]", "x[0] = 5", "c = x", "x[0] = 7"], "c", ["x = [3]", "x[0] = 5", "c = x", "x[0] = 7"]),
        (["def make(): return 1", "def init(m): pass", "def score(m): pass", "m = make()\ninit(m)\nscore(m)"], "m",
         ["def make(): return 1", "def init(m): pass", "m = make()", "init(m)"]),
        (["t = 0", "for i in [3]:\n    t += i", "c = t"], "c", ["t = 0", "for i in [3]:\n    t += i", "c = t"]),
        (["x = [1]", "c = x", "x = [2]", "x[0] = 3"], "c", ["x = [1]", "c = x"]),
        (["import torch", "m = 1", "t = 2", "t.fit(m)\ntorch.nn.init.ones(m)\nt"], "m",
         ["import torch", "m = 1", "torch.nn.init.ones(m)"]),
        (["m = 1", "for p in m:\n    p.requires_grad = False", "for e in range(3):\n    m.backward()"], "m",
         ["m = 1", "for p in m:\n    p.requires_grad = False"]),
        (["import torch\ntorch.manual_seed(0)\ntorch.rand(3)\ntorch.backends.x = True\nm = 1"], "m",
         ["import torch", "torch.manual_seed(0)", "torch.backends.x = True", "m = 1"]),
        (["import sys", "sys.path.append('..')", "import mine", "m = mine.f"], "m",
         ["import sys", "sys.path.append('..')", "import mine", "m = mine.f"]),
        (["if True:\n    a = 1\nelse:\n    a = 2", "c = a"], "c", ["if True:\n    a = 1\nelse:\n    a = 2", "c = a"]),
        (["with open('f') as f:\n    a = f", "c = a"], "c", ["with open('f') as f:\n    a = f", "c = a"]),
        (["get_ipython().run_cell_magic('time', '', 'a = 1\\n')", "c = a"], "c", ["a = 1", "c = a"]),
        (["get_ipython().run_cell_magic('dist', '--local', 'a = 1\\n')", "c = a"], "c", ["a = 1", "c = a"]),
        (["get_ipython().run_line_magic('matplotlib', 'inline')\na = 1", "c = a"], "c", ["a = 1", "c = a"]),
        (["c = (lambda q: q + r)(1)", "r = 3"], "c", ["c = (lambda q: q + r)(1)", "r = 3"]),
        (["k = 1\nclass E(Exception): pass", "def f():\n    global n\n    try:\n        n = k\n    except E as e:\n"
          "        e", "c = f"], "c",
         ["k = 1", "class E(Exception): pass",
          "def f():\n    global n\n    try:\n        n = k\n    except E as e:\n        e", "c = f"]),
    ],
)  # fmt: skip
def test_what_is_needed_is_kept(cells, names, expected):
    """In the order of the cells, as it was typed."""
    assert expected == texts(cells, names)


def test_what_may_only_show_is_kept_if_asked():
    """The last call of a cell, and loops that train."""
    cells = ["def init(m): pass", "m = 1\ninit(m)", "for e in range(3):\n    m.backward()"]
    assert texts(cells, "m") == ["m = 1"]
    assert texts(cells, "m", careful=True) == [cells[0], "m = 1", "init(m)", cells[2]]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["a = get_ipython().getoutput('ls')", "c = a"], "a comes from a magic or a shell command"),
        (["c = a"], "a is used by the run, and no cell of this notebook assigns it"),
    ],
)
def test_what_no_statement_makes_is_named(cells, words):
    """In one sentence."""
    with pytest.raises(PlanError, match=words):
        texts(cells, "c")


def test_a_cell_that_is_no_python_has_no_statements():
    """It has never run."""
    assert statements_of("a = = 1", 1) == []


def test_the_names_of_an_expression():
    """Without its own, and those of Python."""
    assert names_in("f(a, lambda b: b + c, [d for d in len(e)])") == {"f", "a", "c", "e"}
    assert names_in("def step(model, batch):\n    x = batch\n    return loss(model(x))") == {"loss"}
