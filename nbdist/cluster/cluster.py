"""The cluster: what a person does with the engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from nbdist.cluster import current, entry, fork_server
from nbdist.cluster.anchor import Anchor, check_detach
from nbdist.cluster.cells import CellRun
from nbdist.cluster.debugger import debug
from nbdist.cluster.definitions import CellSources, class_marks
from nbdist.cluster.facts import Facts
from nbdist.cluster.gpus import choose_size
from nbdist.cluster.hangs import Hangs
from nbdist.cluster.ready import make_ready
from nbdist.cluster.replay import Replay
from nbdist.cluster.resuming import asked_again
from nbdist.cluster.run import Run
from nbdist.cluster.starting import start_engines, take_over_engines
from nbdist.cluster.training import attend
from nbdist.cluster.trainings import Trainings
from nbdist.cluster.where import Where
from nbdist.errors import ClusterError, EngineError, PlanError

__all__ = ["Cluster"]

_COMPLETED_WITHIN_S = 0.3


class Cluster(Facts):
    """Engines of this kernel.

    A context manager: ``with nbdist.Cluster(engines=2) as cluster: ...``

    Args:
        engines: How many; by default one a GPU, else one a core up to four.
        device: "auto" (GPUs where there are some), "cpu" or "cuda".
        timeout_s: How long the start may take, in seconds.
        spares: How many engines to keep beside them, idle, to take the place of lost ones at once. By default one where
            engines are forked, for it shares their memory, else none.
        detach: For how many seconds the engines, and a training, go on without a kernel, however this one ends: another
            one may `attach` meanwhile. By default they end with this one.

    Raises:
        PlanError: A number or the device cannot be meant. No engine is started.
    """

    def __init__(
        self, engines: int | None = None, *, device: str = "auto", timeout_s: float = 60.0, spares: int | None = None,
        detach: float | None = None,
    ) -> None:  # fmt: skip
        if timeout_s <= 0:
            raise PlanError(f"timeout {timeout_s:g} s is too short: use a positive number.")
        if spares is not None and (isinstance(spares, bool) or not isinstance(spares, int) or spares < 0):
            raise PlanError(f"{spares!r} spares cannot be kept: use a whole number, 0 or more.")
        if detach is not None:
            check_detach(detach)
        super().__init__(choose_size(engines, device))
        self.device = device
        self.timeout_s = timeout_s
        self.spares = int(fork_server.can_fork()) if spares is None else spares
        self.detach = detach
        self._sources = CellSources()
        self._replay = Replay()

    def start(self, tell: Callable[[str], None] = lambda words: None) -> Cluster:
        """Start the engines; ready only after all of them have met in a collective.

        On a running cluster, engines that were lost are replaced, and nothing happens otherwise. One whose controller
        has ended is started anew. Engines that are new get the cells and pushed values that their ranks had.

        Args:
            tell: Called with what is being done, a few words, several times a second.

        Raises:
            ClusterError: Another cluster runs in this kernel, or an engine did not become ready in time.
        """
        if self._up is not None and not self.reachable:
            self._end()
        if self._up is not None:
            self._running()
            self._refuse_while_busy()
            self._up.timeout_s = self.timeout_s
            if self._up.replace_lost(tell):
                self._sources.sent.clear()  # the new ones know no cell yet
            self._up.keep_spares(self.spares)
            self.check_ready()
            return self
        if current.current_cluster() is not None:
            raise ClusterError("a cluster is running in this kernel already: stop it first.")
        self._up = start_engines(self.size, self.device, self.timeout_s, tell, self.spares, self.detach)
        self._sources = CellSources()
        self._replay.follow(self._up)
        self._trainings = Trainings(self._up, self._sources)
        current.set_cluster(self)
        if self.detach is None:
            current.stop_at_exit(self)
        self.check_ready()
        return self

    @classmethod
    def attach(
        cls, name: str | None = None, *, namespace: dict[str, Any] | None = None,
        watch: Callable[[Run], None] | None = None,
    ) -> Cluster:  # fmt: skip
        """Take over a detached cluster whose kernel has ended: engines, what they were told, and the newest run.

        That is `last_run` then; when it has ended, or if it has, its weights come home.

        Args:
            name: Which; not needed where there is only one.
            namespace: Where its model stands afterwards, under its name; one like it that is there gets the weights.
            watch: As of `train`.

        Raises:
            PlanError: There is none of that name, or several without a name.
            ClusterError: A cluster runs in this kernel, or the other one belongs to a kernel that lives.
        """
        if current.current_cluster() is not None:
            raise ClusterError("a cluster is running in this kernel already: stop it first.")
        anchor = Anchor.reach(name)
        try:
            engines = take_over_engines(anchor)
            cluster = cls(engines.size, device=engines.device, timeout_s=engines.timeout_s, detach=anchor.patience_s)
            cluster._up, cluster._trainings = engines, Trainings(engines, cluster._sources)
            cluster._replay.take_over(engines)
            cluster._trainings.take_over({} if namespace is None else namespace, watch, cluster.where)
        except BaseException:
            anchor.leave()
            raise
        current.set_cluster(cluster)
        return cluster

    def scale(self, engines: int) -> None:
        """Have so many engines from now on: some join, or the last ones leave. What the others hold stays.

        A run that goes on does it after the step it is in, with the same global batch, and this returns at once. Else
        they are ready when this returns; new ones have run every cell that all ranks have.

        Raises:
            PlanError: The machine cannot carry so many, or the run's mesh or batch cannot be laid on them.
            ClusterError: Engines are busy or lost, or new ones were not ready in time.
        """
        if isinstance(engines, bool) or not isinstance(engines, int):
            raise PlanError(f"{engines!r} engines cannot be had: use a whole number.")
        choose_size(engines, self.device)
        up, run = self._running(), self.current_run
        if run is not None:
            run.scale(engines)
            return
        self.check_ready()
        up.resize(engines)
        self._sources.sent.clear()
        self.check_ready()

    def stop(self) -> None:
        """End the engines and everything about them. Twice is fine."""
        self._end()
        self._replay.clear()

    def _end(self) -> None:
        if self._up is not None and self._up.owner != os.getpid():
            return  # a forked child has no share in them: only who has started them ends them
        engines, trainings, self._up, self._trainings = self._up, self._trainings, None, None
        if engines is None:
            return
        if current.current_cluster() is self:
            current.set_cluster(None)
        if trainings is not None:
            trainings.end()
        engines.end()

    def __enter__(self) -> Cluster:
        return self.start() if self._up is None else self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def interrupt(self, ranks: Iterable[int] | None = None) -> None:
        """Interrupt what ranks are doing, as Ctrl-C would; all by default."""
        self._running().interrupt(range(self.size) if ranks is None else ranks)

    def where(self) -> Where:
        """Where every rank stands at the moment, whatever it does, and who waits for whom. Disturbs nobody."""
        return Where.of(self._running(), self.current_run, self._replay.cells)

    def check_ready(self) -> None:
        """Refuse to begin anything while the engines are busy or lost; form a new world if the last one broke.

        Engines that took the place of lost ones get the cells and pushed values that their ranks had.

        Raises:
            ClusterError: They are, or the cluster does not run.
        """
        (engines := self._running()).check_alive()
        self._refuse_while_busy()
        make_ready(engines)
        if self._replay.catch_up():
            make_ready(engines)

    def _refuse_while_busy(self) -> None:
        if self._trainings is not None:
            self._trainings.refuse_while_busy()

    def execute(self, source: str, ranks: Iterable[int] | None = None, *, number: int | None = None) -> CellRun:
        """Begin to run a cell's source on ranks, all by default; `number` is its In[...] in tracebacks.

        Raises:
            ClusterError: The engines are busy or lost.
            PlanError: A rank does not exist.
        """
        self.check_ready()
        chosen = [self._check_rank(rank) for rank in (range(self.size) if ranks is None else ranks)]
        return self._replay.run_cell(source, number, chosen)

    def complete(self, source: str, rank: int = 0) -> tuple[str, list[str]]:
        """The word at the end of `source`, and what it could become in a cell on one engine.

        Returns at once while the engines work, and after a moment where one does not answer.
        """
        if not self.reachable or rank >= self.size or self.engines[rank].state != "idle":
            return "", []
        call = self._running().start_call(rank, entry.complete, source)
        call.wait(_COMPLETED_WITHIN_S)
        return call.get() if call.ready() and call.successful() else ("", [])

    def debug(self, rank: int, ask: Callable[[str], str] = input, tell: Callable[[str], None] = print) -> None:
        """Look with pdb at what failed last on a rank; see `debugger.debug`."""
        self.check_ready()
        debug(self._running(), self._check_rank(rank), ask, tell)

    def push(self, **values: Any) -> None:
        """Put values into the namespace of every engine's cells; tensors travel through one shared copy."""
        self.check_ready()
        self._replay.push(values, self._sources.new())

    def pull(self, name: str, rank: int = 0) -> Any:
        """The value of a name in the namespace of one engine's cells.

        Raises:
            ClusterError: The name is not defined there, or cannot be sent.
        """
        self.check_ready()
        self._check_rank(rank)
        from nbdist.core.handover import unpack

        try:
            return unpack(self._running().call([rank], entry.pull, (name, self._running().remote))[rank])
        except EngineError as error:
            if "NameError" in str(error):
                raise ClusterError(f"{name!r} is not defined on rank {rank}.") from None
            raise

    def tie_classes(self, namespace: dict[str, Any], ranks: Iterable[int] | None = None) -> None:
        """Let classes that the same cell defined here and on ranks be one, whichever way an instance travels."""
        self._running()
        self._replay.tie(class_marks(namespace), list(range(self.size) if ranks is None else ranks))

    def train(
        self, model: Any, data: Any, *, background: bool = False, hang_timeout: float | None = None,
        on_hang: str = "replace", on_failure: str = "replace", watch: Callable[[Run], None] | None = None,
        names: tuple[str, str] = ("model", "data"), **options: Any,
    ) -> Run:  # fmt: skip
        """Train `model` on all engines; see `nbdist.train` for the options.

        Afterwards `model` itself holds the trained weights and buffers; until then it is untouched. Whatever is wrong
        with the options is said before an engine is touched. An engine that is lost is replaced, and the run goes on
        from the last snapshot; after an error `model` holds the weights of the last step that all ranks completed.

        Args:
            model: An ``nn.Module``.
            data: A Dataset, a DataLoader, or a tuple of tensors or NumPy arrays.
            background: Whether to return at once instead of waiting for the end. While another run goes on, this one
                is queued, and begins when it has ended.
            hang_timeout: Seconds without a step, evaluation included, after which the run hangs; see `Hangs`.
            on_hang: What is done then: "replace" the ranks that the others wait for, or "stop" with an error.
            on_failure: What is done when engines are lost: "replace" them, "shrink" to those that are left, with the
                same global batch, or "stop" with an error and the state kept.
            watch: Called with the run several times a second, and once after its end.
            names: What the person calls `model` and `data`, for errors.
            **options: `loss` or `step`, `optimizer`, `val`, `metric` and every option of a Plan. ``resume=True``
                without `checkpoint` goes on where the last run of this notebook ended.

        Raises:
            PlanError: An option cannot be run.
            TaskError: Something supplied cannot be used.
            ClusterError: The engines are busy or lost.
            EngineError: The run failed.
        """
        self._running().check_alive()
        if not background:
            self._refuse_while_busy()
        assert self._trainings is not None
        hangs = Hangs(hang_timeout, on_hang, self.where)
        run = self._trainings.add(model, data, names, options, watch, hangs, on_failure)
        return run if background else attend(run)

    def resume(self, **options: Any) -> Run:
        """Go on where the last run of this notebook ended: `train` with the same model, data and options.

        Args:
            **options: What is to be different, such as a larger `epochs`.

        Raises:
            PlanError: There was no run, or it has done all that is asked for.
        """
        asked = asked_again(current.last_run(), options)
        return self.train(asked.pop("model"), asked.pop("data"), **asked)

    def attend(self, run: Run, while_waiting: Callable[[], None] = lambda: None, interrupts: int = 0) -> Run:
        """Wait for a run in the foreground: the first interrupt stops it after its step, a second one at once."""
        return attend(run, while_waiting, interrupts)

    def _check_rank(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise PlanError(f"rank {rank} does not exist: use 0 to {self.size - 1}.")
        return rank
