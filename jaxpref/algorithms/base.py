"""What the train loop needs of a method, and what methods read of a model's output."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref import packing
from jaxpref.logprobs import LMHead, token_logprobs, token_logprobs_and_collision
from jaxpref.measurements import Metric
from jaxpref.models.protocol import ModelOutput, ScalarHead
from jaxpref.packing import PackedBatch


class Objective(NamedTuple):
    """A loss of each example, with its weight, and what else is worth logging."""

    loss: Metric
    metrics: dict[str, Metric]


class LossInputs(NamedTuple):
    """What a loss reads beside the policy's output and the batch; no gradient flows into it.

    Attributes:
      reference: summed log-probs of the responses under the reference; None without one.
      running: means over all steps so far, 0 at first, by the names in `Algorithm.running`.
      pooled: means over the whole batch, by the names that `Algorithm.pooled` gives; empty where
        the batch that the loss sees is whole.
    """

    reference: Float[Array, "groups responses"] | None = None
    running: Mapping[str, Float[Array, ""]] = {}
    pooled: Mapping[str, Float[Array, ""]] = {}

    def reference_or_zeros(
        self, policy: Float[Array, "groups responses"]
    ) -> Float[Array, "groups responses"]:
        """The reference's log-probs; without one, as if it gave every response the same."""
        return jnp.zeros_like(policy) if self.reference is None else self.reference


class Algorithm(NamedTuple):
    """A method, as functions of what a model says of a packed batch.

    Attributes:
      loss: `(output, batch, inputs)` to the examples' losses, and what else is measured.
      reference_logps: `(output, batch)` to what the reference says of every response; None for
        a method without one.
      running: metrics whose means over all steps so far the loss reads.
      pooled: `(output, batch, inputs)` to what the loss reads the means of over the whole batch,
        where a batch is cut into micro-batches; None if there is nothing.
    """

    loss: Callable[[ModelOutput, PackedBatch, LossInputs], Objective]
    reference_logps: Callable[[ModelOutput, PackedBatch], Float[Array, "groups responses"]] | (
        None
    ) = None
    running: tuple[str, ...] = ()
    pooled: Callable[[ModelOutput, PackedBatch, LossInputs], dict[str, Metric]] | None = None


class ResponseLogps(NamedTuple):
    """Log-probabilities of every response of a packed batch, in nats.

    Attributes:
      summed: of the whole response.
      weighted: the same with each token's weight; without weights, `summed`.
      aligned: mean over each response of the log-probability less the logarithm of its
        expectation under the model, if asked for (see `losses.weighting.wpo`).
    """

    summed: Float[Array, "groups responses"]
    weighted: Float[Array, "groups responses"]
    aligned: Float[Array, "groups responses"] | None


def read_logps(
    output: ModelOutput,
    batch: PackedBatch,
    *,
    token_weights: Float[Array, "rows scored"] | None = None,
    aligned: bool = False,
) -> ResponseLogps:
    """Reads the log-probabilities of every response.

    Args:
      output: of a model with an LM head.
      batch: without micro-batches.
      token_weights: of each token in its response's sum; None for 1.
      aligned: compute `ResponseLogps.aligned` too.
    """
    if not isinstance(output.head, LMHead):
        raise ValueError(f"reading log-probs needs an LM head; got {_kind(output)}.")
    hidden = packing.gather_sources(output.hidden, batch)
    target, means = jnp.asarray(batch.target), None
    if aligned:
        logps, collision = token_logprobs_and_collision(hidden, output.head, target)
        sums = packing.sum_by_response(logps - collision, batch)
        means = sums / jnp.maximum(jnp.asarray(batch.lengths), 1)
    else:
        logps = token_logprobs(hidden, output.head, target)
    summed = weighted = packing.sum_by_response(logps, batch)
    if token_weights is not None:
        # A NaN in padding would survive a product with zeros.
        logps = jnp.where(jnp.asarray(batch.response) < batch.lengths.size, logps, 0)
        weighted = packing.sum_by_response(logps * token_weights, batch)
    return ResponseLogps(summed, weighted, means)


def response_logps(output: ModelOutput, batch: PackedBatch) -> Float[Array, "groups responses"]:
    """Summed log-probability of every response of a packed batch, in nats."""
    return read_logps(output, batch).summed


def response_scalars(output: ModelOutput, batch: PackedBatch) -> Float[Array, "groups responses"]:
    """What a scalar head says at the end of every response of a packed batch.

    The end is the last token, or the last one that is not the head's `pad_token_id`.
    """
    if not isinstance(output.head, ScalarHead):
        raise ValueError(f"reading rewards needs a scalar head; got {_kind(output)}.")
    if output.head.pad_token_id is not None:
        places = packing.last_places(batch, output.head.pad_token_id)
        batch = dataclasses.replace(batch, place=places)
    values = output.head.scalars(packing.gather_places(output.hidden, batch))
    # A NaN in padding would survive a product with the mask.
    return packing.sum_by_response(jnp.where(packing.is_last(batch), values, 0), batch)


def present(batch: PackedBatch) -> Bool[Array, "groups responses"]:
    """Which responses are there."""
    return jnp.asarray(batch.lengths) > 0


def desirable(batch: PackedBatch) -> Bool[Array, " groups"]:
    """Which groups have a response that is labelled good."""
    return jnp.asarray(batch.extras["labels"]) > 0


def _kind(output: ModelOutput) -> str:
    return type(output.head).__name__
