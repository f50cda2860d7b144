"""What becomes of orders that come after a run's last step: one outcome each, told in the run's notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdist.cluster.run import Run

if TYPE_CHECKING:
    from nbdist.core.orders import Order

__all__ = ["outcome_of"]


def outcome_of(order: Order, run: Run, engines: int) -> str:
    """What has become of an order that no step has heard, in a sentence.

    Args:
        order: Which.
        run: That has ended.
        engines: How many there are now.
    """
    step = run.progress.step
    if order.kind == "stop" and run.abandoned and run.state == "stopped":
        return f"stopped at once after step {step:,}"
    asked = {"lr": f"learning rate {order.value}", "checkpoint": f"checkpoint in {order.value}",
             "scale": f"scale to {order.value}"}.get(order.kind, order.kind)  # fmt: skip
    outcome = "not carried out"
    if order.kind == "stop":
        outcome = f"the run {'had failed' if run.state == 'failed' else 'was over'}"
    elif order.kind == "scale" and order.value == engines:
        outcome = f"there are {engines} engines since its end"
    return f"{asked} came after step {step:,}, the last one: {outcome}"
