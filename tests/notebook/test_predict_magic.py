"""``%dist_predict`` through a real shell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbdist.errors import PlanError, TaskError


class Both(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels=None):
        scores = self.inner(x)
        return {"scores": scores} if labels is None else {"loss": scores.mean(), "scores": scores}


def test_it_returns_the_outputs(notebook):
    """Of the notebook's model, in evaluation mode, for any data that training takes; with -o under a name."""
    model, x = notebook.names["model"], notebook.names["X"]
    notebook.printed()
    outputs = notebook("%dist_predict model (X, y) --batch-size 7")
    assert notebook.printed().startswith(f"predicted {len(x)} samples on dp=2, in ")
    with torch.no_grad():
        torch.testing.assert_close(outputs, model.eval()(x))
    assert notebook("%dist_predict model X --strategy shard -o found") is None
    torch.testing.assert_close(notebook.names["found"], outputs)


def test_what_is_left_out_is_noted(notebook):
    """A loss has no row for each sample."""
    notebook.names["both"] = Both(notebook.names["model"])
    notebook.printed()
    assert ["scores"] == list(notebook("%dist_predict both {'x':X,'labels':y}"))
    assert "left out, having no row for each sample: loss" in notebook.printed()


def test_mistakes_are_named(notebook):
    """As those of training are."""
    error, _ = notebook.fails("%dist_predict model")
    assert isinstance(error, PlanError)
    assert "%dist_predict: the following arguments are required: DATA" in str(error)
    error, _ = notebook.fails("%dist_predict model X --epochs 2")
    assert "%dist_predict: unknown argument '--epochs'" in str(error)
    error, _ = notebook.fails("%dist_predict model missing")
    assert isinstance(error, TaskError)
    assert "'missing' is not defined in the notebook" in str(error)
    error, _ = notebook.fails("%dist_predict X X")
    assert "X is a value of type Tensor, not a torch.nn.Module" in str(error)


class Counts:
    def __init__(self):
        self.seen = 0

    def update(self, output, target):
        self.seen += len(output)

    def compute(self):
        return self.seen


def test_a_metric_object_of_the_notebook_measures(notebook):
    """By its name on the line, though it cannot be called; it stays as it is."""
    notebook.names["counts"] = Counts()
    run = notebook(
        "%dist_train model train_set --loss cross_entropy --epochs 1 --batch-size 16 --val test_set --metric counts"
    )
    assert len(notebook.names["test_set"]) == run.history[-1]["val_Counts"]
    assert 0 == notebook.names["counts"].seen


@pytest.mark.parametrize("word", ["%dist_predict ", "%dist_predict mo"])
def test_names_are_completed(notebook, word):
    """A model comes first."""
    from nbdist.notebook.completion import complete_line

    found = complete_line(word, notebook.names)
    assert found is not None
    assert "model" in found[1]
