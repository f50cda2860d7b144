"""The IPython magics, such as ``%dist_train``: each parses its line, calls the cluster, and returns or prints."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display

from nbdist import interrupts
from nbdist.cluster import (
    HOST_OPTIONS,
    Cluster,
    Run,
    attend,
    current_cluster,
    current_server,
    detached_clusters,
    end_hosts,
    end_server,
    last_run,
    require_cluster,
    waiting_hosts,
)
from nbdist.errors import ClusterError, PlanError, ranks_text
from nbdist.notebook import parsers
from nbdist.notebook.dashboard import has_front_end, load_panel, make_dashboard, show_run
from nbdist.notebook.detached import clusters_bundle
from nbdist.notebook.dist_help import help_text, help_text_of
from nbdist.notebook.export import export
from nbdist.notebook.expressions import evaluate, read_options, read_word
from nbdist.notebook.output import RankPrinter, StatusLine, show_rich
from nbdist.notebook.past_runs import runs_bundle
from nbdist.notebook.script import TrainCall
from nbdist.notebook.status import describe_cluster, engines_text, show_status
from nbdist.notebook.step_cell import compile_step
from nbdist.plan.arguments import OptionParser, given_options, split_line
from nbdist.plan.predict_options import PREDICT_OPTIONS
from nbdist.telemetry import Comparison, PastRun, compare, past_run, past_runs
from nbdist.telemetry.command_table import COMMANDS
from nbdist.telemetry.record import records
from nbdist.telemetry.run_view import mesh_text
from nbdist.telemetry.units import duration

__all__ = ["DistMagics"]


def _documented(parser: OptionParser) -> Any:
    """Give a magic the help of its parser, which ``%magic?`` shows."""

    def decorate(function: Any) -> Any:
        function.__doc__ = parser.format_help()
        return function

    return decorate


@magics_class
class DistMagics(Magics):
    """Everything that begins with ``%dist``."""

    shell: InteractiveShell
    _drawn_in_cell: tuple[Run, Any] | None = None
    _call: tuple[Run, TrainCall] | None = None

    @property
    def _cell_number(self) -> int:
        """The ``In[...]`` of the running cell; IPython's own counter is already one further in new versions."""
        return self.shell.displayhook.prompt_count

    @property
    def _cell(self) -> Any:
        """Identifies the running cell: its number, and the id of its request, for code that runs without a number."""
        parent: dict[str, Any] = getattr(self.shell, "get_parent", dict)()
        return self._cell_number, parent.get("header", {}).get("msg_id")

    def _parse(self, parser: OptionParser, line: str) -> argparse.Namespace:
        """The arguments on a magic's line; numbers among them may be expressions of the notebook."""
        return parser.parse(split_line(line), functools.partial(evaluate, self.shell))

    def show_run(self, run: Run) -> None:
        """Display a Run, unless its panel is already in this cell: as the cell's value it would be shown twice."""
        if self._drawn_in_cell != (run, self._cell):
            show_run(run)

    @no_var_expand
    @line_magic
    @_documented(parsers.START)
    def dist_start(self, line: str) -> None:
        arguments = self._parse(parsers.START, line)
        cluster = current_cluster()
        if has_front_end(self.shell):
            load_panel()
        given = {name: value for name, value in vars(arguments).items() if name not in ("n", "timeout")}
        wanted = Cluster(arguments.n, timeout_s=arguments.timeout, **given)
        with StatusLine(live=has_front_end(self.shell)) as status:
            if (
                cluster is not None
                and arguments.n in (None, cluster.size)
                and (not given_options(arguments, HOST_OPTIONS) or wanted.host_choice.kept_by(cluster.host_choice))
                and arguments.device in ("auto", cluster.device)
                and (arguments.detach is None or cluster.detach is not None)
            ):
                changed = {"timeout_s": arguments.timeout, "spares": arguments.spares}
                if not cluster.reachable:
                    cluster.start(status.report, **changed)
                    status.end(f"restarted {describe_cluster(cluster)}, in {duration(cluster.start_seconds)}")
                    return
                before = [(engine.host, engine.pid) for engine in cluster.engines]
                cluster.start(status.report, **changed)
                new = [e.rank for e, was in zip(cluster.engines, before, strict=True) if (e.host, e.pid) != was]
                status.end(
                    f"{f'replaced {ranks_text(new)}' if new else 'already running'}: {describe_cluster(cluster)}"
                )
                return
            if cluster is not None:
                _refuse_while_running(cluster)
                cluster.stop()
            wanted.start(status.report)
            status.end(f"started {describe_cluster(wanted)}, in {duration(wanted.start_seconds)}")
            if wanted.detach is not None:
                alone = f"they live {duration(wanted.detach)} without this kernel"
                print(f"{alone}: %dist_attach {wanted.name} takes them over in another kernel")

    @no_var_expand
    @line_magic
    @_documented(parsers.ATTACH)
    def dist_attach(self, line: str) -> Run | None:
        arguments = self._parse(parsers.ATTACH, line)
        dashboard = make_dashboard(self.shell, background=True)
        cluster = Cluster.attach(arguments.name, namespace=self.shell.user_ns, watch=dashboard.update)
        print(f"took over cluster {cluster.name}: {describe_cluster(cluster)}")
        run = last_run()
        if run is not None and not run.ended:
            dashboard.begin(run)
            self._drawn_in_cell = (run, self._cell)
        if arguments.output:
            self.shell.user_ns[arguments.output] = run
        return run

    @no_var_expand
    @line_magic
    @_documented(parsers.CLUSTERS)
    def dist_clusters(self, line: str) -> None:
        self._parse(parsers.CLUSTERS, line)
        if clusters := detached_clusters():
            display(clusters_bundle(clusters), raw=True)
        else:
            print("no detached cluster lives: %dist_start --detach starts one")

    @no_var_expand
    @line_magic
    @_documented(parsers.STATUS)
    def dist_status(self, line: str) -> None:
        self._parse(parsers.STATUS, line)
        show_status(live=has_front_end(self.shell))

    @no_var_expand
    @line_magic
    @_documented(parsers.WHERE)
    def dist_where(self, line: str) -> None:
        self._parse(parsers.WHERE, line)
        print(require_cluster().where())

    @no_var_expand
    @line_magic
    @_documented(parsers.SCALE)
    def dist_scale(self, line: str) -> None:
        engines, cluster = self._parse(parsers.SCALE, line).n, require_cluster()
        cluster.scale(engines)
        run = cluster.current_run
        if run is not None:
            print(f"run {run.run_id} continues with {engines_text(engines)} after the current step")
        else:
            print(f"now {describe_cluster(cluster)}")

    @no_var_expand
    @line_magic
    @_documented(parsers.DEBUG)
    def dist_debug(self, line: str) -> None:
        require_cluster().debug(self._parse(parsers.DEBUG, line).rank)

    @no_var_expand
    @line_magic
    @_documented(parsers.STOP)
    def dist_stop(self, line: str) -> None:
        arguments = self._parse(parsers.STOP, line)
        cluster = current_cluster()
        stopped = []
        if cluster is not None:
            stopped.append(engines_text(cluster.size))
            cluster.stop()
        if arguments.all and (names := waiting_hosts()):
            end_hosts()
            stopped.append(f"the agents on {', '.join(names)}")
        if arguments.all and current_server() is not None:
            end_server()
            stopped.append("the fork server")
        print(f"stopped {' and '.join(stopped)}" if stopped else "no engines are running")

    @no_var_expand
    @line_magic
    @_documented(parsers.HELP)
    def dist_help(self, line: str) -> None:
        name = self._parse(parsers.HELP, line).magic
        print(help_text() if name is None else help_text_of(name))

    @no_var_expand
    @cell_magic
    @_documented(parsers.DIST)
    def dist(self, line: str, cell: str) -> None:
        arguments = self._parse(parsers.DIST, line)
        cluster = require_cluster()
        ranks = None if arguments.ranks is None else parsers.parse_ranks(arguments.ranks, cluster.size)
        if arguments.local:
            cluster.check_ready()
            result = self.shell.run_cell(cell, store_history=False)
            if not result.success:
                raise ClusterError("the cell failed in the notebook, so it was not sent to the engines.")
        # Keep the magic's own line as line 1: tracebacks then count as the notebook does; a cell magic must stay first.
        source = cell if cell.startswith("%%") else f"# %%dist {line}\n{cell}"
        cell_run = cluster.execute(source, ranks, number=self._cell_number)
        printer = RankPrinter(cell_run.printed)
        try:
            cell_run.wait(printer.poll)
        finally:
            printer.flush()
            for position in range(max((len(shown) for shown in cell_run.displays().values()), default=0)):
                bundles = {r: s[position]["data"] for r, s in cell_run.displays().items() if len(s) > position}
                show_rich(bundles, "display")
        show_rich(cell_run.results(), "Out")
        if arguments.local:
            cluster.tie_classes(self.shell.user_ns, ranks)

    @no_var_expand
    @line_magic
    @_documented(parsers.PUSH)
    def dist_push(self, line: str) -> None:
        arguments = self._parse(parsers.PUSH, line)
        cluster = require_cluster()
        odd = [name for name in arguments.names if not name.isidentifier()]
        if odd:
            raise PlanError(f"{odd[0]!r} is not a name: assign it to one first.")
        cluster.push(**{name: evaluate(self.shell, name) for name in arguments.names})
        print(f"sent {', '.join(arguments.names)} to {engines_text(cluster.size)}")

    @no_var_expand
    @line_magic
    @_documented(parsers.PULL)
    def dist_pull(self, line: str) -> Any:
        arguments = self._parse(parsers.PULL, line)
        return require_cluster().pull(arguments.name, arguments.rank)

    @no_var_expand
    @line_cell_magic
    @_documented(parsers.TRAIN)
    def dist_train(self, line: str, cell: str | None = None) -> Run:
        arguments = self._parse(parsers.TRAIN, line)
        cluster = require_cluster()
        if cell is not None and arguments.loss is not None:
            raise PlanError("--loss and a cell body both define the loss: leave one of them out.")
        words = given_options(arguments, parsers.LINE_OPTIONS)
        options = read_options(self.shell, words, parsers.LINE_OPTIONS)
        attended = not arguments.background
        call = TrainCall(
            model=arguments.model, data=arguments.data, words=words, options={**options}, cell=self._cell_number,
            body="" if cell is None else self.shell.transform_cell(cell),
        )  # fmt: skip
        if cell is not None:
            options["step"] = compile_step(self.shell, line, cell, self._cell_number)
        dashboard = make_dashboard(self.shell, arguments.background)
        if arguments.data is None:
            if arguments.model is not None or arguments.resume is None:
                missing = "DATA" if arguments.model is not None else "MODEL, DATA"
                raise PlanError(
                    f"%dist_train: the following arguments are required: {missing}. --resume alone continues the "
                    "last run."
                )
            run = cluster.resume(**options, background=True, attended=attended, watch=dashboard.update)
        else:
            model, data = evaluate(self.shell, arguments.model), evaluate(self.shell, arguments.data)
            names = (arguments.model, arguments.data)
            run = cluster.train(
                model, data, names=names, background=True, attended=attended, watch=dashboard.update, **options
            )
        if not options.get("rehearse"):
            before = None if self._call is None else self._call[1]
            self._call = run, call if arguments.data is not None or before is None else before.resumed(call)
        with interrupts.collected() as came:  # an interrupt while the panel is drawn would leave the run without a cell
            dashboard.begin(run)
            self._drawn_in_cell = (run, self._cell)
            if arguments.output:
                self.shell.user_ns[arguments.output] = run
            printer = RankPrinter(run.printed)
        if arguments.background:
            return run
        try:
            return attend(run, printer.poll, len(came))
        finally:
            printer.flush()

    @no_var_expand
    @line_magic
    @_documented(parsers.PREDICT)
    def dist_predict(self, line: str) -> Any:
        arguments = self._parse(parsers.PREDICT, line)
        cluster = require_cluster()
        options = read_options(self.shell, given_options(arguments, PREDICT_OPTIONS), PREDICT_OPTIONS)
        model, data = evaluate(self.shell, arguments.model), evaluate(self.shell, arguments.data)
        seen: list[Run] = []
        printer = RankPrinter(lambda stream: seen[-1].printed(stream) if seen else {})
        with StatusLine(live=has_front_end(self.shell), failed="no outputs") as status:

            def while_waiting(run: Run) -> None:
                seen[:] = [run]
                printer.poll()
                total = "" if run.progress.steps_total is None else f" of {run.progress.steps_total}"
                status.report(f"predicting, batch {run.progress.step}{total}")

            try:
                names = (arguments.model, arguments.data)
                outputs = cluster.predict(model, data, names=names, while_waiting=while_waiting, **options)
            finally:
                printer.flush()
            run = seen[-1]
            noted = "".join(f"; {text}" for text in run.progress.notes)
            took = f"{run.progress.samples:,} samples on {mesh_text(run.progress.plan)}"
            status.end(f"predicted {took}, in {duration(run.progress.elapsed_s)}{noted}")
        if not arguments.output:
            return outputs
        self.shell.user_ns[arguments.output] = outputs
        return None

    @no_var_expand
    @line_magic
    @_documented(parsers.RUNS)
    def dist_runs(self, line: str) -> PastRun | None:
        arguments = self._parse(parsers.RUNS, line)
        if arguments.run_id is not None:
            return past_run(arguments.run_id)
        if arguments.n < 1:
            raise PlanError(f"%dist_runs -n {arguments.n} lists nothing: use a positive number.")
        runs = past_runs(arguments.n)
        if runs:
            display(runs_bundle(runs), raw=True)
        else:
            print(f"no run has left a record in {records()}")
        return None

    @no_var_expand
    @line_magic
    @_documented(parsers.COMPARE)
    def dist_compare(self, line: str) -> Comparison:
        arguments = self._parse(parsers.COMPARE, line)
        if arguments.n < 1:
            raise PlanError(f"%dist_compare -n {arguments.n} compares nothing: use a positive number.")
        if not arguments.runs:
            return compare(past_runs(arguments.n))
        given = [word if word[0].isdigit() else evaluate(self.shell, word) for word in arguments.runs]
        return compare(given[0] if len(given) == 1 else given)

    @no_var_expand
    @line_magic
    @_documented(parsers.EXPORT)
    def dist_export(self, line: str) -> None:
        file = read_word(self.shell, self._parse(parsers.EXPORT, line).file, "path")
        run = last_run()
        if run is None:
            raise ClusterError("no run has been started in this notebook: %dist_train starts one.")
        if self._call is None or self._call[0] is not run:
            raise PlanError(
                f"{run.run_id} was not started by %dist_train, whose line would say what it needs: nbdist.train takes "
                "the same arguments as cluster.train."
            )
        print(export(self.shell, *self._call, file))

    @no_var_expand
    @line_magic
    @_documented(parsers.RUN)
    def dist_run(self, line: str) -> Run | None:
        arguments = self._parse(parsers.RUN, line)
        run, command, value = last_run(), arguments.command, arguments.value
        if run is None:
            raise ClusterError("no run has been started in this notebook: %dist_train starts one.")
        if command is None:
            return run
        run.give(command, None if value is None else read_word(self.shell, value, COMMANDS[command].read))
        return None


def _refuse_while_running(cluster: Cluster) -> None:
    run = last_run()
    if run is not None and run.progress.running:
        raise ClusterError(f"run {run.run_id} is running: stop it (run.stop()) before the engines change.")
