"""The record is documented: telemetry/README.md names every kind of event and every field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from nbdist import telemetry
from nbdist.telemetry.events import Event

TEXT = (Path(telemetry.__file__).parent / "README.md").read_text()


def documented():
    """Fields by kind, as the table has them."""
    kinds: dict[str, set[str]] = {}
    for kind, fields in re.findall(r"^\| (?:`(\w+)`)? ?\| ([^|]*?) ?\|", TEXT, re.MULTILINE):
        if kind:
            kinds[kind] = set()
        if kinds:
            kinds[[*kinds][-1]].update(re.findall(r"`(\w+)`", fields))
    return kinds


def test_every_event_is_documented():
    """With its fields, except those that all share."""
    shared = {field.name for field in dataclasses.fields(Event)}
    kinds = {kind.__name__: {f.name for f in dataclasses.fields(kind)} - shared for kind in Event.__subclasses__()}
    assert kinds == documented()


def test_what_all_share_is_documented():
    """In a sentence."""
    for name in ("event", *(field.name for field in dataclasses.fields(Event))):
        assert f"`{name}`" in TEXT
