"""Transforms of torch.func (vmap, grad, jvp): inside of them tensors are wrappers, which cannot go to another rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nbdist.errors import PlanError
from nbdist.upstream.torch_private import in_func_transform

__all__ = ["check_no_transform", "transforms_refused"]

_REFUSED = (
    "the step, or the model's forward, computes inside a transform of torch.func (vmap, grad, jacrev, jvp, ...), whose "
    "tensors cannot go to other ranks, as a mesh with pp, tp or shard needs: use the strategy data, or "
    "torch.autograd.grad in place of the transform."
)
_NO_HOOKS = "support saved tensor hooks"  # torch's words where a transform begins, while autograd saves references


def check_no_transform() -> None:
    """Check that no transform is active where ranks compute together. Local.

    Raises:
        PlanError: One is.
    """
    if in_func_transform():
        raise PlanError(_REFUSED)


@contextlib.contextmanager
def transforms_refused() -> Iterator[None]:
    """Context for the user's step, in which torch may refuse a transform by itself. Local.

    Raises:
        PlanError: It does.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_HOOKS not in str(error):
            raise
        raise PlanError(_REFUSED) from error
