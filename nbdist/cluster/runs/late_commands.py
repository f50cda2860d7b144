"""Late commands: those given after a run's last step. Each has one outcome, in the run's notes."""

from __future__ import annotations

from nbdist.cluster.runs.run_control import RunControl
from nbdist.core.control.commands import Command
from nbdist.telemetry.command_table import COMMANDS

__all__ = ["late_command_text"]


def late_command_text(command: Command, control: RunControl, engines: int, scale_error: str = "") -> str:
    """The outcome of a command that no step applied, in a sentence.

    Args:
        command: The command.
        control: The ended run.
        engines: The number of engines now.
        scale_error: Why a scale failed; empty if none did.
    """
    step, state = control.progress.step, control.progress.state
    if command.kind == "stop" and control.abandoned and state == "stopped":
        return f"stopped at once after step {step:,}"
    asked = COMMANDS[command.kind].asked_text(command.value)
    outcome = "not carried out"
    if command.kind == "stop":
        outcome = f"the run {'had failed' if state == 'failed' else 'was over'}"
    elif command.kind == "scale" and command.value == engines:
        outcome = f"there are {engines} engines"
    elif command.kind == "scale" and scale_error:
        outcome += f" ({scale_error.rstrip('.')})"
    return f"{asked} came after step {step:,}, the last one: {outcome}"
