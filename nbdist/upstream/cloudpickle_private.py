"""What nbdist uses of cloudpickle that it does not document: how classes are sent by value, here without a loss.

cloudpickle makes a class anew with each value, runs a user's ``__init_subclass__`` and metaclass again, and forgets
slots, the attributes and aliases of enum members, and in which function a class is. Where cloudpickle has changed, its
own way is used.

`tests/upstream/test_cloudpickle_private.py` shows what arrives, and fails for a version not in `VERIFIED`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from cloudpickle import cloudpickle

__all__ = ["VERIFIED", "class_of_mark", "is_class_by_value", "reduced_class"]

VERIFIED = ("2.2.0", "3.1.2")
"""The oldest version, which was read, and the newest, which was tested."""

_by_class: Any = getattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", None)
_by_mark: Any = getattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", None)
_set_state: Callable[..., Any] | None = getattr(cloudpickle, "_class_setstate", None)
_OF_MEMBERS = {"_value_", "_name_", "__objclass__", "_sort_order_"}  # set where an enum is made
_FORM = (6, 7)  # how many arguments cloudpickle gives to what makes a class, and an enum


def is_class_by_value(reduced: Any) -> bool:
    """Whether cloudpickle's reduction of something is that of a class by value, in the form that is known here."""
    if not (isinstance(reduced, tuple) and len(reduced) == 6 and _set_state is not None and reduced[5] is _set_state):
        return False
    return _by_class is not None and _by_mark is not None and len(reduced[1]) in _FORM


def reduced_class(kind: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """The reduction of a class, from cloudpickle's own. Local."""
    arguments, (attributes, rest) = reduced[1], reduced[2]
    if issubclass(kind, Enum):
        bases, name, qualname, _, module, mark, extra = arguments
        names = {member_name: member.value for member_name, member in kind.__members__.items()}
        own = {
            member.name: {key: value for key, value in vars(member).items() if key not in _OF_MEMBERS}
            for member in kind.__members__.values()
        }
        attributes = {key: value for key, value in attributes.items() if key not in names}
        arguments = (reduced[0], bases, name, qualname, names, module, mark, extra)
        return _make_enum, arguments, ((attributes, rest), own), None, None, _set_enum
    metaclass, name, bases, namespace, mark, _ = arguments
    namespace = {**namespace, "__qualname__": kind.__qualname__}
    slots = vars(kind).get("__slots__")
    if slots:  # those of a named tuple are empty, and not to be given
        namespace["__slots__"] = slots if isinstance(slots, str) else tuple(slots)
        attributes = {
            key: value
            for key, value in attributes.items()
            if not (key == "__slots__" or isinstance(value, types.MemberDescriptorType))
        }
    return _make_class, (metaclass, name, bases, namespace, mark), (attributes, rest), None, None, _set_state


def class_of_mark(mark: str) -> type | None:
    """The class of this process that has a mark, see `class_mark`."""
    found: type | None = None if _by_mark is None else _by_mark.get(mark)
    return found


# Functions that unpickling calls at the receiver.


def _make_class(metaclass: Any, name: str, bases: tuple[Any, ...], namespace: dict[str, Any], mark: str) -> type:
    known = class_of_mark(mark)
    if known is not None:
        return known
    resolved = types.resolve_bases(bases)
    if resolved is not bases:
        namespace = {**namespace, "__orig_bases__": bases}
    with _registered_before(resolved):
        # What a metaclass of the user's has done is in the attributes that follow.
        maker: Any = next(each for each in metaclass.__mro__ if each not in _by_class)
        made: type = maker.__new__(metaclass, name, resolved, dict(namespace))
        maker.__init__(made, name, resolved, dict(namespace))
    _by_class[made], _by_mark[mark] = mark, made
    return made


@contextlib.contextmanager
def _registered_before(bases: tuple[Any, ...]) -> Iterator[None]:
    """A context in which ``__init_subclass__`` of classes by value does nothing: its effects are sent too."""
    own = {
        kind: vars(kind)["__init_subclass__"]
        for base in bases
        for kind in base.__mro__
        if kind in _by_class and "__init_subclass__" in vars(kind)
    }
    try:
        for kind in own:
            kind.__init_subclass__ = classmethod(_passing(kind))
        yield
    finally:
        for kind, before in own.items():
            kind.__init_subclass__ = before


def _passing(kind: Any) -> Callable[[type], None]:
    def pass_on(subclass: Any) -> None:
        super(kind, subclass).__init_subclass__()

    return pass_on


def _make_enum(make: Callable[..., type], *arguments: Any) -> type:
    return class_of_mark(arguments[5]) or make(*arguments)


def _set_enum(kind: type[Enum], state: tuple[Any, dict[str, dict[str, Any]]]) -> None:
    attributes, members = state
    assert _set_state is not None
    _set_state(kind, attributes)
    for name, own in members.items():
        vars(kind.__members__[name]).update(own)
