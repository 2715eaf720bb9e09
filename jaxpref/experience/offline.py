"""Batches of data."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpref.data import BatchStream
from jaxpref.experience.base import Experience, Source, Work
from jaxpref.packing import PackedBatch


def offline(
    stream: BatchStream, start: int, stop: int, put: Callable[[PackedBatch], PackedBatch]
) -> Source:
    """The batches of steps `start + 1` to `stop`, which are asked for in order.

    They are prepared ahead, in other threads.

    Args:
      stream: gives the batches.
      start: steps that are done.
      stop: the last step.
      put: puts a batch on the devices.
    """
    ahead = enumerate(stream.batches(start, stop), start=start + 1)

    def source(step: int, state: Any, stopping: Callable[[], bool]) -> Experience:
        number, batch = next(ahead)
        if number != step:
            raise ValueError(f"the batch of step {number} comes next, but {step} is asked for.")
        placed = put(batch)
        return Experience((placed,), work_of(batch, shape=placed.tokens.shape))

    return source


def work_of(*batches: PackedBatch, shape: tuple[int, ...]) -> Work:
    """How much batches are.

    Args:
      batches: before they are on the devices.
      shape: of the tokens of one of them on the devices.
    """
    return Work(
        shape,
        sum(_tokens(batch) for batch in batches),
        sum(int((np.asarray(batch.lengths)[..., 0] > 0).sum()) for batch in batches),
    )


def _tokens(batch: PackedBatch) -> int:
    if batch.written is not None:
        return int(np.sum(batch.written.tokens))
    return int((np.asarray(batch.group) > 0).sum())
