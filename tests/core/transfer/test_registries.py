"""What a library has entered into a registry when a model was made is in the registry of the other process."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import registering
import torch
from torch import nn

from nbdist.core.transfer.payload import pack
from nbdist.core.transfer.registries import _complete

_RECEIVER = """
import pickle, sys
import torch
from nbdist.core.transfer.payload import unpack
import registering
answers = []
for payload in pickle.load(sys.stdin.buffer):
    model = unpack(payload)
    answers.append((
        model(torch.ones(1, 2)).tolist(),
        registering.LAYERS == {layer.name: layer for layer in model},
        [*registering.ORDER] == [*model], {*registering.ALIVE} == {*model}, registering.WORDS, registering.FACTORS,
        all(registering.Layer.scales[layer.name] is layer.line.weight for layer in model),
    ))
pickle.dump(answers, sys.stdout.buffer)
"""


@pytest.fixture(autouse=True)
def emptied():
    """The registries are empty before and after."""
    held = (registering.LAYERS, registering.ORDER, registering.ALIVE, registering.Layer.scales)
    for each in held:
        each.clear()
    yield
    for each in held:
        each.clear()


def there(models):
    packed = [pack(model, registries=True) for model in models]
    code = f"import sys; sys.path.insert(0, {str(Path(registering.__file__).parent)!r})\n{_RECEIVER}"
    payloads = pickle.dumps([payload for payload, _ in packed])
    answer = subprocess.run([sys.executable, "-c", code], input=payloads, stdout=subprocess.PIPE, check=True)
    for _, segment in packed:
        segment.close()
    return pickle.loads(answer.stdout)


def test_a_registry_has_what_was_made():
    """A second model sent takes the place of the first, as here."""
    model = nn.Sequential(registering.Layer("a"), registering.Layer("b"))
    factors = {"of another": 3.0, "<class 'registering.Layer'>": 0.5}
    expected = model(torch.ones(1, 2)).tolist(), True, True, True, {"a": "word"}, factors, True
    assert [expected, expected] == there([model, model])


def test_a_registry_that_cannot_be_sent_stays_as_it_is():
    """It may be a cache of anything; the model is sent."""
    layer = registering.Layer("a")
    held = threading.Lock()
    with held:
        registering.LAYERS["lock"] = held
        payload, segment = pack(layer, registries=True)
    segment.close()
    assert payload.nbytes


def test_a_registry_of_others_is_not_sent():
    """A model of which nothing is in it costs nothing."""
    registering.Layer("a")
    small, segment = pack(registering.Layer.forward, registries=True)
    segment.close()
    registering.ORDER.append(nn.Parameter(torch.zeros(10_000)))
    again, segment = pack(registering.Layer.forward, registries=True)
    segment.close()
    assert small.nbytes == again.nbytes


def test_what_the_notebook_keeps_under_a_class_stays_there(monkeypatch):
    """It is no registry of a library: the notebook's own variables are sent where they are used."""
    kind = type("InNotebook", (nn.Linear,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "InNotebook", kind, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "results", {"InNotebook": torch.zeros(10_000)}, raising=False)
    payload, segment = pack(kind(2, 2), registries=True)
    segment.close()
    assert payload.nbytes < 10_000


def test_a_registry_of_a_module_that_is_not_here_is_left_out():
    """As one that was made while the other process ran."""
    assert None is _complete("no_such_module", "", "names", {"a": 1})
