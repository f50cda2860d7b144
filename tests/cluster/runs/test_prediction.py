"""Predictions on engines: outputs in order, errors before an engine works, interrupts, lost engines."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from gate import Gate
from torch import nn
from torch.utils import data as torch_data

from nbdist.cluster import last_run
from nbdist.cluster.engines.engines import Engines
from nbdist.errors import ClusterError, EngineError, PlanError, TaskError

pytestmark = pytest.mark.engines
SAMPLES = 45


class Net(nn.Module):
    """Waits at a gate in its second forward, and may then end its process, once, or raise."""

    def __init__(self, gate=None, how=""):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.gate, self.how, self.calls = gate, how, 0

    def forward(self, x):
        if self.gate is not None:  # a pipeline would refuse a forward that counts
            self.calls += 1
        if self.gate is not None and not self.training and self.calls == 2:
            self.gate.hold("forward")
            if self.how == "raise":
                raise ValueError("torn")
            if self.how == "die" and os.environ["RANK"] == "1" and not self.gate.is_reached("dead"):
                self.gate._mark("dead", 0).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return {"scores": self.layers(x), "index": x[:, 0].long()}


def net(*arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(*arguments)


def data(samples=SAMPLES):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.arange(samples)
    return x, torch.arange(samples) % 3


def expected(model, x):
    with torch.no_grad():
        return nn.Sequential(*model.layers).eval()(x)


def assert_predicted(outputs, model):
    assert list(range(SAMPLES)) == outputs["index"].tolist()
    torch.testing.assert_close(outputs["scores"], expected(model, data()[0]))
    assert not outputs["scores"].requires_grad


@pytest.mark.parametrize("strategy", ["data", "pipeline", "shard"])
def test_outputs_of_all_samples_in_order(shared_cluster, strategy):
    """On any mesh; the model of the notebook stays as it is, and outputs stay when another prediction follows."""
    cluster, model = shared_cluster.ready(), net()
    options = {"split_at": ["layers.2"]} if strategy == "pipeline" else {}
    outputs = cluster.predict(model, data(), strategy=strategy, **options)
    assert model.training
    other = cluster.predict(net(), torch.zeros(3, 4), strategy=strategy, **options)
    assert (3, 3) == other["scores"].shape
    assert_predicted(outputs, model)


def test_a_run_predicts_with_what_it_has_trained(shared_cluster):
    """With its own options; it stays the last run, and outputs stay when the next run ends."""
    cluster, model = shared_cluster.ready(), net()
    step = {"step": lambda model, batch: nn.functional.cross_entropy(model(batch[0])["scores"], batch[1])}
    run = cluster.train(model, data(), epochs=2, batch_size=16, **step)
    outputs = run.predict(torch_data.DataLoader(torch_data.TensorDataset(*data()), batch_size=7, shuffle=True))
    assert_predicted(outputs, model)
    assert run is last_run()
    kept = {name: tensor.clone() for name, tensor in outputs.items()}
    later = cluster.train(net(), data(), epochs=1, **step)
    assert all(torch.equal(tensor, outputs[name]) for name, tensor in kept.items())
    with pytest.raises(ClusterError, match=rf"run {run.run_id} has been followed by another one.*cluster\.predict"):
        run.predict(data())
    assert later is last_run()


def test_mistakes_are_found_before_an_engine_works(shared_cluster, monkeypatch):
    """An argument, an option, a model, data."""
    cluster, model = shared_cluster.ready(), net()
    calls = []
    monkeypatch.setattr(Engines, "start_call", lambda *arguments: calls.append(arguments))
    for arguments, options, error, message in [
        ((model, 3), {}, TaskError, "data is a value of type int, not data"),
        ((3, data()), {}, TaskError, "model is a value of type int, not a torch.nn.Module"),
        ((model, data()), {"batchsize": 3}, PlanError, "unknown option 'batchsize'. Did you mean 'batch_size'"),
        ((model, data()), {"epochs": 3}, PlanError, "unknown option 'epochs'"),
        ((model, data()), {"strategy": "dp=3"}, PlanError, "3"),
        ((model, data()), {"precision": "int8"}, PlanError, "unknown precision 'int8'"),
    ]:
        with pytest.raises(error, match=message):
            cluster.predict(*arguments, **options)
    assert [] == calls


def test_an_error_in_the_model_is_the_predictions_error(shared_cluster, tmp_path):
    """With its rank and line; the next prediction works."""
    cluster, gate = shared_cluster.ready(), Gate(tmp_path)
    gate.open()
    with pytest.raises(EngineError, match="ValueError: torn"):
        cluster.predict(net(gate, "raise"), data(), batch_size=8)
    assert_predicted(cluster.predict(net(), data()), net())


def interrupt_at(gate):
    def while_waiting(run):
        if run.progress.running and not run.control.abandoned and gate.is_reached("forward"):
            raise KeyboardInterrupt

    return while_waiting


def test_an_interrupt_ends_it_at_once(shared_cluster, tmp_path):
    """The engines are free for the next one."""
    cluster, gate = shared_cluster.ready(), Gate(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="the prediction has been stopped, without outputs"):
        cluster.predict(net(gate), data(), batch_size=8, while_waiting=interrupt_at(gate))
    assert_predicted(cluster.predict(net(), data()), net())


def test_a_lost_engine_is_replaced(shared_cluster, tmp_path):
    """And the outputs are those of an undisturbed one."""
    cluster, gate = shared_cluster.ready(), Gate(tmp_path)
    gate.open()
    assert_predicted(cluster.predict(net(gate, "die"), data(), batch_size=8), net())
    assert gate.is_reached("dead")


def test_commands_other_than_stop_are_refused(shared_cluster, tmp_path):
    """A prediction has no learning rate and no checkpoint; nothing else may run meanwhile."""
    cluster, gate, refused = shared_cluster.ready(), Gate(tmp_path), []

    def while_waiting(run):
        if gate.is_reached("forward") and not refused:
            for act in (run.pause, lambda: cluster.scale(3), lambda: cluster.predict(net(), data())):
                with pytest.raises(ClusterError) as caught:
                    act()
                refused.append(str(caught.value))
            gate.open()

    assert_predicted(cluster.predict(net(gate), data(), batch_size=8, while_waiting=while_waiting), net())
    assert all("is a prediction, which can only be stopped" in text for text in refused[:2])
    assert "is running: wait for it" in refused[2]
