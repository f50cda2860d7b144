"""When a run ends early, by its history alone."""

from __future__ import annotations

import math

import pytest

from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.plan.early_stop import EarlyStop
from nbdist.plan.monitor import Monitor


@pytest.mark.parametrize(
    ("text", "name", "patience", "higher"),
    [
        ("val_loss:3", "val_loss", 3, False), ("loss:1", "loss", 1, False),
        ("val_accuracy:10", "val_accuracy", 10, True), ("val_macro_f1:2", "val_macro_f1", 2, True),
        ("val_kl : 2", "val_kl", 2, False), ("size:2:max", "size", 2, True),
        ("val_accuracy:2:min", "val_accuracy", 2, False),
    ],
)  # fmt: skip
def test_most_names_say_what_is_better(text, name, patience, higher):
    """A loss is to fall, an accuracy to rise; what follows the patience says it for all others."""
    assert EarlyStop(
        monitor=Monitor(option="early_stop", name=name, higher=higher), patience=patience
    ) == EarlyStop.parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("val_loss", r"^early_stop 'val_loss' says not when: write NAME:EPOCHS, as in val_loss:3"),
        ("val_loss:0", "says not when"),
        ("val_loss:some", "says not when"),
        ("val_loss:3:up", "says not when"),
        ("val_size:3", r"^early_stop 'val_size:3' says not whether val_size is to fall or to rise: add :min or :max"),
        ("loss_accuracy:3", "says not whether"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, sentence):
    """Before anything is trained."""
    with pytest.raises(PlanError, match=sentence):
        Plan.create(ranks=2, cores=2, epochs=9, early_stop=text)


def test_it_looks_at_epochs():
    """Under steps the whole run is one row."""
    with pytest.raises(PlanError, match="early_stop=loss:3 looks at epochs, and steps=8: give epochs"):
        Plan.create(ranks=2, cores=2, steps=8, early_stop="loss:3")


def rows(*values):
    return [{"epoch": number, "val_loss": value} for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([], False), ([3.0], False), ([3.0, 2.0, 1.0], False), ([3.0, 3.0], False), ([3.0, 3.0, 3.0], True),
        ([3.0, 1.0, 2.0, 1.5], True), ([3.0, 1.0, 2.0, 0.5], False), ([math.nan, 2.0, 1.0], False),
        ([1.0, math.nan, math.nan], True), ([math.nan, math.nan, math.nan], True),
    ],
)  # fmt: skip
def test_two_epochs_without_a_better_one_end_it(values, ends):
    """An equal one is no better, and one that is not a number never is."""
    assert ends == bool(EarlyStop.parse("val_loss:2").reason(rows(*values)))


def test_the_reason_names_the_best_epoch():
    """In a clause."""
    reason = EarlyStop.parse("val_loss:2").reason(rows(3.0, 1.25, 2.0, 1.5))
    assert reason == "val_loss has not improved for 2 epochs on 1.25 of epoch 2"


def test_a_number_that_is_not_there():
    """Such as one of a metric that was not given."""
    with pytest.raises(TaskError, match=r"^early_stop looks at val_los, which the history has not: .* Did you mean"):
        EarlyStop.parse("val_los:2:min").reason(rows(1.0))
