"""Partition any module into pipeline stages: trace its forward, profile it, cut it into stages of equal time."""

from nbdist.core.strategies.pipeline.partition.build_stage import output_structure
from nbdist.core.strategies.pipeline.partition.call_signature import Call
from nbdist.core.strategies.pipeline.partition.effects import pack, unpack
from nbdist.core.strategies.pipeline.partition.split import Split, StageInfo, split
from nbdist.core.strategies.pipeline.partition.tracing import KINDS

__all__ = ["KINDS", "Call", "Split", "StageInfo", "output_structure", "pack", "split", "unpack"]
