"""What the train loop needs of a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref import packing
from jaxpref.data.examples import Example
from jaxpref.logprobs import token_logprobs
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.packing import PackedBatch

Params = Any


class Objective(NamedTuple):
    """A loss of each example, with its weight, and what else is worth logging."""

    loss: Metric
    metrics: dict[str, Metric]


class Algorithm(NamedTuple):
    """A method, as functions.

    Attributes:
      select: the part of an example that the method trains on.
      prepare: adds what the frozen reference says of a batch; `(reference, batch)`.
      loss: `(params, batch)` to per-example losses and metrics.
    """

    select: Callable[[Example], Example]
    prepare: Callable[[Params, PackedBatch], PackedBatch]
    loss: Callable[[Params, PackedBatch], Objective]


def response_logps(
    model: Decoder, params: Params, batch: PackedBatch
) -> Float[Array, "groups responses"]:
    """Summed log-probability of every response of a packed batch, in nats."""
    variables = {"params": params}
    hidden = model.apply(
        variables,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        packing.attention_mask(batch),
        method="hidden_states",
    )
    scored = packing.gather_sources(hidden, batch)
    logps = token_logprobs(
        scored, model.apply(variables, method="lm_head"), jnp.asarray(batch.target)
    )
    return packing.sum_by_response(logps, batch)
