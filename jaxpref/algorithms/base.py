"""What the train loop needs of a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref import packing
from jaxpref.logprobs import token_logprobs
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.models.experts import load_balancing_loss
from jaxpref.packing import PackedBatch

Params = Any


class Objective(NamedTuple):
    """A loss of each example, with its weight, and what else is worth logging."""

    loss: Metric
    metrics: dict[str, Metric]


class Algorithm(NamedTuple):
    """A method, as functions.

    Attributes:
      kind: what the method needs of an example, a name in `jaxpref.data.convert.KINDS`.
      prepare: adds what the frozen reference says of a batch; `(reference, batch)`.
      loss: `(params, batch, key)` to per-example losses and metrics; the key, if not None,
        is for dropout.
    """

    kind: str
    prepare: Callable[[Params, PackedBatch], PackedBatch]
    loss: Callable[[Params, PackedBatch, Array | None], Objective]


class Scores(NamedTuple):
    """What a model says of a packed batch.

    Attributes:
      logps: summed log-probability of every response, in nats.
      router_loss: a mixture of experts' load-balancing loss over the batch's tokens (a
        prompt counts once), times its weight; None for other models.
    """

    logps: Float[Array, "groups responses"]
    router_loss: Float[Array, ""] | None

    def complete(self, objective: Objective) -> Objective:
        """The objective with the router's loss added to each example's, and logged, if any."""
        if self.router_loss is None:
            return objective
        values, weights = objective.loss
        router_loss = Metric(jnp.broadcast_to(self.router_loss, values.shape), weights)
        return Objective(
            Metric(values + router_loss.values, weights),
            {**objective.metrics, "router_loss": router_loss},
        )


def score(model: Decoder, params: Params, batch: PackedBatch, key: Array | None = None) -> Scores:
    """Scores every response of a packed batch, with dropout if there is a key."""
    variables = {"params": params}
    hidden, sown = model.apply(
        variables,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        packing.attention_mask(batch),
        method="hidden_states",
        mutable=["intermediates"],
        rngs=None if key is None else {"dropout": key},
    )
    scored = packing.gather_sources(hidden, batch)
    logps = token_logprobs(
        scored, model.apply(variables, method="lm_head"), jnp.asarray(batch.target)
    )
    router_loss = None
    if model.config.router_loss:
        (router_logits,) = sown["intermediates"]["router_logits"]
        real = jnp.asarray(batch.group).ravel() > 0
        router_loss = model.config.router_loss * load_balancing_loss(
            router_logits, real, model.config.experts_per_token
        )
    return Scores(packing.sum_by_response(logps, batch), router_loss)


def response_logps(
    model: Decoder, params: Params, batch: PackedBatch
) -> Float[Array, "groups responses"]:
    """Summed log-probability of every response of a packed batch, in nats."""
    return score(model, params, batch).logps


def response_scalars(
    model: Decoder, params: Params, batch: PackedBatch
) -> Float[Array, "groups responses"]:
    """What a scalar head says at the last token of every response of a packed batch."""
    variables = {"params": params}
    hidden = model.apply(
        variables,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        packing.attention_mask(batch),
        method="hidden_states",
    )
    places = packing.gather_places(hidden, batch)
    scalars = model.apply(variables, places, method="scalars_of")
    # Not a product with the mask, which a NaN in padding would survive.
    return packing.sum_by_response(jnp.where(packing.is_last(batch), scalars, 0), batch)
