"""Any module into pipeline stages: record its forward, measure it, cut it where the stages take the same time."""

from nbdist.core.strategies.pipeline.partition.call import Call
from nbdist.core.strategies.pipeline.partition.split import Split, StageInfo, split
from nbdist.core.strategies.pipeline.partition.tracing import KINDS

__all__ = ["KINDS", "Call", "Split", "StageInfo", "split"]
