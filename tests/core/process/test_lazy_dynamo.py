"""Optimizers run without importing torch's compiler; code that uses it still gets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.programs

START = """
import json, sys, torch
from nbdist.core.process.lazy_dynamo import skip_dynamo_import

def placed():
    return ["torch._dynamo" in sys.modules, "_dynamo" in vars(torch)]

def loaded():
    return "torch._dynamo.eval_frame" in sys.modules

def stepped():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return [model.weight.tolist(), [state["exp_avg"].tolist() for state in optimizer.state.values()]]

def marked():
    mark = getattr(torch.optim.Optimizer.zero_grad.__wrapped__, "__dynamo_disable", None)
    return getattr(mark, "_torchdynamo_disable", False)
"""


FORKS = f"""
{START}
import os

for line in sys.stdin:  # a fork a program: loading torch takes seconds
    if not os.fork():
        exec(json.loads(line))
        print(json.dumps(result), flush=True)
        os._exit(0)
    if os.wait()[1]:
        print("null", flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """``run(code)``: the `result` that the code computes in a new process, which has loaded torch but no compiler."""
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:

        def in_a_fork(code):
            p.stdin.write(json.dumps(code) + "\n")
            p.stdin.flush()
            return json.loads(p.stdout.readline())

        yield in_a_fork


def test_an_optimizer_loads_no_compiler_and_computes_the_same(run):
    """From construction to step; outside of the context it still imports it, else the fake module is obsolete."""
    code = (
        "with skip_dynamo_import():\n    inner = stepped()\nresult = [inner, loaded(), placed(), stepped(), loaded()]"
    )
    inside, *loaded, outside, loaded_outside = run(code)
    assert [[False, [False, False]], True] == [loaded, loaded_outside]
    assert outside == inside


def test_the_placeholder_is_there_within_the_outermost_block_only(run):
    """A nested block leaves it in place; an error inside a block removes it."""
    code = """
result = [placed()]
try:
    with skip_dynamo_import():
        with skip_dynamo_import():
            result.append(placed())
        result.append(placed())
        1 / 0
except ZeroDivisionError:
    result += [placed(), loaded()]
"""
    assert [[False, False], [True, True], [True, True], [False, False], False] == run(code)


@pytest.mark.parametrize(
    "want",
    [
        "import torch._dynamo.config",
        "assert 2 == torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item()",
    ],
    ids=["a module of it", "compiled code"],
)
def test_whoever_wants_the_compiler_inside_gets_it(run, want):
    """And it stays imported, as for an optimizer that compiles its own step."""
    code = f"with skip_dynamo_import():\n    {want}\n    real = loaded()\n    stepped()"
    code += "\nresult = [real, placed(), marked()]"
    assert [True, [True, True], True] == run(code)


def test_the_compiler_works_afterwards_and_finds_its_marks(run):
    """Functions that were marked for the fake module are marked again for the real one."""
    code = """
with skip_dynamo_import():
    stepped()
result = [loaded(), marked()]
result.append(torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(1)).item())
stepped()
result += [marked(), torch._dynamo.utils.counters["stats"]["unique_graphs"]]
"""
    assert [False, False, 2.0, True, 1] == run(code)


def test_whatever_can_be_marked_can_be_marked_inside(run):
    """As a decorator with arguments, and for an object without attributes."""
    code = (
        "with skip_dynamo_import():\n    mark = torch.compiler.disable\n    result = [mark(len)([0]), mark()(len)([0])]"
    )
    assert [1, 1] == run(code)
