"""`%dist_debug`: post-mortem pdb on one rank, while the others are idle."""

from __future__ import annotations

import pytest
import torch
from tasks import classes, net
from torch import nn

from nbdist.errors import ClusterError, EngineError, PlanError

FAILING = """
def outer(limit):
    mine = rank * 100
    return inner(limit)

def inner(limit):
    assert rank < limit, f"rank {rank} is too much"

outer(1)
"""


class Conversation:
    """Types the given lines, and records the output before each of them, and at the end."""

    def __init__(self, *lines):
        self.lines, self.output, self.prompts = list(lines), [], set()

    def ask(self, prompt):
        self.prompts.add(prompt)
        return self.lines.pop(0)

    def show(self, text):
        self.output.append(text.strip())


def test_a_failed_cell_can_be_debugged_on_its_rank(cluster):
    """It prints the error, starts in the innermost frame, goes up and evaluates there; then the rank is idle."""
    with pytest.raises(EngineError, match="rank 1 is too much"):
        cluster.execute(FAILING).wait()
    talk = Conversation("p limit", "up", "p mine", "p limit + mine", "nonsense", "q")
    cluster.debug(1, talk.ask, talk.show)
    assert {"(rank 1) "} == talk.prompts
    assert talk.output[0].startswith("rank 1: AssertionError: rank 1 is too much")
    assert "inner" in talk.output[0]
    assert talk.output[1] == "1"
    assert "outer" in talk.output[2]
    assert talk.output[3:5] == ["100", "101"]
    assert "NameError" in talk.output[5]
    assert cluster.pull("rank", 1) == 1


def raising(model, batch):
    """A step that fails on rank 1, deep in torch, below this line."""
    scores = model(batch[0])
    wrong = batch[1] + 1000 * int(__import__("os").environ["RANK"])
    return __import__("torch").nn.functional.cross_entropy(scores, wrong)


def test_a_failed_run_is_debugged_on_the_users_own_line(cluster):
    """Not in the library below it; the step's values and the model are there; and the next run works."""
    with pytest.raises(EngineError):
        cluster.train(net(), classes(), step=raising, epochs=1, batch_size=16)
    talk = Conversation(
        "p wrong.min().item()",
        "p tuple(scores.shape)",
        "p [p.isfinite().all().item() for p in model.parameters()]",
        "q",
    )
    cluster.debug(1, talk.ask, talk.show)
    assert "raising" in talk.output[0]
    assert int(talk.output[1]) >= 1000
    assert talk.output[2] == "(8, 3)"
    assert "False" not in talk.output[3]
    assert cluster.train(net(), classes(), loss="cross_entropy", epochs=1).state == "finished"


def test_a_rank_on_which_nothing_failed_says_so(cluster):
    """And so does a rank that does not exist."""
    cluster.execute("import sys; vars(sys).pop('last_value', None)").wait()
    cluster.train(net(), classes(), loss="cross_entropy", epochs=1)
    with pytest.raises(ClusterError, match="nothing has failed on rank 0"):
        cluster.debug(0, Conversation().ask, print)
    with pytest.raises(PlanError, match="rank 7 does not exist: use 0 to 1"):
        cluster.debug(7)


def test_an_interrupt_ends_the_debugger(cluster):
    """Also while it executes the input."""
    with pytest.raises(EngineError):
        cluster.execute(FAILING).wait()

    def ask(prompt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.debug(1, ask, print)
    assert cluster.pull("rank", 1) == 1


class Greedy(nn.Module):
    """Allocates more than there is when its flag is set."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, 1_000_000))

    def forward(self, x):
        return x.mean() * (self.weight.sum(0) + torch.ones(10**15)[0]).mean()


def held(cluster, rank):
    """How many parameters of `Greedy` a rank holds."""
    code = (
        "import gc, torch\nheld = sum(isinstance(o, torch.nn.Parameter) and o.numel() > 9e6 for o in gc.get_objects())"
    )
    cluster.execute(code).wait()
    return cluster.pull("held", rank)


def test_a_run_out_of_memory_holds_none_afterwards(cluster):
    """The trained model is freed on both ranks; a debugger still shows where it failed."""
    with pytest.raises(EngineError, match="can't allocate memory"):
        cluster.train(Greedy(), classes(), loss=None, step=lambda model, batch: model(batch[0])).wait()
    assert [held(cluster, rank) for rank in range(2)] == [0, 0]
    talk = Conversation("q")
    cluster.debug(0, talk.ask, talk.show)
    assert "forward" in talk.output[0]


def test_a_cell_that_failed_after_a_run_is_the_one_that_is_debugged(cluster):
    """The newest failure of the rank, whichever it was in."""
    with pytest.raises(EngineError):
        cluster.train(net(), classes(), step=raising, epochs=1, batch_size=16)
    with pytest.raises(EngineError, match="rank 1 is too much"):
        cluster.execute(FAILING).wait()
    talk = Conversation("q")
    cluster.debug(1, talk.ask, talk.show)
    assert talk.output[0].startswith("rank 1: AssertionError: rank 1 is too much")
