"""A property: what reaches another process is what was sent, in every attribute, hook, type and reference.

Odd objects, one by one and put together at random, are walked here and in a process that has seen none of them.
"""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import notebook_objects
import pytest
import torch
from object_walk import difference, walk
from torch import nn

from nbdist.core.transfer.payload import pack
from nbdist.errors import TaskError

_HERE = Path(notebook_objects.__file__).parent
_RECEIVER = """
import pickle, sys, traceback
import object_walk
from nbdist.core.transfer.payload import unpack
while True:
    try:
        payload = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        answer = object_walk.walk(unpack(payload))
    except BaseException:
        answer = traceback.format_exc()
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # that this or that is old


@pytest.fixture(scope="module")
def notebook():
    """The names of a notebook that has run the cells."""
    names: dict[str, Any] = {"__name__": "__main__", "BY_PATH": str(_HERE / "loaded_by_path.py")}
    before = dict(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(Path(notebook_objects.__file__).read_text(), "<cell>", "exec"), names)
    yield names
    for name in sys.modules.keys() - before.keys():
        if name.startswith("loaded_") or name == "json.tool":
            del sys.modules[name]


@pytest.fixture(scope="module")
def there():
    """Sends a value to another process; returns its walk there."""
    code = f"import sys; sys.path.insert(0, {str(_HERE)!r})\n{_RECEIVER}"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(value: Any) -> Any:
        payload, segment = pack(value, registries=True)
        pickle.dump(payload, child.stdin)
        child.stdin.flush()
        answer = pickle.load(child.stdout)
        segment.close()
        assert not isinstance(answer, str), answer
        return answer

    yield send
    child.stdin.close()
    child.stdout.close()
    child.wait()


def check(value, there):
    before = walk(value)
    assert "" == difference(before, there(value))
    assert "" == difference(before, walk(value))  # sending changes nothing here
    assert "" == difference(before, there(value))  # nor does what came before change anything there


@pytest.mark.parametrize("name", notebook_objects.SENT)
def test_it_arrives_as_it_was(notebook, there, name):
    """Also a second time, when the other process knows the classes."""
    check(notebook["SENT"][name](), there)


@pytest.mark.parametrize("seed", range(8))
def test_model_optimizer_data_and_loss_arrive_as_they_were(notebook, there, seed):
    """With odd objects in any place, which may be the same one in several."""
    choose = random.Random(seed)
    odd = [notebook["SENT"][name]() for name in choose.choices([*notebook["SENT"]], k=6)]
    model = nn.Sequential(notebook["Net"](), nn.ModuleList([notebook["Net"](), nn.Linear(2, 2)]))
    optimizer = torch.optim.AdamW(model.parameters())
    loss, data = nn.CrossEntropyLoss(), torch.utils.data.TensorDataset(torch.ones(4, 2))
    holders = [*model.modules(), *model.parameters(), optimizer, loss, data]
    for number in range(12):
        setattr(choose.choice(holders), f"odd{number}", choose.choice([*odd, *holders[:3], optimizer]))
    check({"model": model, "optimizer": optimizer, "loss": loss, "data": data}, there)


@pytest.mark.parametrize("name", notebook_objects.REFUSED)
def test_what_cannot_travel_is_refused_with_its_path(notebook, name):
    """Wherever it is: in an attribute, a container, a function's variable."""
    make, what = notebook["REFUSED"][name]
    culprit = make()
    model = nn.Sequential(notebook["Net"](logger=culprit))
    with pytest.raises(TaskError) as error:
        pack((None, model), names={"net": model})
    assert str(error.value).startswith(f"net.0.logger is {what}")
    assert ", which cannot be sent to another process: " in str(error.value)
    if hasattr(culprit, "close"):
        culprit.close()


PLACES = {
    "rows.files[1]['x']": lambda culprit, names: names["Net"](files=[1, {"x": culprit}]),
    "rows.line.weight.note": lambda culprit, names: noted(names["Net"](), culprit),
    "rows.call, culprit in closure": lambda culprit, names: names["Net"](call=closed_over(culprit)),
    "rows.pair.y": lambda culprit, names: names["Net"](pair=names["Pair"](1, culprit)),
    "rows.slotted.open": lambda culprit, names: names["Net"](slotted=slotted(names["Private"](), culprit)),
    "rows.hook, a default of default": lambda culprit, names: names["Net"](hook=with_default(culprit)),
    "rows's class.shared": lambda culprit, names: type("Own", (names["Net"],), {"shared": culprit})(),
}


def noted(net, culprit):
    net.line.weight.note = culprit
    return net


def closed_over(culprit):
    def closure():
        return culprit

    return closure


def with_default(culprit):
    def default(x=culprit):
        return x

    return default


def slotted(made, culprit):
    made.open = culprit
    return made


@pytest.mark.parametrize("path", PLACES)
def test_the_path_is_the_way_to_it(notebook, path):
    """As the user would write it."""
    culprit = (x for x in ())
    model = PLACES[path](culprit, notebook)
    with pytest.raises(TaskError) as error:
        pack([model], names={"rows": model})
    assert str(error.value).startswith(f"{path} is a generator, which cannot be sent to another process")


def test_a_traced_module_arrives_with_its_hooks(there):
    """torch makes it anew, and forgets them; only where its code stands is another place."""
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    module.register_forward_hook(lambda *_: None)
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    module.note = [module.eval()]
    module.meta["a"] = 1
    before, after = walk(module), there(module)
    of_graph = {"_graph", "_code"}
    assert before[0]["attributes"].keys() == after[0]["attributes"].keys()
    for name in before[0]["attributes"].keys() - of_graph:
        (one, theirs), (place, other) = ((walked, walked[0]["attributes"][name]) for walked in (before, after))
        if isinstance(theirs, int):
            assert one[theirs].get("type") == place[other].get("type")
            assert len(one[theirs].get("items", ())) == len(place[other].get("items", ()))
