"""What becomes of orders that come after a run's last step: one outcome each, told in the run's notes."""

from __future__ import annotations

from nbdist.cluster.runs.run import Run
from nbdist.core.control.commands import Command

__all__ = ["late_command_text"]


def late_command_text(command: Command, run: Run, engines: int, refusal: str = "") -> str:
    """What has become of an order that no step has heard, in a sentence.

    Args:
        command: Which.
        run: That has ended.
        engines: How many there are now.
        refusal: Why others that were asked for could not be had.
    """
    step = run.progress.step
    if command.kind == "stop" and run.abandoned and run.state == "stopped":
        return f"stopped at once after step {step:,}"
    asked = {"lr": f"learning rate {command.value}", "checkpoint": f"checkpoint in {command.value}",
             "scale": f"scale to {command.value}"}.get(command.kind, command.kind)  # fmt: skip
    outcome = "not carried out"
    if command.kind == "stop":
        outcome = f"the run {'had failed' if run.state == 'failed' else 'was over'}"
    elif command.kind == "scale" and command.value == engines:
        outcome = f"there are {engines} engines"
    elif command.kind == "scale" and refusal:
        outcome += f" ({refusal.rstrip('.')})"
    return f"{asked} came after step {step:,}, the last one: {outcome}"
