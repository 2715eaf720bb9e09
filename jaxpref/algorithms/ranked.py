"""Methods on K responses of a prompt, ranked best first."""

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import Algorithm, Objective, Params, present, reference_of, score
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.packing import PackedBatch


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """RRHF, or DPO on rankings."""
    return (_rrhf if config.algorithm.name == "rrhf" else _dpo)(config, model)


def _rrhf(config: ConfigDict, model: Decoder) -> Algorithm:
    """RRHF; where the data has an order but no scores, each place is worth one more."""
    rank_weight = config.algorithm.rank_weight

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        lengths = jnp.asarray(batch.lengths)
        by_place = -jnp.arange(lengths.shape[1], dtype=jnp.float32)
        given = batch.extras.get("scores", jnp.broadcast_to(by_place[None], lengths.shape))
        output = losses.rrhf(scores.logps, lengths, jnp.asarray(given), rank_weight=rank_weight)
        return scores.complete(_objective(output.losses, output.rewards, scores.logps, batch))

    return Algorithm(loss)


def _dpo(config: ConfigDict, model: Decoder) -> Algorithm:
    """DPO on rankings: the Plackett-Luce likelihood, or the mean over all pairs."""
    knobs = config.algorithm

    def reference_logps(params: Params, batch: PackedBatch) -> Array:
        return score(model, params, batch).logps

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        policy, reference = scores.logps, reference_of(batch, scores.logps)
        there = present(batch)
        rewards = knobs.beta * (policy - reference)
        if knobs.name == "plackett_luce_dpo":
            values = losses.plackett_luce_dpo(
                policy, reference, beta=knobs.beta, where=there
            ).losses
        else:
            values = losses.all_pairs(
                lambda *x: losses.dpo(*x, beta=knobs.beta).losses, policy, reference, where=there
            )
        return scores.complete(_objective(values, rewards, policy, batch))

    return Algorithm(loss, reference_logps)


def _objective(values: Array, rewards: Array, policy: Array, batch: PackedBatch) -> Objective:
    """The best response is the chosen one; the others are the rejected ones."""
    there = present(batch)
    weights = there[:, 0].astype(policy.dtype)
    others = there[:, 1:].astype(policy.dtype)
    margins = rewards[:, :1] - rewards[:, 1:]
    best = {"rewards/chosen": rewards[:, 0], "logps/chosen": policy[:, 0]}
    rest = {
        "rewards/rejected": rewards[:, 1:],
        "rewards/margins": margins,
        "rewards/accuracies": (1 + jnp.sign(margins)) / 2,
        "logps/rejected": policy[:, 1:],
    }
    count = jnp.maximum(others.sum(1), 1)
    metrics = {name: Metric(value, weights) for name, value in best.items()}
    for name, value in rest.items():
        mean = jnp.where(others > 0, value, 0).sum(1) / count
        metrics[name] = Metric(mean, weights * (others.sum(1) > 0))
    return Objective(Metric(values, weights), metrics)
