"""How a global batch is cut into slices."""

from __future__ import annotations

__all__ = ["default_microbatches", "slice_bounds"]

_FEW_ROWS = 32
"""A layer that reads its weights for fewer rows waits for memory: another microbatch costs it a whole pass."""


def default_microbatches(ranks: int, samples: int, *, flat: bool = False) -> int:
    """Microbatches in flight through a pipeline: more of them fill it better, and cost a pass over all weights each.

    Args:
        ranks: Of the pipeline.
        samples: That are cut into microbatches; each gets two at least, as BatchNorm cannot train on one.
        flat: Whether a sample is a single row of numbers.
    """
    many = max(1, min(2 * ranks, samples // 2))
    return many if not flat or samples >= 2 * ranks * _FEW_ROWS else min(many, ranks)


def slice_bounds(samples: int, slices: int) -> list[tuple[int, int]]:
    """Cut `samples` positions into contiguous, balanced slices.

    A full batch always fills every slice. A short last batch fills fewer slices where they would otherwise hold a
    single sample, because layers such as BatchNorm cannot train on one: a batch that one process can train on works
    on every number of ranks.

    Args:
        samples: Samples in this global batch.
        slices: Slices of a full batch: ranks on the data axes x microbatches.

    Returns:
        One ``(start, stop)`` a slice, `slices` in all, sizes differing by at most one among the filled ones; the
        last ones may be empty.
    """
    filled = slices if samples >= 2 * slices else max(1, min(slices, samples // 2))
    bounds = [(i * samples // filled, (i + 1) * samples // filled) for i in range(filled)]
    return bounds + [(samples, samples)] * (slices - filled)
