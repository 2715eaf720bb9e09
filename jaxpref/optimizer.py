"""Optax transformations from the config."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import DictKey
from ml_collections import ConfigDict

# Parameters by these names are never decayed: a norm's scale belongs near 1.
_NOT_DECAYED = frozenset({"scale", "bias"})

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
        # As PyTorch defines it: epsilon outside the root, no bias correction.
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
    """Which parameters weight decay applies to, as a tree of booleans."""

    def matrix(path: tuple, _: Any) -> bool:
        return not any(isinstance(key, DictKey) and key.key in _NOT_DECAYED for key in path)

    return jax.tree_util.tree_map_with_path(matrix, params)
