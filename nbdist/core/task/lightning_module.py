"""Modules of Lightning, known by their methods: training_step, configure_optimizers, validation_step, log."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nbdist.core.task.metrics import accumulates
from nbdist.core.task.own_loop import attributes_read
from nbdist.errors import TaskError

__all__ = ["is_lightning_module", "options_of_module", "training_step"]

_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")
_UNCALLED = (
    "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end",
    "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "backward",
    "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping", "configure_model",
    "transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer", "configure_callbacks", "setup",
)  # fmt: skip
"""Methods that Lightning's trainer calls, and nbdist does not."""
_OF_TRAINER = {
    "global_step": "use nbdist.current_step()",
    "current_epoch": "use nbdist.current_step()",
    "trainer": "what it knows is in the options of the run",
    "optimizers": "several optimizers are stepped by nbdist.update in a step of your own",
    "manual_backward": "several losses are trained by nbdist.update in a step of your own",
    "lr_schedulers": "nbdist steps them",
    "all_gather": "use nbdist.gather",
}
"""What Lightning's trainer gives to a module, and what there is in its place."""


def is_lightning_module(model: Any) -> bool:
    """Whether a model says itself how it is trained. Local."""
    methods = ("training_step", "configure_optimizers")
    return isinstance(model, nn.Module) and all(callable(getattr(model, name, None)) for name in methods)


def options_of_module(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a Lightning module sets, where the user has not: step, optimizer, lr_scheduler, evaluate. Local.

    Its `validation_step` evaluates, if there is validation data. What it passes to `log` is the step's log; on
    validation data the names lose a leading ``val_``, which the history adds.

    Args:
        model: What the user gave; others than such modules set none.
        given: The user's options.

    Raises:
        TaskError: It needs something of Lightning's trainer.
    """
    if not is_lightning_module(model):
        return {"checkpoint_frozen": False} if hasattr(model, "peft_config") else {}
    kind = type(model).__name__
    if getattr(model, "automatic_optimization", True) is False:
        raise TaskError(
            f"{kind} optimizes by hand (automatic_optimization=False): write the step, and call nbdist.update(loss, "
            "optimizer) where it steps."
        )
    hooks = [name for name in _UNCALLED if _is_own(model, name)]
    if hooks:
        raise TaskError(
            f"{kind} has {hooks[0]}, which Lightning's trainer calls and nbdist does not: do it in training_step, in "
            "after_step (--after-step) or in each_epoch (--each-epoch), and leave it out of the class."
        )
    evaluates = given.get("val") is not None and _is_own(model, "validation_step")
    for method in ("training_step", *(["validation_step"] if evaluates else [])):
        for name in sorted(attributes_read(model, method) & _OF_TRAINER.keys()):
            if not _is_own(model, name):
                raise TaskError(f"{method} of {kind} uses self.{name}, of Lightning's trainer: {_OF_TRAINER[name]}.")
    options: dict[str, Any] = {}
    if given.get("loss") is None and given.get("step") is None:
        options["step"] = training_step
    if given.get("optimizer") is None:
        options |= _configured(model)
        if given.get("lr_scheduler") is not None:
            options.pop("lr_scheduler", None)
    if evaluates and given.get("evaluate") is None and given.get("metric") is None:
        metrics = {name: module for name, module in model.named_modules() if accumulates(module)}
        options["evaluate"] = functools.partial(validation_step, metrics=metrics)
    return options


def training_step(model: Any, batch: Any) -> Any:
    """The step of such a module: the loss that its `training_step` returns, and what that logs."""
    with _logged(model) as log:
        returned = _called(model.training_step, batch)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    for name, value in log.items():
        if accumulates(value):
            raise TaskError(
                f"training_step logs {name} as an object that accumulates, and a step logs numbers: log what it "
                f"returns for the batch, as in self.log({name!r}, self.{name}(output, y))."
            )
    return (loss, log) if log else loss


def validation_step(model: Any, batch: Any, *, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation of such a module: what its `validation_step` logs.

    Args:
        model: The module.
        batch: A batch.
        metrics: Its submodules with `update` and `compute`, which are found here (`used_objects`).
    """
    del metrics
    with _logged(model) as log:
        returned = _called(model.validation_step, batch)
    if not log and isinstance(returned, torch.Tensor) and returned.numel() == 1:
        return {"loss": returned}
    return {name.removeprefix("val_").removeprefix("val/"): value for name, value in log.items()}


@contextlib.contextmanager
def _logged(model: Any) -> Iterator[dict[str, Any]]:
    """Context in which what the module logs is collected."""
    log: dict[str, Any] = {}

    def note(name: str, value: Any, *_: Any, **__: Any) -> None:
        log[name] = value

    def note_all(values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        log.update(values)

    before = {name: vars(model)[name] for name in ("log", "log_dict") if name in vars(model)}
    vars(model).update(log=note, log_dict=note_all)  # not `setattr`, which a module looks at
    try:
        yield log
    finally:
        for name in ("log", "log_dict"):
            del vars(model)[name]
        vars(model).update(before)


def _called(method: Callable[..., Any], batch: Any) -> Any:
    """A step method called with the batch, and the number of the batch if it takes one."""
    return method(batch, 0) if len(inspect.signature(method).parameters) > 1 else method(batch)


def _configured(model: Any) -> dict[str, Any]:
    """Optimizer and scheduler, of what `configure_optimizers` returns in one of its forms."""
    made: Any = model.configure_optimizers()
    kind = type(model).__name__
    schedulers: Any = None
    made = made[0] if isinstance(made, (list, tuple)) and len(made) == 1 else made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list):
        made, schedulers = made
        schedulers = schedulers[0] if len(schedulers) == 1 else schedulers or None
    elif isinstance(made, Mapping):
        made, schedulers = made.get("optimizer"), made.get("lr_scheduler")
    made = made[0] if isinstance(made, (list, tuple)) and len(made) == 1 else made
    if not isinstance(made, torch.optim.Optimizer):
        what = (
            f"{len(made)} optimizers" if isinstance(made, (list, tuple)) else f"a value of type {type(made).__name__}"
        )
        raise TaskError(
            f"configure_optimizers of {kind} gives {what}: for one loss give one, with its scheduler; several are "
            "stepped by nbdist.update in a step of your own."
        )
    if schedulers is None:
        return {"optimizer": made}
    how: Mapping[str, Any] = schedulers if isinstance(schedulers, Mapping) else {"scheduler": schedulers}
    if how.get("monitor") not in (None, "loss", "train_loss", "val_loss"):
        raise TaskError(
            f"the scheduler of {kind} monitors {how['monitor']}, and nbdist gives it val_loss, or loss without "
            "validation data: let it monitor one of these."
        )
    if how.get("frequency", 1) != 1:
        raise TaskError(f"the scheduler of {kind} is stepped each {how['frequency']} {how.get('interval', 'epoch')}s: "
                        "nbdist steps it each time; give one that counts by itself.")  # fmt: skip
    return {
        "optimizer": made, "lr_scheduler": how["scheduler"], "schedule_by": how.get("interval", "epoch"),
    }  # fmt: skip


def _is_own(model: Any, name: str) -> bool:
    """Whether a class of the user defines a method, and not Lightning or torch."""
    owner = next((kind for kind in type(model).__mro__ if name in vars(kind)), None)
    return owner is not None and owner.__module__.partition(".")[0] not in (*_PACKAGES, "torch")
