"""Reward modelling: Bradley-Terry, for more than two responses Plackett-Luce, or of labels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import (
    Algorithm,
    LossInputs,
    Objective,
    desirable,
    present,
    response_scalars,
)
from jaxpref.errors import UserError
from jaxpref.measurements import Metric
from jaxpref.models.protocol import ModelOutput
from jaxpref.packing import PackedBatch


def build(knobs: ConfigDict) -> Algorithm:
    """A reward model: a scalar head, read at each response's last token."""

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        rewards, here = response_scalars(output, batch), present(batch)
        if knobs.ranking == "plackett_luce":
            if "margins" in batch.extras:
                raise UserError(
                    "the data has margins, which algorithm.ranking 'plackett_luce' has no place "
                    "for; use 'all_pairs', or leave the column out."
                )
            values = losses.plackett_luce(rewards, where=here)
            values += knobs.center_coefficient * jnp.square(jnp.where(here, rewards, 0).sum(1))
        else:
            values = _all_pairs(knobs, rewards, batch)
        weights = here[:, 0].astype(rewards.dtype)
        return Objective(Metric(values, weights), _metrics(rewards, here))

    return Algorithm(_of_labels if knobs.ranking == "binary" else loss)


def _of_labels(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
    """The likelihood of the labels of single responses."""
    rewards, here = response_scalars(output, batch), present(batch)
    values, good = rewards[:, 0], desirable(batch)
    weights = here[:, 0].astype(rewards.dtype)
    metrics = {
        "accuracy": Metric((1 + jnp.sign(jnp.where(good, values, -values))) / 2, weights),
        "good_reward": Metric(values, jnp.where(good, weights, 0)),
        "bad_reward": Metric(values, jnp.where(good, 0, weights)),
        **_levels(rewards, here),
    }
    return Objective(Metric(losses.binary_reward(values, good), weights), metrics)


def _all_pairs(knobs: ConfigDict, rewards: Array, batch: PackedBatch) -> Array:
    margins = batch.extras.get("margins")
    margin = jnp.zeros(len(rewards)) if margins is None else jnp.asarray(margins)
    steps = -jnp.arange(rewards.shape[1], dtype=rewards.dtype)

    def pair(chosen: Array, rejected: Array, place: Array, other: Array) -> Array:
        # The margin is between neighbours, so it grows with the distance in rank.
        return losses.bradley_terry(
            chosen,
            rejected,
            margin=margin[:, None] * (place - other),
            center_coefficient=knobs.center_coefficient,
        )

    places = jnp.broadcast_to(steps[None], rewards.shape)
    return losses.all_pairs(pair, rewards, places, where=present(batch))


def _metrics(rewards: Array, here: Array) -> dict[str, Metric]:
    """TRL's names, over all pairs of responses; a tied pair counts one half in the accuracy."""
    better, worse = np.triu_indices(rewards.shape[1], 1)
    pairs = here[:, worse].astype(rewards.dtype)
    margins = jnp.where(here[:, worse], rewards[:, better] - rewards[:, worse], 0)
    return {
        "margin": Metric(margins, pairs),
        "accuracy": Metric((1 + jnp.sign(margins)) / 2, pairs),
        **_levels(rewards, here),
    }


def _levels(rewards: Array, here: Array) -> dict[str, Metric]:
    """The mean reward of all responses, and the lowest and the highest one."""
    groups = here[:, 0].astype(rewards.dtype)
    count = here.sum(1).astype(rewards.dtype)
    mean = jnp.where(here, rewards, 0).sum(1) / jnp.maximum(count, 1)
    lowest = jnp.where(here, rewards, jnp.inf).min()
    highest = jnp.where(here, rewards, -jnp.inf).max()
    return {
        "mean_reward": Metric(mean, count),
        "min_reward": Metric(jnp.broadcast_to(lowest, groups.shape), groups),
        "max_reward": Metric(jnp.broadcast_to(highest, groups.shape), groups),
    }
