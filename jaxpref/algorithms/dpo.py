"""Direct Preference Optimization (arXiv 2305.18290)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import Algorithm, Objective, Params, response_logps, score
from jaxpref.metrics import Metric
from jaxpref.models import Decoder, without_adapters
from jaxpref.packing import PackedBatch


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """DPO, with the reference that `config.reference.mode` asks for.

    The reference's log-probs come from `extras["reference_logps"]`, which `prepare`
    fills in from the reference's parameters, or the data stream from a precomputed table.
    """
    knobs, mode = config.algorithm, config.reference.mode
    frozen = without_adapters(model) if mode == "adapter" else model

    def prepare(reference: Params, batch: PackedBatch) -> PackedBatch:
        if mode not in ("live", "adapter"):
            return batch
        logps = response_logps(frozen, reference, batch)
        return dataclasses.replace(batch, extras={**batch.extras, "reference_logps": logps})

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        policy = scores.logps
        reference = (
            (None, None) if mode == "free" else jnp.asarray(batch.extras["reference_logps"]).T
        )
        output = losses.dpo(
            policy[:, 0],
            policy[:, 1],
            *reference,
            beta=knobs.beta,
            label_smoothing=knobs.label_smoothing,
            reference_free=mode == "free",
        )
        lengths = jnp.asarray(batch.lengths)
        present = ((lengths[:, 0] > 0) & (lengths[:, 1] > 0)).astype(policy.dtype)
        margins = output.chosen_rewards - output.rejected_rewards
        values = {
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            "rewards/margins": margins,
            # A tie is a coin's flip: before the first update every margin is 0.
            "rewards/accuracies": (1 + jnp.sign(margins)) / 2,
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        metrics = {name: Metric(value, present) for name, value in values.items()}
        return scores.complete(Objective(Metric(output.losses, present), metrics))

    return Algorithm("pairs", prepare, loss)
