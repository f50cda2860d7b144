"""A training on the engines: sent out, followed, brought home."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from nbdist.cluster import entry
from nbdist.cluster.cells import printed
from nbdist.cluster.definitions import News
from nbdist.cluster.engines import Engines
from nbdist.cluster.relay import Relay
from nbdist.cluster.run import Run
from nbdist.errors import NbdistError, interrupted
from nbdist.plan import Plan
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.record import new_run_id

__all__ = ["attend", "start_training"]

_POLL_S = 0.1


def start_training(
    engines: Engines,
    task: Any,
    plan: Plan,
    packed: tuple[Any, Any],
    outbox: Any,
    news: News,
    watch: Callable[[Run], None] | None,
) -> Run:
    """Send a task to every engine and follow it to its end, in a thread.

    Args:
        engines: Idle engines with a world.
        task: What is trained; its model receives the weights in place, and the user's own optimizer its state.
        plan: How.
        packed: The parcel of both, and its segment.
        outbox: Where the segment goes back to.
        news: What the engines do not know yet of the notebook.
        watch: See `Relay`.
    """
    from nbdist.core.eager import eager
    from nbdist.core.handover import let_go, unpack
    from nbdist.core.params import ParamTable

    if engines.suspected:
        engines.form()
    parcel, segment = packed
    run_id = new_run_id()
    ranks = {e.rank: RankState(rank=e.rank, host=e.host, pid=e.pid, device=e.device) for e in engines.records()}
    run = Run(
        run_id,
        plan,
        RunState(title=task.title, plan=plan.to_dict(), ranks=ranks),
        request_stop=lambda: engines.request_stop(run_id),
    )

    def bring_home(home: Any) -> None:
        if home is None:
            return  # gather=False: the notebook's model stays as it was
        engines.home = home.path
        tensors, optimizer_state = unpack(home)
        ParamTable.of(task.model).load_(tensors)
        if optimizer_state is not None:
            with eager():
                task.optimizer.load_state_dict(optimizer_state)

    def after(failed: bool) -> None:
        if failed:
            segment.close()
        else:
            answers = [engines.start_call(rank, entry.has_let_go, parcel.path) for rank in range(engines.size)]
            outbox.give_back(segment, lambda: all(a.ready() and a.successful() and a.get() for a in answers))
        engines.formed = not failed  # ranks leave a world that failed
        if failed and not engines.ended and not engines.lost:
            engines.form()

    arguments = (parcel, run_id, news, engines.remote, let_go(engines.home))
    calls = [engines.start_call(rank, entry.train, *arguments) for rank in range(engines.size)]
    run._printed = functools.partial(printed, dict(enumerate(calls)))
    Relay(run, calls, engines, bring_home=bring_home, after=after, watch=watch).start()
    return run


def attend(run: Run, engines: Engines, while_waiting: Callable[[], None] = lambda: None) -> Run:
    """Wait for a run in the foreground; the first interrupt stops it after its step, a second one at once.

    Raises:
        KeyboardInterrupt: It was interrupted, and has ended now.
        EngineError: The run failed.
    """
    interrupts = 0
    while not run.ended:
        try:
            with contextlib.suppress(NbdistError):  # raised below, once all is done
                run.wait(_POLL_S)
            while_waiting()
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 1:
                run.stop()
            else:
                engines.interrupt(range(engines.size))
    if interrupts:
        kept = f"after step {run.progress.step}, its weights are home" if run.state != "failed" else "at once"
        raise interrupted(f"run {run.run_id} {run.state} {kept}.")
    return run.wait()
