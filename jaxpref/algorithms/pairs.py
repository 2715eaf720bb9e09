"""Methods on preference pairs: DPO and its kin, with a reference or without."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import losses, packing
from jaxpref.algorithms.base import (
    Algorithm,
    LossInputs,
    Objective,
    present,
    read_logps,
)
from jaxpref.losses import PreferenceOutput
from jaxpref.measurements import Metric, mean, total
from jaxpref.methods import MEAN_REWARD, METHODS
from jaxpref.models.protocol import ModelOutput
from jaxpref.packing import PackedBatch

# The pooled mean that `nll_per_token` divides by.
_CHOSEN_LENGTH = "chosen_length"
# Knobs that are acted on here; all others are options of the loss.
_HERE = ("name", "length_alpha", "wpo", "wpo_largest", "nll_per_token", "per_token")


def build(knobs: ConfigDict) -> Algorithm:
    """A method on pairs: the loss of its name, on what its declaration says that it takes."""
    method = METHODS[knobs.name]
    with_reference = method.reference != "none"
    options = {name: value for name, value in knobs.items() if name not in _HERE}
    if "divergence" in options:
        options["divergence"] = _divergence(options["divergence"], options.pop("alpha"))
    function: Callable[..., PreferenceOutput] = partial(getattr(losses, knobs.name), **options)
    takes = method.takes if knobs.get("per_token", True) else ()
    nll_per_token = knobs.get("nll_per_token", False)

    def reference_logps(
        output: ModelOutput, batch: PackedBatch
    ) -> Float[Array, "groups responses"]:
        return read_logps(output, batch, token_weights=_token_weights(knobs, batch)).weighted

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        policy = read_logps(
            output,
            batch,
            token_weights=_token_weights(knobs, batch),
            aligned=knobs.get("wpo", False),
        )
        reference = inputs.reference_or_zeros(policy.summed) if with_reference else policy.summed
        logps = (*policy.weighted.T, *(reference.T if with_reference else ()))
        given = _given(takes, batch, inputs)
        if nll_per_token:
            tokens = (inputs.pooled or _means(pooled(output, batch, inputs)))[_CHOSEN_LENGTH]
            given["nll"] = losses.nll(policy.summed[:, 0]) / jnp.maximum(tokens, 1)
        found = function(*logps, **given)
        values = found.losses
        if policy.aligned is not None:
            largest = knobs.wpo_largest or math.inf
            values *= losses.weighting.wpo(*policy.aligned.T, largest=largest)
        return _objective(values, found, policy.summed, batch, method.running)

    def pooled(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> dict[str, Metric]:
        chosen = jnp.asarray(batch.lengths)[:, 0].astype(jnp.float32)
        return {_CHOSEN_LENGTH: Metric(chosen, present(batch).all(1).astype(jnp.float32))}

    return Algorithm(
        loss,
        reference_logps if with_reference else None,
        method.running,
        pooled if nll_per_token else None,
    )


def _given(takes: tuple[str, ...], batch: PackedBatch, inputs: LossInputs) -> dict[str, Any]:
    """What a loss takes beside log-probs and knobs, by the names of its arguments."""
    chosen, rejected = jnp.asarray(batch.lengths).T
    everything = {
        "chosen_lengths": chosen,
        "rejected_lengths": rejected,
        "shift": inputs.running.get(MEAN_REWARD),
        "where": present(batch).all(1),
    }
    return {name: everything[name] for name in takes}


def _means(sums: dict[str, Metric]) -> dict[str, Array]:
    return {name: mean(total(metric)) for name, metric in sums.items()}


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
    both = present(batch).all(1).astype(policy.dtype)
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
    metrics = {name: Metric(value, both) for name, value in measured.items()}
    return Objective(Metric(values, both), metrics)
