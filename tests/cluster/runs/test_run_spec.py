"""The run spec."""

from __future__ import annotations

import pytest

from nbdist.cluster.runs.run_spec import RunSpec
from nbdist.errors import PlanError
from nbdist.plan import Plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hang_timeout": 0}, "a hang timeout of 0 is not possible: use seconds, more than 0, or inf."),
        ({"hang_timeout": "soon"}, "a hang timeout of 'soon' is not possible: use seconds, more than 0, or inf."),
        ({"on_hang": "stopp"}, "unknown on_hang 'stopp': use replace, stop. Did you mean 'stop'?"),
        ({"on_failure": "shrnk"}, "unknown on_failure 'shrnk': use replace, shrink, stop. Did you mean 'shrink'?"),
    ],
)
def test_what_is_not_possible(options, message):
    """The error comes before anything starts."""
    with pytest.raises(PlanError) as refused:
        RunSpec(run_id="r", task=None, plan=Plan.create(ranks=1, cores=1), title="Net", **options)
    assert message == str(refused.value)


def test_the_plan_for_another_number_of_ranks_resumes_from_the_same_folder(tmp_path):
    """With the same global batch."""
    options = {"batch_size": 8, "resume": True, "checkpoint": str(tmp_path)}
    plan = Plan.create(ranks=2, cores=2, **{**options, "resume": str(tmp_path)})
    scaled = RunSpec(run_id="r", task=None, plan=plan, title="Net", options=options, cores=2).plan_for(4)
    assert ("dp=4", 8, str(tmp_path)) == (str(scaled.mesh), scaled.batch_size, scaled.resume)
