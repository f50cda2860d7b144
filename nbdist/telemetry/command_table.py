"""The commands that a user can give a run: one table for magics, panel, Run and record.

Their effect on the ranks is in `core/control/step_control.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMMANDS", "CommandKind"]


@dataclass(frozen=True, kw_only=True)
class CommandKind:
    """One command.

    Args:
        usage: How it is written after ``%dist_run``; empty if it is not given there.
        method: Of a `Run`, which gives it.
        value: What it takes, such as "RATE"; empty if nothing.
        value_help: What that is, in a few words.
        optional: Whether it may come without its value.
        read: How a magic reads the value in the notebook, see `Option.read`.
        applied: What has happened once all ranks have applied it, with its ``{value}``.
        asked: What was asked for, with its ``{value}``.
        label: Of the panel's button; empty without one.
        title: Of the same.
    """

    usage: str = ""
    method: str
    value: str = ""
    value_help: str = ""
    optional: bool = False
    read: str = "text"
    applied: str
    asked: str
    label: str = ""
    title: str = ""

    def applied_text(self, value: float | str | None) -> str:
        """What has happened."""
        return self.applied.format(value=f"{value:.4g}" if isinstance(value, float) else value)

    def asked_text(self, value: float | str | None) -> str:
        """What was asked for."""
        return self.asked.format(value=value)


COMMANDS: dict[str, CommandKind] = {
    "pause": CommandKind(
        usage="pause", method="pause", applied="paused", asked="pause", label="Pause",
        title="Pause all ranks after this step",
    ),
    "resume": CommandKind(
        usage="resume", method="resume", applied="resumed", asked="resume", label="Resume", title="Resume all ranks",
    ),
    "checkpoint": CommandKind(
        usage="checkpoint [DIR]", method="checkpoint", value="DIR", value_help="where the checkpoint goes",
        optional=True, read="path",
        applied="checkpoint requested", asked="checkpoint in {value}", label="Checkpoint",
        title="Write the state after this step to disk",
    ),
    "stop": CommandKind(
        usage="stop (and load the weights)", method="stop", applied="stopped", asked="stop", label="Stop",
        title="Stop all ranks after this step and load the weights into the model",
    ),
    "lr": CommandKind(
        usage="lr RATE", method="set_lr", value="RATE", value_help="the learning rate", read="value",
        applied="learning rate {value}",
        asked="learning rate {value}",
    ),
    "scale": CommandKind(method="scale", value="N", applied="scaled to {value}", asked="scale to {value}"),
}  # fmt: skip
"""By the name under which it is sent and recorded."""
