"""What the train loop needs of a method."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref import packing
from jaxpref.logprobs import token_logprobs, token_logprobs_and_collision
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.models.experts import load_balancing_loss
from jaxpref.packing import PackedBatch

Params = Any
# Summed log-probs `[groups, responses]` of a batch's responses under some parameters.
Logps = Callable[[Params, PackedBatch], Float[Array, "groups responses"]]


class Objective(NamedTuple):
    """A loss of each example, with its weight, and what else is worth logging."""

    loss: Metric
    metrics: dict[str, Metric]


class Algorithm(NamedTuple):
    """A method, as functions.

    Attributes:
      loss: `(params, batch, key)` to per-example losses and metrics; the key, if not None,
        is for dropout. A method with a reference finds its log-probs in
        `batch.extras["reference_logps"]`.
      reference_logps: `(params, batch)` to what the reference says of every response; None
        for a method without one.
      running: metrics whose means over all steps so far the loss reads, as
        `batch.extras["running/NAME"]`; 0 at first.
      pooled: `(params, batch)` to what the loss reads the means of over the whole batch, as
        `batch.extras["pooled/NAME"]`, where a batch is cut into micro-batches.
    """

    loss: Callable[[Params, PackedBatch, Array | None], Objective]
    reference_logps: Logps | None = None
    running: tuple[str, ...] = ()
    pooled: Callable[[Params, PackedBatch], dict[str, Metric]] | None = None

    def prepare(self, reference: Params | None, batch: PackedBatch) -> PackedBatch:
        """Adds what a live reference says, if there is one."""
        if reference is None or self.reference_logps is None:
            return batch
        logps = self.reference_logps(reference, batch)
        return dataclasses.replace(batch, extras={**batch.extras, "reference_logps": logps})


class Scores(NamedTuple):
    """What a model says of a packed batch.

    Attributes:
      logps: summed log-probability of every response, in nats.
      weighted_logps: the same with each token's weight; without weights, `logps`.
      aligned_logps: mean over each response of the log-probability less the logarithm of its
        expectation under the model, if asked for (see `losses.weighting.wpo`).
      router_loss: a mixture of experts' load-balancing loss over the batch's tokens (a
        prompt counts once), times its weight; None for other models.
    """

    logps: Float[Array, "groups responses"]
    weighted_logps: Float[Array, "groups responses"]
    aligned_logps: Float[Array, "groups responses"] | None
    router_loss: Float[Array, ""] | None

    def complete(self, objective: Objective) -> Objective:
        """The objective with the router's loss added to each example's, and logged, if any."""
        return _with_router_loss(objective, self.router_loss)


class Scalars(NamedTuple):
    """What a scalar head says at the last token of every response, and as in `Scores`."""

    values: Float[Array, "groups responses"]
    router_loss: Float[Array, ""] | None

    def complete(self, objective: Objective) -> Objective:
        """See `Scores.complete`."""
        return _with_router_loss(objective, self.router_loss)


def score(
    model: Decoder,
    params: Params,
    batch: PackedBatch,
    key: Array | None = None,
    *,
    token_weights: Float[Array, "rows scored"] | None = None,
    aligned: bool = False,
) -> Scores:
    """Scores every response of a packed batch.

    Args:
      model: with an LM head.
      params: of the model.
      batch: without micro-batches.
      key: for dropout; None for none.
      token_weights: of each token in its response's sum; None for 1.
      aligned: compute `aligned_logps` too.
    """
    hidden, router_loss = _hidden(model, params, batch, key)
    scored = packing.gather_sources(hidden, batch)
    head = model.apply({"params": params}, method="lm_head")
    target, aligned_logps = jnp.asarray(batch.target), None
    if aligned:
        logps, collision = token_logprobs_and_collision(scored, head, target)
        sums = packing.sum_by_response(logps - collision, batch)
        aligned_logps = sums / jnp.maximum(jnp.asarray(batch.lengths), 1)
    else:
        logps = token_logprobs(scored, head, target)
    summed = weighted = packing.sum_by_response(logps, batch)
    if token_weights is not None:
        # Not a product, which a NaN in padding would survive.
        logps = jnp.where(jnp.asarray(batch.response) < batch.lengths.size, logps, 0)
        weighted = packing.sum_by_response(logps * token_weights, batch)
    return Scores(summed, weighted, aligned_logps, router_loss)


def response_logps(
    model: Decoder, params: Params, batch: PackedBatch
) -> Float[Array, "groups responses"]:
    """Summed log-probability of every response of a packed batch, in nats."""
    return score(model, params, batch).logps


def scalars(
    model: Decoder, params: Params, batch: PackedBatch, key: Array | None = None
) -> Scalars:
    """What a model with a scalar head says at the end of every response of a packed batch.

    The end is the last token, or the last one that is not `model.config.pad_token_id`.
    """
    hidden, router_loss = _hidden(model, params, batch, key)
    if (pad := model.config.pad_token_id) is not None:
        batch = dataclasses.replace(batch, place=packing.last_places(batch, pad))
    places = packing.gather_places(hidden, batch)
    values = model.apply({"params": params}, places, method="scalars_of")
    # Not a product with the mask, which a NaN in padding would survive.
    last = jnp.where(packing.is_last(batch), values, 0)
    return Scalars(packing.sum_by_response(last, batch), router_loss)


def response_scalars(
    model: Decoder, params: Params, batch: PackedBatch
) -> Float[Array, "groups responses"]:
    """What a scalar head says at the last token of every response of a packed batch."""
    return scalars(model, params, batch).values


def present(batch: PackedBatch) -> Bool[Array, "groups responses"]:
    """Which responses are there."""
    return jnp.asarray(batch.lengths) > 0


def reference_of(
    batch: PackedBatch, policy: Float[Array, "groups responses"]
) -> Float[Array, "groups responses"]:
    """What the reference says; without one, as if it gave every response the same."""
    logps = batch.extras.get("reference_logps")
    return jnp.zeros_like(policy) if logps is None else jnp.asarray(logps)


def _hidden(
    model: Decoder, params: Params, batch: PackedBatch, key: Array | None
) -> tuple[Float[Array, "rows length width"], Float[Array, ""] | None]:
    hidden, sown = model.apply(
        {"params": params},
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        batch.tree,
        method="hidden_states",
        mutable=["intermediates"],
        rngs=None if key is None else {"dropout": key},
    )
    if not model.config.router_loss:
        return hidden, None
    (router_logits,) = sown["intermediates"]["router_logits"]
    real = jnp.asarray(batch.group).ravel() > 0
    balance = load_balancing_loss(router_logits, real, model.config.experts_per_token)
    return hidden, model.config.router_loss * balance


def _with_router_loss(objective: Objective, router_loss: Float[Array, ""] | None) -> Objective:
    if router_loss is None:
        return objective
    values, weights = objective.loss
    added = Metric(jnp.broadcast_to(router_loss, values.shape), weights)
    return Objective(
        Metric(values + added.values, weights), {**objective.metrics, "router_loss": added}
    )
