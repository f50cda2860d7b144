"""The task: model, data, loss or step, optimizer and metric as the user supplies them, checked before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nbdist.core.data.forms import is_flat
from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import Source
from nbdist.core.optim.closures import needs_closure
from nbdist.core.optim.lr_schedulers import Schedulers, scheduler_factories
from nbdist.core.optim.optimizers import is_ready_made, make_optimizers, optimizer_name
from nbdist.core.sync.loss_forms import LossForms
from nbdist.core.sync.step_log import StepLog
from nbdist.core.task.built_model import builds_model, built_model, lies_in_file
from nbdist.core.task.carried_state import CarriedState, carried, check_order
from nbdist.core.task.check_model import check_model
from nbdist.core.task.lightning_module import options_of_module
from nbdist.core.task.loss_graph import LossGraph
from nbdist.core.task.loss_weight import mean_over
from nbdist.core.task.losses import ClassLoss, find_loss, loss_name, reduction_of
from nbdist.core.task.lost_changes import check_each_epoch
from nbdist.core.task.metrics import Evaluate, Metric, called_name, check_evaluate, find_metric, metric_name, target_of
from nbdist.core.task.modules import Modules, as_one
from nbdist.core.task.own_loop import check_step, uses
from nbdist.core.task.step_output import no_scalar, parts_of, weight_of
from nbdist.core.task.step_updates import update
from nbdist.core.task.steps import NO_CLOSURE, NO_EVALUATION, NO_LOSS, ModelLossStep, Step, SupervisedStep, no_pair
from nbdist.errors import PlanError, TaskError
from nbdist.plan.option import check_known
from nbdist.plan.train_options import TRAIN_OPTIONS

__all__ = ["Task"]


UNKNOWN_MEAN = (
    "{loss} is not recognised as a mean (it is a sum, a ratio, or several means over different numbers), so slices "
    "could not be averaged exactly: {cure}."
)
_OF_MODEL = (
    "write the step (a %%dist_train cell's body, or step=...) and assign loss and weight, the number that the mean is "
    "over, as in `weight = (labels != -100).sum()`"
)
_OF_CALLABLE = (
    "return with it the number that the mean is over, as in `return loss, (target != -100).sum()`, or `return loss, "
    "len(target)` for samples; of a sum, give reduction='sum' (--reduction sum); of a ratio (Dice), use nbdist.gather"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Model, data, step, optimizers and metric. It is sent to the engines as one value.

    Args:
        model: The module as the user made it; several are `Modules`, and `step` is then `call_step`.
        data: Training data.
        step: The training step.
        optimizers: Over parameters of `model`, no two over the same, by name; the name of an only one is empty.
        val: Validation data, or None.
        metric: Measured on `val` beside the loss, or None.
        evaluate: Called on `val` in place of the step, or None.
        after_step: Called with the model after each optimizer step, or None.
        each_epoch: Called on rank 0 with the whole model and the row after each epoch, or None.
        updates: Whether the step itself updates parameters, with `nbdist.update`.
        own_optimizers: Whether the user made one of them, so that their state is loaded back into them.
        schedulers: Each makes a torch scheduler from the optimizer of that name; others have none.
        options: The Plan options that follow from the arguments: names, batch size, shuffle.
        forms: Checks that all slices' losses have the same form, if their weights are inferred.
        log: Collects the numbers that the step logs beside its loss.
        carried: What the step carries from batch to batch.
        sums: Whether the step returns the sum over samples, not a mean.
        in_file: Whether the model's weights lie in files, as a callable has built it, see `built_model`.
    """

    model: nn.Module
    data: Source
    step: Step
    optimizers: dict[str, torch.optim.Optimizer]
    val: Source | None
    metric: Metric | None
    evaluate: Evaluate | None = None
    after_step: Callable[[Any], Any] | None = None
    each_epoch: Callable[[Any, Any], Any] | None = None
    updates: bool = False
    own_optimizers: bool
    schedulers: dict[str, Callable[[torch.optim.Optimizer], Any]] = field(default_factory=dict)
    options: dict[str, Any]
    forms: LossForms = field(default_factory=LossForms)
    log: StepLog = field(default_factory=StepLog)
    carried: CarriedState = field(default_factory=CarriedState)
    sums: bool = False
    in_file: bool = False

    def __post_init__(self) -> None:
        """Check what each field by itself cannot show.

        Raises:
            TaskError: Two optimizers hold the same parameter, or a metric has no output of one model.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        owners: dict[int, str] = {}
        for name, optimizer in self.optimizers.items():
            for parameter in (one for group in optimizer.param_groups for one in group["params"]):
                other = owners.setdefault(id(parameter), name)
                if other != name:
                    raise TaskError(
                        f"optimizers {other} and {name} both hold parameter {names[id(parameter)]}: give it to one; a "
                        "loss may update by several, as in nbdist.update(loss, (name, other))."
                    )
        if self.updates and self.val is not None and self.evaluate is None:
            raise TaskError(NO_EVALUATION)
        if self.updates and any(needs_closure(optimizer) for optimizer in self.optimizers.values()):
            raise TaskError(NO_CLOSURE)
        if self.metric is not None and isinstance(self.model, Modules):
            raise TaskError(self.model.no_output)

    @classmethod
    def create(
        cls, model: Any, data: Any, *, loss: Any = None, step: Step | None = None, optimizer: Any = "adamw",
        lr: float | None = None, lr_scheduler: Any = None, val: Any = None, metric: Any = None, evaluate: Any = None,
        after_step: Any = None, each_epoch: Any = None, batch_size: int | None = None, reduction: str | None = None,
        shuffle: bool | None = None, weights: str | None = None, names: tuple[str, str] = ("model", "data"),
    ) -> Task:  # fmt: skip
        """Check the user's arguments and bring them to one form. Local; nothing is changed.

        Args:
            model: An ``nn.Module`` with trainable parameters, or a callable that builds it, see `built_model`; or a
                dict, list or tuple of modules, which the step gets as it is.
            data: See `Source`.
            loss: A name, or a callable ``loss(output, target)``; the step is then ``loss(model(x), y)``.
            step: A callable ``step(model, batch)`` in place of `loss`.
            optimizer: See `make_optimizers`.
            lr: Learning rate.
            lr_scheduler: A callable that makes a torch scheduler from an optimizer, for each; or a dict of them.
            val: Validation data, in the same forms as `data`.
            metric: A name, a callable ``metric(output, target)``, or an object with `update` and `compute`.
            evaluate: See `Evaluate`.
            after_step: A callable ``after_step(model)``.
            each_epoch: A callable ``each_epoch(model, row)``.
            batch_size: Global batch size, if the user gave one.
            reduction: Whether the loss is a "mean" or a "sum", if the user said so.
            shuffle: Whether to shuffle, if the user gave it.
            weights: See `built_model`.
            names: The user's names for `model` and `data`.

        Raises:
            TaskError: An argument cannot be used.
            PlanError: An option contradicts the data's own.
        """
        if built := builds_model(model):
            model = built_model(model, weights, names[0])
        elif weights is not None:
            raise TaskError(f"weights={weights} is for a model that a callable builds, and {names[0]} is a model.")
        updates, carries = (step is not None and uses(step, function) for function in (update, carried))
        model, step = as_one(model, step, names[0])
        check_model(model, names[0])
        source = Source.of(data, names[1], batch_size=batch_size)
        first = source.first()
        own_loss = loss is None and step is None and isinstance(first, (Mapping, type(None)))
        if own_loss:
            step = ModelLossStep()
        elif (loss is None) == (step is None):
            raise TaskError(NO_LOSS if loss is None else "give loss=... or step=..., not both.")
        elif loss is not None:
            reduction = reduction_of(loss, reduction)
            step = SupervisedStep(find_loss(loss, reduction), loss_name(loss))
        elif not callable(step):
            raise TaskError(f"step must be a callable step(model, batch), not {step!r}.")
        else:
            check_step(model.step if isinstance(model, Modules) else step, model, data)
        own_evaluation = "" if evaluate is None else check_evaluate(evaluate, val, metric)
        found_metric = None if metric is None else find_metric(metric)
        after_step_name = called_name("after_step(model)", after_step)
        each_epoch_name = called_name("each_epoch(model, row)", each_epoch)
        if metric is not None and val is None:
            raise TaskError(f"metric {metric_name(metric)} has no data to be measured on: give val=... too.")
        val_source = None if val is None else Source.of(val, "val", batch_size=batch_size)
        if val_source is not None and not carries:  # every validation sample counts, so drop_last is ignored
            val_source = replace(val_source, drop_last=False)
        if loss is not None:
            _check_pairs(source, "loss")
        if metric is not None and val_source is not None and (sample := val_source.first()) is not None:
            target_of(sample, metric_name(metric))
        if batch_size is not None and source.sets_batches:
            raise PlanError(
                f"batch_size={batch_size} is given, but the batches of {names[1]} are made already (each is a global "
                "one): omit it."
            )
        check_order(carries, source, shuffle, names[1])
        source.check_agrees(names[1], "batch_size", batch_size)
        source.check_agrees(names[1], "shuffle", shuffle)
        in_file = built or lies_in_file(model)
        if each_epoch is not None:
            readers = {"the step": getattr(step, "loss", step), "after_step": after_step}
            check_each_epoch(each_epoch_name, each_epoch, readers, model, names[0], in_file=in_file)
        made = make_optimizers(optimizer, model, lr)
        return cls(
            model=model,
            data=source,
            step=step,
            optimizers=made,
            schedulers=scheduler_factories(lr_scheduler, made),
            val=val_source,
            metric=found_metric,
            evaluate=evaluate,
            after_step=after_step,
            each_epoch=each_epoch,
            updates=updates,
            own_optimizers=is_ready_made(optimizer),
            carried=CarriedState(carries),
            sums=reduction == "sum",
            in_file=in_file,
            options={
                "loss": "the model's own" if own_loss else "step" if loss is None else loss_name(loss),
                "lr_scheduler": "" if lr_scheduler is None else _name(lr_scheduler),
                "optimizer": optimizer_name(optimizer),
                "updates": updates,
                "carries": carries,
                "lr": lr,
                "reduction": reduction,
                "metric": "" if metric is None else metric_name(metric),
                "evaluate": own_evaluation,
                "after_step": after_step_name,
                "each_epoch": each_epoch_name,
                "batch_size": source.batch_size if batch_size is None else batch_size,
                "shuffle": source.shuffle if shuffle is None else shuffle,
                "flat_samples": is_flat(first),
            },
        )

    @classmethod
    def of_options(
        cls, model: Any, data: Any, options: Mapping[str, Any], *, names: tuple[str, str] = ("model", "data")
    ) -> tuple[Task, dict[str, Any]]:
        """The task, and the options of its plan. Local; nothing is changed.

        Args:
            model: See `create`.
            data: See `create`.
            options: Of `TRAIN_OPTIONS`; None is as good as not given.
            names: See `create`.

        Raises:
            TaskError: An argument cannot be used.
            PlanError: An option contradicts the data's own, or there is none of that name.
        """
        check_known(options, TRAIN_OPTIONS)
        user = {name: value for name, value in options.items() if value is not None}
        given = options_of_module(model, user) | user
        of_task = {name: given.pop(name) for name in tuple(given) if TRAIN_OPTIONS[name].of_task}
        task = cls.create(model, data, names=names, **of_task)
        for name in ("early_stop", "keep_best"):
            if task.val is None and str(given.get(name, "")).strip().startswith("val_"):
                what = f"{name}={given[name]} is measured on validation data"
                raise PlanError(f"{what}, and there is none: give val=... too.")
        return task, given | task.options

    def begin(self) -> None:
        """A step begins, or an evaluation. Local."""
        self.forms.begin()
        self.log.begin()
        self.carried.begin()

    @property
    def title(self) -> str:
        """The class of each module, and the number of parameters, as text for the user."""
        count = sum(p.numel() for p in self.model.parameters())
        scale, unit = next((s, u) for s, u in ((1_000_000, " M"), (1_000, " k"), (1, "")) if count >= s or s == 1)
        kinds = " + ".join(type(module).__name__ for module in self.modules.values())
        return f"{kinds} ({count / scale:.3g}{unit} parameters)"

    @property
    def given(self) -> Any:
        """The module, or a dict, list or tuple of several, as the user gave it."""
        return self.model.given if isinstance(self.model, Modules) else self.model

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The user's modules by name; the name of an only one is empty."""
        return self.model.parts if isinstance(self.model, Modules) else {"": self.model}

    def named(self, model: str, data: str) -> dict[str, Any]:
        """What the user supplied, by names for errors; `model` and `data` are the user's own. Local."""
        return {
            model: self.given, data: self.data.given, "optimizer": self.optimizers.get("", self.optimizers),
            "lr_scheduler": {k: getattr(make, "scheduler", make) for k, make in self.schedulers.items()},
            "step": self.own_step, "val": self.val and self.val.given, "metric": self.metric,
            "evaluate": self.evaluate, "after_step": self.after_step, "each_epoch": self.each_epoch,
            "the task": self,
        }  # fmt: skip

    @property
    def own_step(self) -> Any:
        """The step as the user gave it."""
        return self.model.step if isinstance(self.model, Modules) else self.step

    def make_schedulers(self, by: str) -> Schedulers:
        """The learning-rate schedulers of the optimizers, stepped after each "step" or "epoch". Local."""
        return Schedulers(self.optimizers, self.schedulers, by)

    @property
    def infers_weight(self) -> bool:
        """Whether the loss's weight is read from its graph: the model or a user's callable computes the loss."""
        if self.sums:
            return False
        if isinstance(self.step, SupervisedStep):
            return self.step.infers_weight
        return isinstance(self.step, ModelLossStep)

    @property
    def weight_is_samples(self) -> bool:
        """Whether a slice's weight is always its number of samples."""
        return self.sums or (
            isinstance(self.step, SupervisedStep) and not (self.infers_weight or isinstance(self.step.loss, ClassLoss))
        )

    def loss_graph(self) -> LossGraph | None:
        """What records the loss's graph, if its weight is read from it and autograd does not record it. Local.

        For where the loss is computed before `loss_and_weight` is called: in the last stage of a pipeline.
        """
        return LossGraph() if self.infers_weight and not torch.is_grad_enabled() else None

    def loss_and_weight(self, batch: Any, part: Slice) -> tuple[torch.Tensor, Any]:
        """Run the step on one slice.

        Args:
            batch: The slice's batch, on the device.
            part: The slice; its targets are on the CPU, and can be counted without waiting for the GPU.

        Returns:
            The loss, a scalar mean, and its weight: a number, or on a GPU a scalar tensor in float64.

        Raises:
            TaskError: The step returned something else.
        """
        graph = LossGraph.active or self.loss_graph()
        own = None if graph is LossGraph.active else graph
        if isinstance(self.step, SupervisedStep):
            returned = self.step(self.model, batch, part, own)
        elif isinstance(self.step, ModelLossStep):
            returned = self.step(self.model, batch, own)
        else:
            returned = self.step(self.model, batch)
        loss, weight, log = parts_of(returned)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TaskError(f"the loss must be a scalar tensor, the mean over a batch, but it is {no_scalar(loss)}.")
        if self.sums:
            if weight is not None:
                raise TaskError("with reduction='sum' the step returns a sum, without a weight: omit one of the two.")
            if 0 < part.samples < part.batch_samples:  # its share of the sum, as a mean that slices average
                loss = loss * (part.batch_samples / part.samples)
        elif weight is None and self.infers_weight:
            mean = mean_over(loss if graph is None else graph.of(loss), part.samples, self._constants)
            if mean is not None:
                weight = mean.over
            if part.of > 1 and part.samples:  # the loss of a batch in one slice is not averaged, so any is right
                if mean is None:
                    raise TaskError(self._unknown_mean)
                self.forms.add(mean, self._unknown_mean)
        weight = weight_of(weight, part.samples)
        if log is not None:
            self.log.add(log, part.index, weight if part.samples else 0)
        return loss if loss.ndim == 0 else loss.reshape(()), weight  # a view would be one more node of the graph

    def _constants(self) -> Iterator[torch.Tensor]:
        """Tensors that do not depend on the batch: the model's, and a callable's attributes, globals and closure."""
        loss = getattr(self.step, "loss", None)
        for module in (self.model, *([loss] if isinstance(loss, nn.Module) else [])):
            yield from module.parameters()
            yield from module.buffers()
        seen = inspect.getclosurevars(loss) if inspect.isfunction(loss) else None
        values = [
            *getattr(loss, "__dict__", {}).values(),
            *({**seen.globals, **seen.nonlocals}.values() if seen else ()),
        ]
        yield from (value for value in values if isinstance(value, torch.Tensor))

    @property
    def _unknown_mean(self) -> str:
        if isinstance(self.step, SupervisedStep):
            return UNKNOWN_MEAN.format(loss=f"loss {loss_name(self.step.loss)}", cure=_OF_CALLABLE)
        return UNKNOWN_MEAN.format(loss=f"the loss that {type(self.model).__name__} computes", cure=_OF_MODEL)


def _name(thing: Any) -> str:
    return thing if isinstance(thing, str) else getattr(thing, "__name__", None) or type(thing).__name__


def _check_pairs(source: Source | None, what: str) -> None:
    first = None if source is None else source.first()
    if first is not None and not (isinstance(first, (tuple, list)) and len(first) >= 2):
        raise TaskError(no_pair(what, first))
