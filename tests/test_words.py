"""The words are law: nothing in the package speaks in words that the glossary has replaced."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import nbdist

ROOT = Path(nbdist.__file__).parent
NAMES = {
    "parcel": "payload",
    "outbox": "segment cache",
    "vault": "rank's snapshots, snapshot store",
    "slot": "snapshot buffer",
    "keeper": "snapshotter",
    "steering": "step control",
    "obey": "apply",
    "told": "state_dict, reported",
    "said": "flags, reported",
    "heard": "received, agreed",
    "go_on": "load_state_dict, resume, continue",
    "relay": "monitor",
    "orders": "commands",
    "stand_in": "dummy",
    "rehearsal": "dry run",
    "speaks": "reports_loss",
    "bring_home": "load_result",
    "come_back": "restore_shards",
    "brood": "child processes",
    "echo": "secondary",
}
"""Words that no identifier may contain, and what to say."""
PROSE = {
    r"parcels?": "payload",
    r"vaults?": "snapshot store",
    r"stand-ins?": "dummy",
    r"rehears\w+": "dry run",
    r"persons?|somebody": "user, caller, another process",
    r"(?:deal|deals|dealt|dealing) out": "shard, partition, distribute",
    r"(?:brings?|brought|comes?|came|come) home|home-coming": "gather, load the result",
    r"steer\w*": "commands",
    r"obeys?|obeyed": "apply",
    r"the relay": "monitor",
    r"hangs? up": "close",
    r"echo(?:es)?": "secondary failure",
    r"(?:lets?|letting) go of": "release",
    r"formed anew": "a new process group",
}
"""Phrases that no docstring, comment or message may contain, and what to say."""
ALLOWED = {
    # (file, word): the reason
}


def modules():
    return sorted(ROOT.rglob("*.py"))


def identifiers(source):
    """Every name that a module gives to something: classes, functions, parameters, variables, attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def prose(source):
    """Every comment and string of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def words_of(name):
    """The words in an identifier, such as ``go_on`` and ``go`` and ``on``."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    return {"_".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}


def found(source, file):
    for line, name in identifiers(source):
        for word in words_of(name) & set(NAMES):
            if (file, word) not in ALLOWED:
                yield f"{file}:{line} calls something {name}: say {NAMES[word]}"
    for line, text in prose(source):
        for phrase, instead in PROSE.items():
            for match in re.finditer(rf"(?<![\w-])(?:{phrase})(?![\w-])", text, re.IGNORECASE):
                if (file, match[0].lower()) not in ALLOWED:
                    yield f"{file}:{line + text[: match.start()].count(chr(10))} says {match[0]!r}: say {instead}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_speaks_the_fields_words(path):
    """Its identifiers, docstrings, comments and messages."""
    assert [] == list(found(path.read_text(), str(path.relative_to(ROOT))))


def test_each_exception_is_needed():
    """What is allowed is used, so that the list does not outlive its reasons."""
    used = set()
    for path in modules():
        file, source = str(path.relative_to(ROOT)), path.read_text()
        used |= {(file, word) for _, name in identifiers(source) for word in words_of(name)}
        used |= {
            (file, match[0].lower())
            for _, text in prose(source)
            for phrase in PROSE
            for match in re.finditer(rf"(?<![\w-])(?:{phrase})(?![\w-])", text, re.IGNORECASE)
        }
    assert set(ALLOWED) <= used


def test_the_rule_sees_what_it_forbids():
    """In each kind of name, and in each kind of text."""
    source = 'class OldParcel:\n    """Brought home."""\n\ndef f(told):\n    self.go_on = 1  # an echo\n'
    assert 5 == len(list(found(source, "x.py")))
