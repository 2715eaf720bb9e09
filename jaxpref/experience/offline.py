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
        return Experience((put(batch),), work_of(batch))

    return source


def work_of(*batches: PackedBatch) -> Work:
    """How much batches are, before they are on the devices."""
    return Work(
        batches[0].tokens.shape,
        sum(int((np.asarray(batch.group) > 0).sum()) for batch in batches),
        sum(int((np.asarray(batch.lengths)[..., 0] > 0).sum()) for batch in batches),
    )
