"""Methods on single responses that are labelled as desirable or not."""

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import (
    Algorithm,
    LossInputs,
    Objective,
    desirable,
    present,
    response_logps,
)
from jaxpref.losses import UnpairedOutput
from jaxpref.measurements import Metric
from jaxpref.methods import MEAN_REWARD, METHODS
from jaxpref.models.protocol import ModelOutput
from jaxpref.packing import PackedBatch


def build(knobs: ConfigDict) -> Algorithm:
    """KTO or BCO."""
    return _kto(knobs) if knobs.name == "kto" else _bco(knobs)


def _kto(knobs: ConfigDict) -> Algorithm:
    """KTO; the second response of each group answers another prompt, for the KL."""
    options = {name: value for name, value in knobs.items() if name != "name"}

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        policy = response_logps(output, batch)
        reference = inputs.reference_or_zeros(policy)
        if "kl" in inputs.pooled:
            kl = jnp.maximum(inputs.pooled["kl"], 0)
        else:
            kl = losses.kto_kl(policy[:, 1], reference[:, 1], where=present(batch)[:, 1])
        found = losses.kto(policy[:, 0], reference[:, 0], desirable(batch), kl, **options)
        objective = _objective(found, policy[:, 0], batch)
        objective.metrics["kl"] = Metric(
            jnp.broadcast_to(kl, policy[:, 0].shape), objective.loss.weights
        )
        return objective

    def pooled(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> dict[str, Metric]:
        policy = response_logps(output, batch)
        ratios = (policy - inputs.reference_or_zeros(policy))[:, 1]
        return {"kl": Metric(ratios, present(batch)[:, 1].astype(ratios.dtype))}

    return Algorithm(loss, response_logps, pooled=pooled)


def _bco(knobs: ConfigDict) -> Algorithm:
    """BCO on single responses; the shift is the mean reward of the steps so far."""

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        policy = response_logps(output, batch)
        reference = inputs.reference_or_zeros(policy)
        found = losses.bco_unpaired(
            policy[:, 0],
            reference[:, 0],
            desirable(batch),
            shift=inputs.running[MEAN_REWARD],
            beta=knobs.beta,
        )
        objective = _objective(found, policy[:, 0], batch)
        objective.metrics[MEAN_REWARD] = Metric(found.rewards, objective.loss.weights)
        return objective

    return Algorithm(loss, response_logps, METHODS[knobs.name].running)


def _objective(output: UnpairedOutput, logps: Array, batch: PackedBatch) -> Objective:
    weights = present(batch)[:, 0].astype(logps.dtype)
    good = desirable(batch)
    chosen, rejected = (jnp.where(side, weights, 0) for side in (good, ~good))
    metrics = {
        "rewards/chosen": Metric(output.rewards, chosen),
        "rewards/rejected": Metric(output.rewards, rejected),
        "logps/chosen": Metric(logps, chosen),
        "logps/rejected": Metric(logps, rejected),
    }
    return Objective(Metric(output.losses, weights), metrics)
