"""Optimizers run without torch's compiler, which is there for whoever wants it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

START = """
import json, sys, torch
from nbdist.core.process.lazy_dynamo import eager

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


def told(code):
    """What a fresh process tells."""
    code = f"{START}\n{code}\nprint(json.dumps(told))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_an_optimizer_loads_no_compiler_and_computes_the_same():
    """From its making to its state; outside it does load it, or the placeholder would be needed no more."""
    code = "with eager():\n    inside = stepped()\ntold = [inside, loaded(), placed(), stepped(), loaded()]"
    inside, *loaded, outside, loaded_outside = told(code)
    assert [[False, [False, False]], True] == [loaded, loaded_outside]
    assert outside == inside


def test_the_placeholder_is_there_within_the_outermost_block_only():
    """A block in a block leaves it; an error inside does not keep it."""
    code = """
told = [placed()]
try:
    with eager():
        with eager():
            told.append(placed())
        told.append(placed())
        1 / 0
except ZeroDivisionError:
    told += [placed(), loaded()]
"""
    assert [[False, False], [True, True], [True, True], [False, False], False] == told(code)


@pytest.mark.parametrize(
    "want",
    [
        "import torch._dynamo.config",
        "assert 2 == torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item()",
    ],
    ids=["a module of it", "compiled code"],
)
def test_whoever_wants_the_compiler_inside_gets_it(want):
    """And it stays, as it does for an optimizer that compiles its own step."""
    code = f"with eager():\n    {want}\n    there = loaded()\n    stepped()\ntold = [there, placed(), marked()]"
    assert [True, [True, True], True] == told(code)


def test_the_compiler_works_afterwards_and_finds_its_marks():
    """What was marked for the placeholder is marked anew."""
    code = """
with eager():
    stepped()
told = [loaded(), marked()]
told.append(torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(1)).item())
stepped()
told += [marked(), torch._dynamo.utils.counters["stats"]["unique_graphs"]]
"""
    assert [False, False, 2.0, True, 1] == told(code)


def test_whatever_can_be_marked_can_be_marked_inside():
    """As a decorator with arguments, and something that has no attributes."""
    code = "with eager():\n    told = [torch.compiler.disable(len)([0]), torch.compiler.disable()(len)([0])]"
    assert [1, 1] == told(code)
