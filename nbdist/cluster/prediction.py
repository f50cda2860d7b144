"""`Cluster.predict`: a model's outputs for a data set, computed on all engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdist.cluster.runs.run import Run
from nbdist.plan.option import takes_options
from nbdist.plan.predict_options import PREDICT_OPTIONS, PredictOptions
from nbdist.plan.train_options import Unpack

if TYPE_CHECKING:
    from nbdist.cluster.cluster import Cluster

__all__ = ["predict"]


@takes_options(PREDICT_OPTIONS)
def predict(
    cluster: Cluster, model: Any, data: Any, *, names: tuple[str, str] = ("model", "data"),
    while_waiting: Callable[[Run], None] = lambda run: None, **options: Unpack[PredictOptions],
) -> Any:  # fmt: skip
    """The outputs of `model` for a data set, in its order, computed on all engines.

    The model is in evaluation mode there, without gradients, and unchanged here. A lost engine is replaced, and
    the prediction starts anew; an interrupt ends it.

    Args:
        cluster: Where.
        model: An ``nn.Module``.
        data: In the same forms as the data of `train`. The last element of a tuple is the target, and left out,
            unless the model's forward requires it; a dict is passed as keywords. A DataLoader's order is that of
            its dataset, and every sample counts.
        names: The user's names of `model` and `data`, for errors.
        while_waiting: Called with the run in a loop meanwhile, and once afterwards.
        **options: Each of `PREDICT_OPTIONS`; ``help(cluster.predict)`` explains them here.

    Returns:
        What the model returns, of all samples: CPU tensors, concatenated along their first dimension, in the same
        tuples, dicts and model outputs. Entries of a dict without a row for each sample, such as a loss, are left
        out.

    Raises:
        PlanError: An option is not possible.
        TaskError: The model or data cannot be used, or its outputs cannot be put together.
        ClusterError: The engines are busy or lost.
        EngineError: It failed.
    """
    cluster._running().check_alive()
    assert cluster._run_queue is not None
    return cluster._run_queue.predict(model, data, names, {**options}, while_waiting)
