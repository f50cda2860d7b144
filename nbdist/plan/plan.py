"""The Plan: a frozen, validated description of one run. Every option is defined here, once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nbdist.errors import PlanError
from nbdist.plan.combinations import check_combinations
from nbdist.plan.known_names import LOSSES, METRICS, OPTIMIZERS
from nbdist.plan.mesh import STRATEGY_WORDS, Mesh
from nbdist.plan.option import Option, check_known, option, options_of
from nbdist.plan.option_values import check_word, check_yes_or_no, positive_number, steps_or_seconds, whole_number
from nbdist.plan.slices import default_microbatches

__all__ = ["DEFAULT_BATCH_SIZE", "OPTIONS", "PRECISIONS", "REDUCTIONS", "SCHEDULES", "SLICES", "Plan"]

DEFAULT_BATCH_SIZE = 32
PRECISIONS = ("full", "bf16", "fp16")
SLICES = 4
"""Default slices of a reproducible batch: twelve would divide by 3 ranks too, but cost up to half a step."""
CHECKS = ("yes", "mesh", "no")
REDUCTIONS = ("mean", "sum")
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
"""Pipeline schedules, and how many stages each gives a rank."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The description of one run. Pure data, JSON-able, checked on creation; `Plan.create` adds defaults.

    The sentence beside each field is the help text of the option with the same name.
    """

    mesh: Mesh
    strategy: str = option(
        "data",
        "How the ranks share the work: data, shard, pipeline, tensor (aliases ddp, fsdp, pp, tp), or a mesh such as "
        "dp=2,pp=2 whose degrees multiply to the number of ranks.",
        metavar="WORD|MESH",
        words=STRATEGY_WORDS,
    )
    loss: str = option(
        "",
        f"A callable loss(output, target), which returns a mean or (mean, weight), or one of {', '.join(LOSSES)}.",
        default="",
        words=LOSSES,
        read="callable",
        of_task=True,
    )
    reduction: str = option(
        "mean", "What a loss is over the samples: their mean, or their sum. A loss that says so itself (torch's "
        "reduction='sum') needs no option.", metavar="mean|sum", words=REDUCTIONS, of_task=True,
    )  # fmt: skip
    optimizer: str = option(
        "adamw",
        "A class of torch.optim in small letters (sgd, adamw, ...), a callable that takes the parameters, or an "
        "optimizer of the model; or a dict of several, each for the module of its name, or ready-made; or a list.",
        words=OPTIMIZERS,
        read="callable",
        of_task=True,
    )
    lr: float | None = option(
        None,
        "Learning rate.",
        parse=float,
        metavar="RATE",
        default="the optimizer's own default",
        of_task=True,
        elsewhere=("learning_rate",),
    )
    lr_scheduler: str = option(
        "",
        "A torch scheduler of a ready-made optimizer, or a callable that makes one from an optimizer; or a dict of "
        "them, by the names of optimizers.",
        default="",
        read="quotable",
        of_task=True,
        elsewhere=("scheduler",),
    )
    schedule_by: str = option(
        "step", "When `lr_scheduler` steps: after each optimizer step or each epoch; ReduceLROnPlateau always after an "
        "epoch.", metavar="step|epoch", words=("step", "epoch"),
    )  # fmt: skip
    epochs: int | None = option(
        None, "Passes over the training data.", parse=int, metavar="N", default="1, unless `steps`",
        elsewhere=("num_epochs", "num_train_epochs", "max_epochs"),
    )  # fmt: skip
    steps: int | None = option(
        None, "Optimizer steps, instead of `epochs`; wraps round the data.", parse=int, metavar="N", default="",
        elsewhere=("max_steps",),
    )  # fmt: skip
    batch_size: int = option(
        DEFAULT_BATCH_SIZE,
        "Global batch size: samples in one optimizer step, over all ranks.",
        parse=int,
        metavar="N",
        of_task=True,
        elsewhere=("bs", "train_batch_size"),
    )
    accumulate: int = option(
        1, "Microbatches that each rank runs in one step: they cut the batch, which keeps its size.", parse=int,
        metavar="K",
        elsewhere=("gradient_accumulation_steps", "accumulate_grad_batches"),
    )  # fmt: skip
    clip_norm: float | None = option(
        None,
        "Largest global L2 norm of the gradient; larger ones are scaled down.",
        parse=float,
        metavar="X",
        default="",
        elsewhere=("max_grad_norm", "gradient_clip_val"),
    )
    precision: str = option(
        "full",
        "Forward and loss under autocast to bf16 or fp16; weights stay as they are.",
        metavar="full|bf16|fp16",
        words=PRECISIONS,
        elsewhere=("amp", "mixed_precision"),
    )
    sync_batchnorm: bool = option(False, "BatchNorm over the whole microbatch of all replicas.", parse=bool)
    microbatches: int | None = option(
        None,
        "Microbatches in flight through a pipeline, for each one of `accumulate`.",
        parse=int,
        metavar="M",
        default="twice the ranks of the pipeline, or fewer",
    )
    schedule: str = option(
        "1f1b",
        "Pipeline schedule: gpipe, 1f1b or interleaved (two stages a rank).",
        metavar="WORD",
        words=tuple(SCHEDULES),
    )
    split_at: tuple[str, ...] = option(
        (), "Where a pipeline is cut: modules that begin a stage. Default: balanced by measured time.", many=True,
        default="",
    )  # fmt: skip
    tensor_plan: Mapping[str, str] | None = option(
        None,
        "How tensor parallelism splits layers: a dict from names or patterns to kinds, such as column and row. "
        "Default: automatic.",
        default="",
        read="quotable",
    )
    metric: str = option(
        "",
        f"Measured on all `val` data: metric(output, target), an object with update and compute, {', '.join(METRICS)}.",
        default="",
        words=METRICS,
        read="callable",
        of_task=True,
    )
    evaluate: str = option(
        "",
        "Called on `val` data in place of the step: evaluate(model, batch), a dict of means, or objects with compute.",
        metavar="FUNCTION",
        default="",
        read="callable",
        of_task=True,
    )
    after_step: str = option(
        "", "Called after each optimizer step: after_step(model), which may change weights. For the strategy data.",
        metavar="FUNCTION", default="", read="callable", of_task=True,
    )  # fmt: skip
    ema: float | None = option(
        None, "Keep a moving average of the weights, updated after each optimizer step with this decay: 0.999. At the "
        "end it is in run.ema, a state_dict.", parse=float, metavar="DECAY", default="", elsewhere=("ema_decay",),
    )  # fmt: skip
    each_epoch: str = option(
        "", "Called after each epoch: each_epoch(model, row), with the whole model and the row of the history, in the "
        "notebook while the cell waits, else on rank 0; returns True to end the run.",
        metavar="FUNCTION", default="", read="callable", of_task=True,
    )  # fmt: skip
    keep_best: str = option(
        "", "At the end, the model has the weights of the epoch in which a number of the history was best: val_loss.",
        metavar="NAME", default="", elsewhere=("restore_best_weights", "load_best_model_at_end"),
    )  # fmt: skip
    shuffle: bool = option(
        True,
        "Read the training data in a new order each epoch.",
        parse=bool,
        of_task=True,
    )
    seed: int = option(0, "Determines the sample order and the random numbers of every slice.", parse=int, metavar="N")
    reproducible: int = option(
        0,
        "The same bits on any number of ranks: every batch is cut into N slices (4 if no number is given), as many as "
        "there may ever be ranks, whose gradients are summed in a fixed order. For the strategy data; then `threads` "
        "is 1.",
        parse=int,
        metavar="N",
        default="",
        bare=True,
    )
    threads: int = option(
        1,
        "CPU threads of each rank; the bits of a result depend on it.",
        parse=int,
        metavar="N",
        default="cores / ranks",
    )
    bucket_mib: float = option(
        25.0, "Gradient bucket in MiB, where the sync overlaps with backward (NCCL).", parse=float, metavar="MIB"
    )
    gather: bool = option(
        True,
        "Gather the whole model at the end; switch it off for one too large, which `checkpoint` saves.",
        parse=bool,
    )
    checkpoint: str = option(
        "",
        "Folder for checkpoints: one at the end, more with `checkpoint_every`.",
        metavar="DIR",
        default="",
        read="path",
    )
    checkpoint_every: str = option(
        "",
        "How often to write one, in the background: steps (200) or time (90s, 5min).",
        metavar="N|TIME",
        default="",
        read="amount",
    )
    checkpoint_frozen: bool = option(
        True,
        "Whether checkpoints hold parameters that are not trained. Without them a resume takes those of MODEL, and "
        "compares their sums.",
        parse=bool,
        default="yes, but no for a model of peft",
    )
    checkpoint_keep: int = option(3, "How many of the newest checkpoints stay.", parse=int, metavar="K")
    resume: str | bool = option(
        "",
        "Resume from a checkpoint of any mesh, up to `epochs` or `steps` in total. Without DIR, or with True: from the "
        "newest in `checkpoint`, else where the last run of this notebook ended.",
        metavar="DIR",
        default="",
        bare=True,
        read="path",
    )
    early_stop: str = option(
        "",
        "End after the epoch in which a number of the history has not improved for so many epochs: val_loss:3.",
        metavar="NAME:EPOCHS",
        default="",
    )
    stop_on_nan: bool = option(
        False, "End with an error when a loss is not finite, before it reaches the weights.", parse=bool
    )
    check: str = option(
        "yes",
        "Before the first update, compare a step on few samples with one process, and its slices with the whole batch; "
        "mesh leaves out the second, where each slice is meant by itself; no leaves out both.",
        metavar="yes|mesh|no",
        words=CHECKS,
    )
    rehearse: bool = option(
        False,
        "Train nothing: run two steps, a short evaluation, each function of yours, a checkpoint and its resume; "
        "put all back, and say what the run would take.",
        parse=bool,
        bare=True,
        elsewhere=("fast_dev_run", "dry_run"),
    )
    tensorboard: str = option(
        "", "Folder for TensorBoard: loss, rate and metrics of each run.", metavar="DIR", default="", read="path"
    )

    updates: bool = False
    """Whether the step itself updates parameters, with `nbdist.update`."""
    carries: bool = False
    """Whether the step carries values from batch to batch, with `nbdist.carried`."""
    checked: str = ""
    """What the check before the first update found, in a clause; empty before it, and without it."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "microbatches"):
            if getattr(self, name) is not None:
                self._set(name, whole_number(name, getattr(self, name), 1))
        if (self.epochs is None) == (self.steps is None):
            raise PlanError(f"epochs={self.epochs} and steps={self.steps}: give one of the two.")
        for name in ("batch_size", "accumulate", "threads", "checkpoint_keep"):
            self._set(name, whole_number(name, getattr(self, name), 1))
        self._set("seed", whole_number("seed", self.seed))
        if self.reproducible is True or self.reproducible is False:
            self._set("reproducible", SLICES if self.reproducible else 0)
        self._set("reproducible", whole_number("reproducible", self.reproducible, 0))
        for name in ("shuffle", "sync_batchnorm", "gather", "stop_on_nan", "rehearse", "checkpoint_frozen"):
            check_yes_or_no(name, getattr(self, name))
        words_of = {"precision": PRECISIONS, "schedule": SCHEDULES, "check": CHECKS, "reduction": REDUCTIONS,
                    "schedule_by": ("step", "epoch")}  # fmt: skip
        for name, words in words_of.items():
            check_word(name, getattr(self, name), words)
        if isinstance(self.split_at, str):
            self._set("split_at", tuple(self.split_at.replace(",", " ").split()))
        self._set("split_at", tuple(self.split_at))
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise PlanError(
                f"tensorboard={self.tensorboard} needs a package that is missing: pip install 'nbdist[tensorboard]'."
            )
        for name in ("checkpoint", "resume", "tensorboard"):  # ranks may have another working directory
            if getattr(self, name) not in ("", True, False):
                self._set(name, os.path.abspath(os.path.expanduser(getattr(self, name))))
        self._set("checkpoint_every", str(self.checkpoint_every or ""))
        for name in ("lr", "clip_norm", "bucket_mib", "ema"):
            if getattr(self, name) is not None:
                self._set(name, positive_number(name, getattr(self, name)))
        check_combinations(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def create(
        cls, *, ranks: int, cores: int, flat_samples: bool = False, updates: bool = False, carries: bool = False,
        **options: Any,
    ) -> Plan:  # fmt: skip
        """Create a Plan from a user's options; None means not given.

        Args:
            ranks: Ranks in the world.
            cores: CPU cores of all hosts together.
            flat_samples: Whether a sample is a single row of numbers, so that a microbatch has few rows.
            updates: See `Plan.updates`.
            carries: See `Plan.carries`.
            **options: Any field of Plan except `mesh`.

        Raises:
            PlanError: A value or a combination cannot be run, or an option does not exist.
        """
        check_known(options, OPTIONS)
        given = {name: value for name, value in options.items() if value is not None}
        if "epochs" not in given and "steps" not in given:
            given["epochs"] = 1
        given.setdefault("threads", 1 if given.get("reproducible") else max(1, cores // ranks))
        plan = cls(mesh=Mesh.parse(given.get("strategy", "data"), ranks), updates=updates, carries=carries, **given)
        if plan.mesh.pp > 1 and flat_samples and plan.microbatches is None:
            few = default_microbatches(plan.mesh.pp, plan.batch_size // plan._shares, flat=True)
            return replace(plan, microbatches=few)
        return plan

    @property
    def checkpoint_cadence(self) -> tuple[int, float]:
        """Steps and seconds between checkpoints; at most one is not 0, and 0 is never."""
        return steps_or_seconds("checkpoint_every", self.checkpoint_every) if self.checkpoint_every else (0, 0.0)

    @property
    def stages(self) -> int:
        """Stages of the pipeline over all its ranks; 1 without one."""
        return self.mesh.pp * SCHEDULES[self.schedule] if self.mesh.pp > 1 else 1

    @property
    def slices_per_rank(self) -> int:
        """Microbatches that a rank runs in a full step."""
        if self.mesh.pp == 1:
            return self.accumulate
        if self.microbatches is not None:
            return self.accumulate * self.microbatches
        return self.accumulate * default_microbatches(self.mesh.pp, self.batch_size // self._shares)

    @property
    def _shares(self) -> int:
        """Into how many parts a batch is cut before pipelines cut theirs into microbatches."""
        return self.mesh.data * self.accumulate

    @property
    def slices(self) -> int:
        """Number of slices of a full global batch: each is one forward and backward with its own random numbers."""
        return self.reproducible or self.mesh.data * self.slices_per_rank

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return asdict(self)


OPTIONS: dict[str, Option] = options_of(Plan)
"""The options of a plan by field name, in the order of help texts."""
