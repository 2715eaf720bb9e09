"""Methods on single responses that are labelled as desirable or not."""

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import (
    Algorithm,
    Logps,
    Objective,
    Params,
    present,
    reference_of,
    score,
)
from jaxpref.losses import UnpairedOutput
from jaxpref.methods import MEAN_REWARD
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.packing import PackedBatch


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """KTO or BCO."""
    return (_kto if config.algorithm.name == "kto" else _bco)(config, model)


def _kto(config: ConfigDict, model: Decoder) -> Algorithm:
    """KTO; the second response of each group answers another prompt, for the KL."""
    knobs = config.algorithm
    options = {name: value for name, value in knobs.items() if name != "name"}

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        policy, reference = scores.logps, reference_of(batch, scores.logps)
        kl = jnp.maximum(batch.extras["pooled/kl"], 0) if "pooled/kl" in batch.extras else None
        if kl is None:
            kl = losses.kto_kl(policy[:, 1], reference[:, 1], where=present(batch)[:, 1])
        output = losses.kto(policy[:, 0], reference[:, 0], _desirable(batch), kl, **options)
        objective = _objective(output, policy[:, 0], batch)
        objective.metrics["kl"] = Metric(
            jnp.broadcast_to(kl, policy[:, 0].shape), objective.loss.weights
        )
        return scores.complete(objective)

    def pooled(params: Params, batch: PackedBatch) -> dict[str, Metric]:
        policy = score(model, params, batch).logps
        ratios = (policy - reference_of(batch, policy))[:, 1]
        return {"kl": Metric(ratios, present(batch)[:, 1].astype(ratios.dtype))}

    reference_logps = _reference_logps(config, model)
    return Algorithm(loss, reference_logps, pooled=pooled)


def _bco(config: ConfigDict, model: Decoder) -> Algorithm:
    """BCO on single responses; the shift is the mean reward of the steps so far."""
    beta = config.algorithm.beta

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        policy, reference = scores.logps[:, 0], reference_of(batch, scores.logps)[:, 0]
        shift = jnp.asarray(batch.extras[f"running/{MEAN_REWARD}"])
        output = losses.bco_unpaired(policy, reference, _desirable(batch), shift=shift, beta=beta)
        objective = _objective(output, policy, batch)
        objective.metrics[MEAN_REWARD] = Metric(output.rewards, objective.loss.weights)
        return scores.complete(objective)

    reference_logps = _reference_logps(config, model)
    return Algorithm(loss, reference_logps, (MEAN_REWARD,))


def _reference_logps(config: ConfigDict, model: Decoder) -> Logps:
    return lambda params, batch: score(model, params, batch).logps


def _desirable(batch: PackedBatch) -> Array:
    return jnp.asarray(batch.extras["labels"]) > 0


def _objective(output: UnpairedOutput, logps: Array, batch: PackedBatch) -> Objective:
    there = present(batch)[:, 0].astype(logps.dtype)
    desirable = _desirable(batch)
    chosen, rejected = (jnp.where(side, there, 0) for side in (desirable, ~desirable))
    metrics = {
        "rewards/chosen": Metric(output.rewards, chosen),
        "rewards/rejected": Metric(output.rewards, rejected),
        "logps/chosen": Metric(logps, chosen),
        "logps/rejected": Metric(logps, rejected),
    }
    return Objective(Metric(output.losses, there), metrics)
