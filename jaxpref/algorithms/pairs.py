"""Methods on preference pairs: DPO and its kin, with a reference or without."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import losses, packing
from jaxpref.algorithms.base import (
    Algorithm,
    Objective,
    Params,
    present,
    reference_of,
    score,
)
from jaxpref.losses import PreferenceOutput
from jaxpref.methods import MEAN_REWARD, METHODS
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.packing import PackedBatch

# Of chosen and rejected log-probs of the policy, then of the reference, and of the batch.
Loss = Callable[[Sequence[Array], PackedBatch], PreferenceOutput]

_CHOSEN_LENGTH = "chosen_length"


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """A method on pairs, as its declaration says."""
    alone = METHODS[config.algorithm.name].reference == "none"
    return (_without_reference if alone else _with_reference)(config, model)


def _with_reference(config: ConfigDict, model: Decoder) -> Algorithm:
    """A method that compares the policy with its reference, on pairs."""
    knobs = config.algorithm
    loss_of_pairs = _loss(knobs)
    running = METHODS[knobs.name].running

    def reference_logps(params: Params, batch: PackedBatch) -> Float[Array, "groups responses"]:
        weights = _token_weights(knobs, batch)
        return score(model, params, batch, token_weights=weights).weighted_logps

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(
            model,
            params,
            batch,
            key,
            token_weights=_token_weights(knobs, batch),
            aligned=knobs.get("wpo", False),
        )
        policy, reference = scores.weighted_logps, reference_of(batch, scores.logps)
        output = loss_of_pairs((*policy.T, *reference.T), batch)
        values = output.losses
        if scores.aligned_logps is not None:
            largest = knobs.wpo_largest or math.inf
            values *= losses.weighting.wpo(*scores.aligned_logps.T, largest=largest)
        return scores.complete(_objective(values, output, scores.logps, batch, running))

    return Algorithm(loss, reference_logps, running)


def _without_reference(config: ConfigDict, model: Decoder) -> Algorithm:
    """A method that needs the policy alone, on pairs."""
    knobs = config.algorithm
    function = getattr(losses, knobs.name)
    own = {name: value for name, value in knobs.items() if name not in ("name", "nll_per_token")}
    by_length = bool(METHODS[knobs.name].takes)
    nll_per_token = knobs.get("nll_per_token", False)

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        lengths = jnp.asarray(batch.lengths).T if by_length else ()
        options: dict[str, Any] = {}
        if nll_per_token:
            tokens = batch.extras.get(f"pooled/{_CHOSEN_LENGTH}")
            if tokens is None:
                (sums,) = pooled(params, batch).values()
                tokens = sums.values.sum() / jnp.maximum(sums.weights.sum(), 1)
            options["nll"] = losses.nll(scores.logps[:, 0]) / jnp.maximum(tokens, 1)
        output = function(*scores.logps.T, *lengths, **own, **options)
        return scores.complete(_objective(output.losses, output, scores.logps, batch))

    def pooled(params: Params, batch: PackedBatch) -> dict[str, Metric]:
        chosen = jnp.asarray(batch.lengths)[:, 0].astype(jnp.float32)
        return {_CHOSEN_LENGTH: Metric(chosen, present(batch).all(1).astype(jnp.float32))}

    return Algorithm(loss, pooled=pooled if nll_per_token else None)


def _loss(knobs: ConfigDict) -> Loss:
    """The loss with its knobs as a function of log-probs and the batch."""
    own = {
        name: value
        for name, value in knobs.items()
        if name not in ("name", "length_alpha", "wpo", "wpo_largest")
    }
    takes = METHODS[knobs.name].takes
    if not own.pop("per_token", True):
        takes = ()
    if "divergence" in own:
        own["divergence"] = _divergence(own["divergence"], own.pop("alpha"))
    function = partial(getattr(losses, knobs.name), **own)

    def loss(logps: Sequence[Array], batch: PackedBatch) -> PreferenceOutput:
        given = {
            "chosen_lengths": lambda: jnp.asarray(batch.lengths)[:, 0],
            "rejected_lengths": lambda: jnp.asarray(batch.lengths)[:, 1],
            "shift": lambda: jnp.asarray(batch.extras[f"running/{MEAN_REWARD}"]),
            "where": lambda: present(batch).all(1),
        }
        return function(*logps, **{name: given[name]() for name in takes})

    return loss


def _divergence(name: str, alpha: float) -> Callable[[Array], Array]:
    functions: dict[str, Callable[[Array], Array]] = {
        "reverse_kl": losses.divergences.reverse_kl,
        "forward_kl": losses.divergences.forward_kl,
        "jensen_shannon": losses.divergences.jensen_shannon,
        "alpha": partial(losses.divergences.alpha_divergence, alpha=alpha),
    }
    return functions[name]


def _token_weights(knobs: ConfigDict, batch: PackedBatch) -> Float[Array, "rows scored"] | None:
    """LD-DPO's weights, unless they are all 1."""
    if knobs.get("length_alpha", 1.0) == 1.0:
        return None
    lengths = jnp.asarray(batch.lengths)
    shared = jnp.minimum(lengths[:, 0], lengths[:, 1])
    # Padding's response is beyond the last; its weight does not matter.
    group = jnp.minimum(jnp.asarray(batch.response) // lengths.shape[1], len(lengths) - 1)
    return losses.weighting.length_desensitized(
        packing.index_in_response(batch), shared[group], alpha=knobs.length_alpha
    )


def _objective(
    values: Array,
    output: PreferenceOutput,
    policy: Array,
    batch: PackedBatch,
    running: tuple[str, ...] = (),
) -> Objective:
    there = present(batch).all(1).astype(policy.dtype)
    margins = output.chosen_rewards - output.rejected_rewards
    measured = {
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/margins": margins,
        # A tie is a coin's flip: before the first update every margin is 0.
        "rewards/accuracies": (1 + jnp.sign(margins)) / 2,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    if MEAN_REWARD in running:
        measured[MEAN_REWARD] = (output.chosen_rewards + output.rejected_rewards) / 2
    metrics = {name: Metric(value, there) for name, value in measured.items()}
    return Objective(Metric(values, there), metrics)
