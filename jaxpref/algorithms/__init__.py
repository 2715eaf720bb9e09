"""One file a family of methods: a config to an `Algorithm`. Here losses meet models' outputs."""

from collections.abc import Callable

from ml_collections import ConfigDict

from jaxpref.algorithms import (
    pairs,
    policy_gradient,
    ranked,
    reward,
    selection,
    sft,
    unpaired,
)
from jaxpref.algorithms.base import (
    Algorithm,
    LossInputs,
    Objective,
    response_logps,
    response_scalars,
)
from jaxpref.algorithms.online import Learned, Online, Rollout
from jaxpref.algorithms.policy_gradient import token_logps, token_values
from jaxpref.methods import METHODS

__all__ = [
    "Algorithm",
    "Learned",
    "LossInputs",
    "Objective",
    "Online",
    "Rollout",
    "build",
    "build_online",
    "policy_gradient",
    "response_logps",
    "response_scalars",
    "token_logps",
    "token_values",
]

_FAMILIES: dict[str, Callable[[ConfigDict], Algorithm]] = {
    "sft": sft.build,
    "pairs": pairs.build,
    "unpaired": unpaired.build,
    "ranked": ranked.build,
    "reward": reward.build,
}

_ONLINE: dict[str, Callable[[ConfigDict], Online]] = {
    "policy_gradient": policy_gradient.build,
    "selection": selection.build,
}


def build(config: ConfigDict) -> Algorithm:
    """The algorithm that a checked config names; its knobs are the group `algorithm`."""
    return _FAMILIES[METHODS[config.algorithm.name].family](config.algorithm)


def build_online(config: ConfigDict) -> Online:
    """The same for a method that learns from what the policy samples."""
    return _ONLINE[METHODS[config.algorithm.name].family](config)
