"""Methods that choose among the sampled responses, and then learn as from data.

Rejection sampling fine-tunes on the best response (Touvron et al. 2023, arXiv 2307.09288, section
3.2.3); online DPO compares the best with the worst (Guo et al. 2024, arXiv 2402.04792), by DPO's
loss or another one on pairs.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jaxpref.algorithms import pairs, sft
from jaxpref.algorithms.base import Algorithm
from jaxpref.algorithms.online import Online
from jaxpref.methods import METHODS

Choice = Callable[[Float[np.ndarray, " samples"]], tuple[int, ...]]


def build(config: ConfigDict) -> Online:
    """The method that a checked config names."""
    knobs = config.algorithm
    if knobs.name == "rejection_sampling":
        return Online(sft.build(knobs), choose=best, pool=knobs.pool)
    return Online(_pair_loss(knobs), choose=best_and_worst)


def best(rewards: Float[np.ndarray, " samples"]) -> tuple[int, ...]:
    """The response with the highest reward, the first of several."""
    return (int(np.argmax(rewards)),)


def best_and_worst(rewards: Float[np.ndarray, " samples"]) -> tuple[int, ...]:
    """The responses with the highest and the lowest reward; none if all are equal."""
    if rewards.max() == rewards.min():
        return ()
    return int(np.argmax(rewards)), int(np.argmin(rewards))


def _pair_loss(knobs: ConfigDict) -> Algorithm:
    """A method on pairs by the name `knobs.loss`, with its own defaults but for beta."""
    own = {name: knob.default for name, knob in METHODS[knobs.loss].knobs.items()}
    if "beta" in own:
        own["beta"] = knobs.beta
    return pairs.build(ConfigDict({"name": knobs.loss, **own}))
