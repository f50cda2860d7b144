"""The words are law: neither the package nor its tests use words that the glossary has replaced."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import nbdist

ROOT = Path(nbdist.__file__).parent
PARTS = {
    "parcel": "payload", "outbox": "segment cache", "vault": "snapshot store", "keeper": "snapshotter",
    "steering": "step control", "obey": "apply", "told": "state_dict, reported", "said": "flags, reported",
    "heard": "received, agreed", "go_on": "load_state_dict, resume", "relay": "monitor", "orders": "commands",
    "stand_in": "dummy", "speaks": "reports_loss", "bring_home": "load_result",
    "come_back": "restore_shards", "brood": "child processes", "echo": "secondary",
}  # fmt: skip
"""Words of the private language that this package once had: no identifier contains one."""
PROSE = {
    r"parcels?": "payload",
    r"vaults?": "snapshot store",
    r"stand-ins?": "dummy",
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
"""Its phrases: no docstring, comment or message contains one."""
ALLOWED = {
    ("core/comm/shared_memory", "chunk"): "as much of one collective as its arena holds",
    ("core/params/param_data_watch", "callback"): "a function that is called back",
    ("cluster/hosts/agents", "callback"): "the method that zmq.auth calls",
    ("cluster/hosts/ssh", "config"): "the word of traitlets",
    ("cluster/launch/launcher", "config"): "the word of traitlets",
    ("core/check/per_sample", "dim"): "of a tensor",
    ("core/params", "dim"): "of a tensor",
    ("core/strategies/tensor", "dim"): "of a tensor",
    ("core/sync/sync_batchnorm", "dim"): "of a tensor",
    ("core/comm", "lock"): "of a thread",
    ("cluster/hosts", "job"): "of Slurm",
    ("cluster/hosts", "node"): "of a job of Slurm",
    ("cluster/engines/end_notice", "lock"): "of a thread",
    ("cluster/hosts", "lock"): "of a thread",
    ("cluster/engines/host_payloads", "lock"): "of a thread",
    ("cluster/launch", "lock"): "of a thread",
    ("demo", "lock"): "of a thread",
    ("notebook/dashboard", "lock"): "of a thread",
    ("store_server", "lock"): "of a thread",
    ("telemetry/record", "lock"): "of the file system",
    ("cluster/hosts", "log"): "what a process writes to its standard streams",
    ("cluster/launch", "log"): "what a process writes to its standard streams",
    ("core/control/step_control", "log"): "of commands",
    ("core/check", "log"): "of a step: the numbers that it names beside its loss",
    ("core/evaluation", "log"): "of a step: the numbers that it names beside its loss",
    ("core/state/train_progress", "log"): "of a step: the numbers that it names beside its loss",
    ("core/sync", "log"): "of a step: the numbers that it names beside its loss",
    ("core/task", "log"): "of a step: the numbers that it names beside its loss",
    ("core/train", "log"): "of a step: the numbers that it names beside its loss",
    ("notebook/step_cell", "log"): "of a step: the numbers that it names beside its loss",
    ("core/params/training_mode", "mode"): "train() or eval()",
    ("core/task/modules", "mode"): "train() or eval()",
    ("core/strategies", "mode"): "train() or eval()",
    ("core/task/loss_weight", "node"): "of autograd's graph",
    ("notebook/cell_slice", "node"): "of Python's syntax tree",
    ("notebook/export", "node"): "of Python's syntax tree",
    ("notebook/step_cell", "node"): "of Python's syntax tree",
    ("core/strategies", "node"): "of torch.fx's or autograd's graph, or of the reduction tree",
    ("core/sync", "node"): "of the reduction tree",
    ("core/comm/reduction_order", "node"): "of the reduction tree",
    ("core/data", "order"): "of samples",
    ("notebook", "position"): "of the cursor, of a tag",
    ("core/strategies/pipeline/partition", "position"): "in a graph",
    ("core/data/reader", "position"): "in the sequence of samples",
    ("core/state", "position"): "a key in the files of checkpoints",
    ("core/strategies/pipeline/schedules", "round"): "of an interleaved schedule",
    ("core", "scheduler"): "of a learning rate",
    ("engine/stack_dump", "signal"): "of the operating system",
    ("cluster/engines/engines", "signal"): "of the operating system",
    ("core/transfer/rebuild", "slot"): "Python's __slots__",
    ("core/params/placeholder", "slot"): "Python's __slots__",
    ("core/transfer", "lock"): "of a thread",
    ("upstream/cloudpickle_private", "slot"): "Python's __slots__",
    ("notebook/output", "trace"): "a traceback",
    ("core/optim/optimizer_attributes", "trace"): "of what a step writes",
    ("core/strategies", "trace"): "a forward recorded by torch.fx or autograd",
    ("core/data", "worker"): "a process that loads data",
    ("engine/failure", "worker"): "a process that loads data",
}
"""Where a word that the glossary rules out means something else: (file or folder, word) -> what."""


def ruled_out():
    """The glossary's column of words that are not used, each with the one that is."""
    text = (ROOT / "README.md").read_text()
    glossary = text[text.index("## Glossary") : text.index("## Old and new names")]
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([^|]*?) ?\|$", glossary, re.MULTILINE)
    words = {word.strip(): use for use, others in rows for word in re.sub(r"\(.*?\)", "", others).split(",")}
    return {word: use for word, use in words.items() if word.isidentifier() and word not in ("not", "kernel")}


