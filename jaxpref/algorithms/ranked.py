"""Methods on K responses of a prompt, ranked best first."""

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import Algorithm, LossInputs, Objective, present, response_logps
from jaxpref.measurements import Metric
from jaxpref.models.protocol import ModelOutput
from jaxpref.packing import PackedBatch


def build(knobs: ConfigDict) -> Algorithm:
    """RRHF, or DPO on rankings."""
    return _rrhf(knobs) if knobs.name == "rrhf" else _dpo(knobs)


def _rrhf(knobs: ConfigDict) -> Algorithm:
    """RRHF; where the data has an order but no scores, each place is worth one more."""

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        logps, lengths = response_logps(output, batch), jnp.asarray(batch.lengths)
        by_place = -jnp.arange(lengths.shape[1], dtype=jnp.float32)
        given = batch.extras.get("scores", jnp.broadcast_to(by_place[None], lengths.shape))
        found = losses.rrhf(logps, lengths, jnp.asarray(given), rank_weight=knobs.rank_weight)
        return _objective(found.losses, found.rewards, logps, batch)

    return Algorithm(loss)


def _dpo(knobs: ConfigDict) -> Algorithm:
    """DPO on rankings: the Plackett-Luce likelihood, or the mean over all pairs."""

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        policy = response_logps(output, batch)
        reference = inputs.reference_or_zeros(policy)
        rewards = knobs.beta * (policy - reference)
        if knobs.name == "plackett_luce_dpo":
            values = losses.plackett_luce_dpo(
                policy, reference, beta=knobs.beta, where=present(batch)
            ).losses
        else:
            values = losses.all_pairs(
                lambda *x: losses.dpo(*x, beta=knobs.beta).losses,
                policy,
                reference,
                where=present(batch),
            )
        return _objective(values, rewards, policy, batch)

    return Algorithm(loss, response_logps)


def _objective(values: Array, rewards: Array, policy: Array, batch: PackedBatch) -> Objective:
    """The best response is the chosen one; the others are the rejected ones."""
    weights = present(batch)[:, 0].astype(policy.dtype)
    others = present(batch)[:, 1:].astype(policy.dtype)
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
