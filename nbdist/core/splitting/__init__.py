"""Any module into pipeline stages: record its forward, measure it, cut it where the stages take the same time."""

from nbdist.core.splitting.call import Call
from nbdist.core.splitting.split import Split, StageInfo, split
from nbdist.core.splitting.tracing import KINDS

__all__ = ["KINDS", "Call", "Split", "StageInfo", "split"]
