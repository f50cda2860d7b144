"""The panel's data of a run are correct, small and safe."""

from __future__ import annotations

import json

import torch
from torch import nn

from nbdist.notebook import panel_view
from nbdist.plan import Plan
from nbdist.telemetry import Happening, RankState, RunState, Shares

DATA = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)


def drawn(run):
    """All the panel's data, as the front end gets them."""
    parts = {part: getattr(panel_view, part)(run.progress) for part in ("head", "rows", "charts", "events")}
    assert json.loads(json.dumps(parts)) == parts
    return parts


def made(size, mesh="data", stages=(), **states):
    """A run in which rank r has the state `states[f"r{r}"]`."""
    plan = Plan.create(ranks=size, cores=size, epochs=2, batch_size=64, strategy=mesh)
    ranks = {
        rank: RankState(
            rank=rank, state="running", host="here", device="cpu", step=10, steps_total=40, busy_s=0.1, stages=stages,
            place={"pp": plan.mesh.coordinate(rank, "pp")},
        )
        for rank in range(size)
    }  # fmt: skip
    for name, changes in states.items():
        ranks[int(name[1:])] = RankState(**{**vars(ranks[int(name[1:])]), **changes})
    return RunState(title="Net", plan=plan.to_dict(), ranks=ranks, state="running")


def facts(run):
    """The facts of the head, by name."""
    return dict(panel_view.head(run)["facts"])


def standings(run):
    """Rank and standing of each row."""
    return [(row[0], row[1]) for _, rows in panel_view.rows(run)["groups"] for row in rows]


def test_the_panel_follows_the_run_to_its_end(cluster):
    """Steps grow to the planned number, states and ranks are those of the engines, and all of it is JSON."""
    views = []
    run = cluster.train(nn.Linear(6, 3), DATA, loss="cross_entropy", epochs=3, batch_size=16, val=DATA,
                        watch=lambda run: views.append(drawn(run)))  # fmt: skip
    shares = [view["head"]["share"] or 0 for view in views]
    assert shares == sorted(shares)
    head = views[-1]["head"]
    assert (head["title"], head["state"], head["share"]) == ("Linear (21 parameters) on dp=2", "finished", 1.0)
    reported = dict(head["facts"])
    assert (reported["step"], reported["epoch"], reported["left"]) == ("12 of 12", "3 of 3", "–")
    assert f"{run.history[-1]['loss']:.4g}" == reported["loss"]
    ((_, rows),) = views[-1]["rows"]["groups"]
    assert [(rank, "finished", "12", 1.0) for rank in range(2)] == [(row[0], row[1], row[4], row[5]) for row in rows]
    assert all(row[3].startswith("cpu") for row in rows)


def test_a_run_without_an_end_has_no_share(cluster):
    """A stream of unknown length under epochs: steps are counted, no bar is drawn."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(6), 0)] * 40)

    run = cluster.train(nn.Linear(6, 3), Stream(), loss="cross_entropy", batch_size=16)
    head = drawn(run)["head"]
    assert head["share"] is None
    assert dict(head["facts"])["step"] == "3"


def test_a_paused_run_says_no_time_left():
    """The length of a pause is unknown."""
    run = made(2)
    run.state = "paused"
    assert "–" == facts(run)["left"]


def test_of_many_ranks_the_ones_in_trouble_come_first():
    """A strip holds a cell for each."""
    run = made(32, r5={"state": "lost"}, r9={"busy_s": 0.3})
    assert [(5, "lost"), (9, "slow")] == standings(run)[:2]
    standings_of_all, heats = panel_view.rows(run)["strip"]
    assert list(run.standings.values()) == standings_of_all
    assert 32 == len(heats)
    assert [9] == [rank for rank, heat in enumerate(heats) if heat == 100]


def test_few_ranks_have_no_strip():
    """Each has its row."""
    assert [] == panel_view.rows(made(16))["strip"]
    assert 16 == len(standings(made(16)))


def test_ranks_of_a_pipeline_are_grouped_by_stage():
    """A group says which modules it holds."""
    stages = tuple({"stage": i, "first": f"b{i}", "last": f"c{i}", "seconds": 1.0, "parameters": 7} for i in range(2))
    groups = panel_view.rows(made(4, "dp=2,pp=2", stages))["groups"]
    assert ["stage 0: b0 to c0", "stage 1: b1 to c1"] == [name for name, _ in groups]
    assert [[0, 2], [1, 3]] == [[row[0] for row in rows] for _, rows in groups]


def test_shares_are_percents():
    """Of a rank's time for compute, communication, data and idle."""
    ((_, (row,)),) = panel_view.rows(made(1, r0={"shares": Shares(0.7, 0.15, 0.1, 0.05)}))["groups"]
    assert [70, 15, 10, 5] == row[-1]


def test_the_newest_events_are_shown():
    """Five of them, each with its time in the run."""
    run = made(1)
    run.happenings += [Happening(run.started_s + 60 * i, "checkpoint", f"checkpoint of step {i}") for i in range(9)]
    reported = panel_view.events(run)
    assert [f"checkpoint of step {i}" for i in range(4, 9)] == [text.split("  ")[1] for _, text in reported]
    assert reported[-1][1].startswith("8 min")


def test_an_error_stands_last():
    """Also after other events."""
    run = made(1)
    run.note("a rank was lost")
    run.end("failed", "ValueError: <b>")
    assert ["error", "ValueError: <b>"] == panel_view.events(run)[-1]
