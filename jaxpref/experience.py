"""What a step trains on: a source gives the batch of a step, and may look at the train state.

Offline data are a source that ignores the state. Responses that the policy itself samples will be
another, in the same loop.
"""

from collections.abc import Callable
from typing import Any

from jaxpref.data import BatchStream
from jaxpref.packing import PackedBatch

# A function of the number of a step, which counts from 1, and of the train state before it.
Source = Callable[[int, Any], PackedBatch]


def offline(stream: BatchStream, start: int, stop: int) -> Source:
    """The batches of steps `start + 1` to `stop`, which are asked for in order.

    They are prepared ahead, in other threads.
    """
    ahead = enumerate(stream.batches(start, stop), start=start + 1)

    def source(step: int, state: Any) -> PackedBatch:
        number, batch = next(ahead)
        if number != step:
            raise ValueError(f"the batch of step {number} comes next, but {step} is asked for.")
        return batch

    return source
