"""Several modules as one, whose forward is the training step: the rest of nbdist sees one model and its one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nbdist.core.task.check_model import check_model
from nbdist.core.task.lightning_module import training_step
from nbdist.core.task.own_loop import calls_parts_only
from nbdist.errors import TaskError

__all__ = ["Modules", "OneModule", "as_one", "call_step", "with_averages"]


class Modules(nn.Module):
    """Several modules under one root.

    A mesh is applied to a model and its one call in a step. A step over several modules may call each of them any
    number of times, so here that call is the whole step, from the batch to the loss.

    Args:
        given: The modules: a dict, or a list or tuple, where a module's name is its index.
        step: ``step(given, batch)``, see `Step`.

    Attributes:
        given: The same.
        step: The same.

    Raises:
        TaskError: A name cannot be an attribute's.
    """

    def __init__(self, given: Mapping[str, nn.Module] | Sequence[nn.Module], step: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.given = given
        self.step = step
        for name, module in given.items() if isinstance(given, Mapping) else enumerate(given):
            if str(name) in self._modules:
                raise TaskError(f"two modules are called {name}: give each a name of its own.")
            try:
                self.add_module(str(name), module)
            except KeyError:
                raise TaskError(f"a module cannot be called {name!r}: choose a word that torch does not use.") from None

    def forward(self, batch: Any) -> Any:
        """Run the step; returns the loss, or loss and weight."""
        return self.step(self.given, batch)

    no_output = "a metric is measured on the output of one model, and here are several: omit it."
    """Why it has no output that a metric could be measured on."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules by name; the name of an only one is empty."""
        return dict(self.named_children())


class OneModule(Modules):
    """Another root over the parts of one module, of which the step calls the parts: its call is the whole step.

    Both have the same submodules, parameters and buffers, by the same names.

    Args:
        given: The module.
        step: See `Modules`.
    """

    def __init__(self, given: nn.Module, step: Callable[[Any, Any], Any]) -> None:
        nn.Module.__init__(self)
        self.given: Any
        shared = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
        own = {name: vars(given)[name] for name in shared}
        vars(self).update(own, given=given, step=step, training=given.training)  # not as a submodule

    no_output = (
        "a metric needs the model's output, but the step never called model(...), only parts of it: give evaluate=... "
        "(--evaluate)."
    )

    def train(self, mode: bool = True) -> OneModule:
        """Put the module into a mode too."""
        self.given.training = mode
        super().train(mode)
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """See `Modules`."""
        return {"": self.given}


def as_one(model: Any, step: Any, name: str) -> tuple[Any, Any]:
    """One module, and its step, of what the user gave: of a dict, list or tuple of several, `Modules`. Local.

    A module of which the step calls the parts, and never itself, becomes `OneModule`.

    Args:
        model: The module, or several.
        step: The step, or None.
        name: The user's name for `model`.

    Raises:
        TaskError: One of several is no module, or there is no step.
    """
    own = model.training_step if step is training_step else step
    if isinstance(model, nn.Module) and callable(step) and calls_parts_only(own, model):
        return OneModule(model, step), call_step
    if not isinstance(model, (Mapping, list, tuple)):
        return model, step
    items = dict(model.items() if isinstance(model, Mapping) else enumerate(model))
    if not any(isinstance(module, nn.Module) for module in items.values()):
        return model, step
    for key, module in items.items():
        check_model(module, f"{name}[{key!r}]", trained=False)
    if not callable(step):
        names = ", ".join(map(str, items))
        raise TaskError(
            f"{name} is several modules ({names}), and how they make one loss is not known: write the step (a "
            "%%dist_train cell's body, or step=...), which gets them as they are."
        )
    return Modules(model, step), call_step


def with_averages(model: nn.Module, averages: Mapping[str, torch.Tensor]) -> Any:
    """The state_dict of a model, with the averages of its parameters in their place. Local.

    Args:
        model: The model.
        averages: By the parameter's name in it.

    Returns:
        A state_dict; of `Modules` a dict, list or tuple of them, as the modules were given. Buffers are copies, and
        parameters without an average the model's own.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers = {id(buffer) for buffer in model.buffers()}

    def value_of(value: Any) -> Any:
        if names.get(id(value)) in averages:
            return averages[names[id(value)]]
        if id(value) in buffers:
            return value.detach().clone()
        return value.detach() if isinstance(value, torch.Tensor) else value

    def state_of(module: nn.Module) -> dict[str, Any]:
        return {key: value_of(value) for key, value in module.state_dict(keep_vars=True).items()}

    given = model.given if isinstance(model, Modules) else model
    if isinstance(given, nn.Module):
        return state_of(given)
    if isinstance(given, Mapping):
        return {name: state_of(module) for name, module in given.items()}
    states = [state_of(module) for module in given]
    return tuple(states) if isinstance(given, tuple) else states


def call_step(model: nn.Module, batch: Any) -> Any:
    """The `Step` of a task whose model is `Modules`."""
    return model(batch)