RULED_OUT = ruled_out()


def modules():
    return sorted(ROOT.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT).with_suffix(""))


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


def parts_of(name):
    """What an identifier consists of, such as ``go_on``, ``go`` and ``on``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    return {"_".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def word_of(name):
    """The one word that an identifier is, without a plural's s, if the glossary rules it out; else None."""
    word = name.strip("_").lower()
    return next((w for w in (word, word.removesuffix("s")) if w in RULED_OUT), None)


def exceptions(file, word):
    """What allows a word in a file."""
    return {(place, w) for place, w in ALLOWED if w == word and (file == place or file.startswith(f"{place}/"))}


def found(source, file):
    """What is wrong in a module, a sentence each."""
    yield from old_words(source, file)
    for line, name in identifiers(source):
        if (word := word_of(name)) and not exceptions(file, word):
            yield f"{file}:{line} calls something {name}: say {RULED_OUT[word]}, or allow it with the reason"


def old_words(source, file):
    """Where a module speaks the private language, a sentence each."""
    for line, name in identifiers(source):
        for word in parts_of(name) & set(PARTS):
            yield f"{file}:{line} calls something {name}: say {PARTS[word]}"
    for line, text in prose(source):
        for phrase, instead in PROSE.items():
            for match in re.finditer(rf"(?<![\w-])(?:{phrase})(?![\w-])", text, re.IGNORECASE):
                yield f"{file}:{line + text[: match.start()].count(chr(10))} says {match[0]!r}: say {instead}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_speaks_the_fields_words(path):
    """Its identifiers, docstrings, comments and messages."""
    assert [] == list(found(path.read_text(), name_of(path)))


def test_the_tests_do_not_speak_the_private_language():
    """The glossary's other words are not ruled out there: a test has many a `config`."""
    tests = [path for path in sorted(Path(__file__).parent.rglob("*.py")) if path != Path(__file__)]
    assert [] == [each for path in tests for each in old_words(path.read_text(), path.name)]


def test_each_exception_is_needed():
    """The list does not outlive its reasons."""
    used = set()
    for path in modules():
        for _, name in identifiers(path.read_text()):
            if word := word_of(name):
                used |= exceptions(name_of(path), word)
    assert set(ALLOWED) == used


def test_the_glossary_rules_out_words():
    """It is read as it is written."""
    assert {"parcel": "payload, segment", "relay": "monitor"}.items() <= RULED_OUT.items()
    assert len(RULED_OUT) > 20


def test_the_rule_sees_what_it_forbids():
    """In each kind of name, and in each kind of text."""
    source = 'class OldParcel:\n    """Brought home."""\n\ndef f(told, jobs):\n    self.go_on = 1  # an echo\n'
    assert 6 == len(list(found(source, "x")))
