"""Optax transformations from the config."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from jaxpref.trainable import path_of

# Ends of the paths of parameters that are never decayed: norms' scales, which belong near 1, and
# biases, a norm's own (`bias`) and a product's (`query_bias`).
_NOT_DECAYED = r"(^|[/_])(scale|bias)$"

Schedule = Callable[[Any], Any]


def build(config: ConfigDict, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer and its learning rate by step.

    Args:
      config: the group `optimizer` of a checked config.
      steps: updates in all, at which a decaying schedule reaches 0.
    """
    schedule = learning_rate(config, steps)
    if config.name == "adamw":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    else:
        # PyTorch's RMSprop: epsilon is outside the root, and there is no bias correction.
        scale = optax.chain(
            optax.scale_by_rms(decay=config.b2, eps=config.epsilon, eps_in_sqrt=False),
            optax.trace(config.b1) if config.b1 else optax.identity(),
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    return optax.chain(clip, scale, decay, optax.scale_by_learning_rate(schedule)), schedule


def learning_rate(config: ConfigDict, steps: int) -> Schedule:
    """A linear warm-up whose first step is above 0, then the schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to, as a tree of booleans: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search(_NOT_DECAYED, path_of(path)), params
    )
