"""What a source gives for a step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxpref.measurements import Metric
from jaxpref.packing import PackedBatch


class Work(NamedTuple):
    """How much there is to do in a step, for the log.

    Attributes:
      shape: of the batches' tokens; a new one means a compilation.
      tokens: that are trained on, prompts included.
      groups: prompts.
    """

    shape: tuple[int, ...]
    tokens: int
    groups: int


class Experience(NamedTuple):
    """What a step trains on.

    Attributes:
      batches: one for each update, on the devices.
      work: how much that is.
      controls: what the run carries to the next step beside its roles, see `State.controls`.
      measured: what is known of it before any update.
      kl: of a response to the reference, in nats, on average; 0 where nothing is sampled.
    """

    batches: tuple[PackedBatch, ...]
    work: Work
    controls: Mapping[str, jax.Array] = {}
    measured: Mapping[str, Metric] = {}
    kl: float = 0.0


# A function of the number of a step, which counts from 1, of the train state before it, and of a
# function that says whether to stop at once: then there is no experience, but None.
Source = Callable[[int, Any, Callable[[], bool]], Experience | None]
