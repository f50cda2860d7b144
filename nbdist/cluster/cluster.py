"""The Cluster: start engines, run cells on them, train, scale and stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nbdist.cluster import session
from nbdist.cluster.cells.cell_run import CellRun
from nbdist.cluster.completion import complete
from nbdist.cluster.diagnose.debugger import debug
from nbdist.cluster.diagnose.where import Where
from nbdist.cluster.engines.engine_info import Engine
from nbdist.cluster.engines.starting import check_start, start_engines, take_over_engines
from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.host_options import HOST_OPTIONS, HostOptions
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.cluster.launch.devices import choose_hosts
from nbdist.cluster.prediction import predict
from nbdist.cluster.runs.run import Run, attend, resume_arguments
from nbdist.cluster.runs.run_spec import RUN_OPTIONS, RunOptions
from nbdist.engine.follow.changes import NotebookChanges
from nbdist.errors import ClusterError, PlanError
from nbdist.plan.option import takes_options
from nbdist.plan.train_options import TRAIN_OPTIONS, Unpack

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines
    from nbdist.cluster.runs.run_queue import RunQueue

__all__ = ["Cluster"]


@takes_options(HOST_OPTIONS)
class Cluster:
    """Engines of this kernel, and a context manager: ``with nbdist.Cluster(engines=2) as cluster: ...``.

    Args:
        engines: How many; by default one per GPU, else one per CPU core, up to four.
        device: "auto" (GPUs if there are any), "cpu" or "cuda".
        timeout_s: Timeout of the start, in seconds.
        spares: How many idle spare engines to hold ready, which replace lost ones at once; by default 1 if forked
        detach: For how many seconds the engines, and a run, continue without a kernel, however this one ends. Another
            kernel may `attach` meanwhile. By default they end with this kernel.
        **options: The following, about other hosts.

    Attributes:
        host_choice: On which hosts, see `HostChoice`.

    Raises:
        PlanError: A number, the device or a host is not possible. No engine is started.
    """

    def __init__(
        self, engines: int | None = None, *, device: str = "auto", timeout_s: float = 60.0, spares: int | None = None,
        detach: float | None = None, **options: Unpack[HostOptions],
    ) -> None:  # fmt: skip
        check_start(timeout_s, spares)
        self.host_choice = choose_hosts(
            engines, device, warm_up=session.current_cluster() is None, detach=detach, options=options
        )
        self._up: Engines | None = None
        self._run_queue: RunQueue | None = None
        self.device = device
        self.timeout_s = timeout_s
        self.spares = int(fork_client.can_fork()) if spares is None else spares
        self.detach = detach
        self._changes: NotebookChanges | None = None  # since the engines were started
        self._replay: Any = None  # a Replay, once engines have started: importing it loads torch

    @property
    def size(self) -> int:
        """The number of ranks: of the running engines, or those to be started."""
        return self.host_choice.size if (up := self._up) is None else up.size

    def __repr__(self) -> str:
        state = f"running on {', '.join(engine.device for engine in self.engines)}" if self._up else "not running"
        return f"Cluster(engines={self.size}), {state}"

    @property
    def engines(self) -> list[Engine]:
        """One record per engine, in rank order; empty when the cluster does not run."""
        return [] if (up := self._up) is None else up.records(self._run_queue is not None and self._run_queue.computing)

    @property
    def current_run(self) -> Run | None:
        """The run that the engines are training."""
        return None if (run_queue := self._run_queue) is None else run_queue.current

    @property
    def queued(self) -> list[Run]:
        """The runs that wait in the queue."""
        return [] if (run_queue := self._run_queue) is None else run_queue.queued

    @property
    def reachable(self) -> bool:
        """Whether the cluster runs, and its controller and store, which every call needs, are alive."""
        return (up := self._up) is not None and up.reachable

    @property
    def spare_engines(self) -> list[Engine]:
        """One record per spare engine that is ready; their rank is -1."""
        return [] if (up := self._up) is None else up.spares()

    @property
    def threads(self) -> int:
        """Default CPU threads per rank: the cores of its host divided by the ranks there."""
        return self._running().threads

    @property
    def transport(self) -> str:
        """What gradients are reduced over: "shared memory", "gloo", "nccl", or "shared memory and TCP (eth0)"."""
        return self._running().transport

    @property
    def hosts(self) -> dict[str, int | None]:
        """How many engines were asked for on each host; "local" is this one. Also how many nodes, and in all."""
        return self.host_choice.named

    def memory(self, engine: Engine) -> int:
        """The resident memory of an engine's process, in bytes; 0 if it has ended."""
        host = None if (up := self._up) is None else up.host_of(engine)
        return 0 if host is None else host.memory(engine.mark)

    @property
    def start_seconds(self) -> float:
        """How long the start took."""
        return self._running().start_seconds

    @property
    def name(self) -> str:
        """The name for `attach` from another kernel; empty if the cluster ends with this kernel."""
        return "" if (up := self._up) is None or (anchor := up.anchor) is None else anchor.name

    def start(
        self, tell: Callable[[str], None] = lambda words: None, *, timeout_s: float | None = None,
        spares: int | None = None,
    ) -> Cluster:  # fmt: skip
        """Start the engines; returns after all of them have completed a first collective.

        On a running cluster, engines are replaced that are lost, or whose own host was lost and is back; nothing else
        happens. A cluster whose controller has ended is started again. New engines run the cells and get the pushed
        values that their ranks had.

        Args:
            tell: Progress callback: gets a short status text, several times a second.
            timeout_s: Another timeout from now on; None leaves it as it is.
            spares: Another number of spare engines; None leaves it as it is.

        Raises:
            PlanError: A number is not possible.
            ClusterError: Another cluster runs in this kernel, or an engine did not become ready in time.
        """
        check_start(timeout_s, spares)
        self.timeout_s = self.timeout_s if timeout_s is None else timeout_s
        self.spares = self.spares if spares is None else spares
        if self._up is not None and not self.reachable:
            self._end()
        if self._up is not None:
            self._running().timeout_s = self.timeout_s
            self._refuse_while_busy()
            self._up.replace_lost(tell, return_home=True)
            self._up.keep_spares(self.spares)
            self.check_ready()
            return self
        if session.current_cluster() is not None:
            raise ClusterError("a cluster is running in this kernel already: stop it first.")
        changes = self._changes = self._changes or NotebookChanges(everything=self.host_choice.elsewhere)
        self._drive(
            start_engines(self.host_choice, self.device, self.timeout_s, tell, self.spares, self.detach), changes
        )
        self._replay.follow(self._up, changes)
        session.set_cluster(self)
        if self.detach is None:
            session.stop_at_exit(self)
        self.check_ready()
        return self

    @classmethod
    def attach(
        cls, name: str | None = None, *, namespace: dict[str, Any] | None = None,
        watch: Callable[[Run], None] | None = None,
    ) -> Cluster:  # fmt: skip
        """Attach to a detached cluster whose kernel has ended: its engines, cells, pushed values and newest run.

        The run becomes `last_run`; once it has ended, its weights are loaded into the model.

        Args:
            name: The cluster's name; not needed if there is only one.
            namespace: Gets the run's model under its name; one of the same shapes there gets the weights.
            watch: See `train`.

        Raises:
            PlanError: There is none of that name, or several and no name is given.
            ClusterError: A cluster runs in this kernel, or a living kernel owns the other one.
        """
        if session.current_cluster() is not None:
            raise ClusterError("a cluster is running in this kernel already: stop it first.")
        anchor = Anchor.reach(name)
        try:
            engines = take_over_engines(anchor)
            cluster = cls(engines.size, device=engines.device, timeout_s=engines.timeout_s, detach=anchor.patience_s)
            cluster._changes = NotebookChanges(anchor.state()["notes"].get("notebook"))
            run_queue = cluster._drive(engines, cluster._changes)
            cluster._replay.take_over(engines, cluster._changes)
            run_queue.take_over({} if namespace is None else namespace, watch)
        except BaseException:
            anchor.leave()
            raise
        session.set_cluster(cluster)
        return cluster

    def _drive(self, engines: Engines, changes: NotebookChanges) -> RunQueue:
        """Build queue and replay for engines. Imported here: both load torch, which ``%load_ext`` must not wait for."""
        from nbdist.cluster.cells.replay import Replay
        from nbdist.cluster.runs.run_queue import RunQueue
        from nbdist.core import api

        self._up, api.engines_beside = engines, session.engines_here
        self._replay = self._replay or Replay()
        self._run_queue = RunQueue(engines, changes, session.last_run, session.note_run, self.where)
        return self._run_queue

    def scale(self, engines: int) -> None:
        """Change the number of engines: new ones join, or the last ones leave. The others keep their state.

        A current run scales after its current step, with the same global batch, and this returns at once. Otherwise
        the engines are ready when this returns; new ones have run every cell that all ranks ran.

        Raises:
            PlanError: The machine cannot run so many, or the run's mesh or batch cannot be partitioned over them.
            ClusterError: Engines are busy or lost, or new ones were not ready in time.
        """
        (up := self._running()).check_size(engines)
        if (run := self.current_run) is not None:
            return run.scale(engines)
        self.check_ready()
        up.resize(engines)
        self.check_ready()

    def stop(self) -> None:
        """End the engines, and all that belongs to them. Twice is fine."""
        self._end()
        self._changes = None
        if self._replay is not None:
            self._replay.clear()

    def _end(self) -> None:
        if self._up is not None and self._up.owner != os.getpid():
            return  # in a forked child: only the process that started the engines may end them
        engines, run_queue, self._up, self._run_queue = self._up, self._run_queue, None, None
        if engines is None:
            return
        if session.current_cluster() is self:
            session.set_cluster(None)
        if run_queue is not None:
            run_queue.end()
        engines.end()

    def __enter__(self) -> Cluster:
        return self.start() if self._up is None else self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def interrupt(self, ranks: Iterable[int] | None = None) -> None:
        """Interrupt ranks, as Ctrl-C would; all by default."""
        self._running().interrupt(range(self.size) if ranks is None else ranks)

    def where(self) -> Where:
        """The stack of every rank now, and which ranks wait for which. Does not disturb them."""
        return Where.of(self._running(), self.current_run, self._replay.cells)

    def check_ready(self) -> None:
        """Make sure that engines are idle and alive; create a new process group if the last one failed.

        Replacements of lost engines run their ranks' cells, and get what was pushed.

        Raises:
            ClusterError: Engines are busy or lost, or the cluster does not run.
        """
        (engines := self._running()).check_alive()
        self._refuse_while_busy()
        engines.ensure_ready()
        if self._replay.catch_up():
            engines.ensure_ready()

    def _refuse_while_busy(self) -> None:
        if (run_queue := self._run_queue) is not None:
            run_queue.refuse_while_busy()

    def execute(self, source: str, ranks: Iterable[int] | None = None, *, number: int | None = None) -> CellRun:
        """Start to run a cell's source on ranks, all by default; `number` is its In[...] in tracebacks.

        Raises:
            ClusterError: The engines are busy or lost.
            PlanError: A rank does not exist.
        """
        self.check_ready()
        chosen = [self._check_rank(rank) for rank in (range(self.size) if ranks is None else ranks)]
        return self._replay.run_cell(source, number, chosen)

    def debug(self, rank: int, ask: Callable[[str], str] = input, tell: Callable[[str], None] = print) -> None:
        """Debug the last failure on a rank with pdb, post mortem; see `debugger.debug`."""
        self.check_ready()
        debug(self._running(), self._check_rank(rank), ask, tell)

    def push(self, **values: Any) -> None:
        """Assign values in the namespace of every engine's cells; all ranks map one shared copy of the tensors."""
        self.check_ready()
        self._replay.push(values)

    def pull(self, name: str, rank: int = 0) -> Any:
        """Get the value of a name from the namespace of one engine's cells.

        Raises:
            ClusterError: The name is not defined there, or cannot be sent.
        """
        self.check_ready()
        return self._replay.pull(name, self._check_rank(rank))

    def tie_classes(self, namespace: dict[str, Any], ranks: Iterable[int] | None = None) -> None:
        """Make classes that one cell defined here and on ranks identical, so `isinstance` holds after a transfer."""
        self._running()
        self._replay.tie(namespace, list(range(self.size) if ranks is None else ranks))

    @takes_options(TRAIN_OPTIONS | RUN_OPTIONS)
    def train(
        self, model: Any, data: Any, *, background: bool = False, attended: bool | None = None,
        watch: Callable[[Run], None] | None = None, names: tuple[str, str] = ("model", "data"),
        **options: Unpack[RunOptions],
    ) -> Run:  # fmt: skip
        """Train `model` on all engines.

        Afterwards `model` itself holds the trained weights and buffers; until then it is unchanged. Invalid options
        raise before any engine works. A lost engine is replaced, and the run resumes from the last snapshot; after an
        error `model` holds the weights of the last step that all ranks completed.

        Args:
            model: An ``nn.Module``; a dict, list or tuple of them; or a callable that makes one, see `Run.model`.
            data: A Dataset, a DataLoader (its batch size is the global one), or a tuple of tensors or NumPy arrays.
            background: Whether to return at once instead of waiting for the end. While another run is running, this
                one is queued, and starts when that one has ended.
            attended: Whether a caller in the main thread attends the run until its end, who calls `each_epoch` then;
                by default unless it is in the background.
            watch: Called with the run several times a second, and once after its end.
            names: The user's names of `model` and `data`, for errors.
            **options: Each of `TRAIN_OPTIONS` and `RUN_OPTIONS`; ``help(cluster.train)`` explains them here.

        Raises:
            PlanError: An option is not possible.
            TaskError: A model, data or function cannot be used.
            ClusterError: The engines are busy or lost.
            EngineError: The run failed.
        """
        self._running().check_alive()
        if not background:
            self._refuse_while_busy()
        assert self._run_queue is not None
        attended = not background if attended is None else attended
        run = self._run_queue.add(model, data, names, {**options}, watch, attended)
        return run if background else attend(run)

    @takes_options(TRAIN_OPTIONS | RUN_OPTIONS)
    def resume(
        self, *, background: bool = False, attended: bool | None = None, watch: Callable[[Run], None] | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:  # fmt: skip
        """Resume the last run of this notebook: `train` with the same model, data and options, changed by these.

        None leaves an option of the last run out.

        Args:
            background: See `train`.
            attended: See `train`.
            watch: See `train`.
            **options: Each of `TRAIN_OPTIONS` and `RUN_OPTIONS`; ``help(cluster.resume)`` explains them here.

        Raises:
            PlanError: There was no run, or no steps are left.
        """
        arguments = resume_arguments(session.last_run(), {**options})
        arguments |= {"background": background, "attended": attended, "watch": watch}
        return self.train(arguments.pop("model"), arguments.pop("data"), **arguments)

    complete, predict = complete, predict

    def _check_rank(self, rank: int) -> int:
        if 0 <= rank < self.size:
            return rank
        raise PlanError(f"rank {rank} does not exist: use 0 to {self.size - 1}.")

    def _running(self) -> Engines:
        if (up := self._up) is None:
            raise ClusterError("the cluster is not running: start it first (%dist_start, or cluster.start()).")
        if up.owner != os.getpid():
            raise ClusterError(f"the engines belong to process {up.owner}, and this is a fork of it: use them there.")
        return up
