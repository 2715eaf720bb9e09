"""Rewards of sampled responses: a trained reward model, a Python function, or several of them.

A reward is a function of `Sampled` that gives one float32 a response. `build` makes the one that a
config asks for; `shaping` has what becomes of it before it is learned from, as pure functions.
`open_scorer` opens what scores the responses of a file, a policy's implicit reward among it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from jaxpref import config as config_lib, weights
from jaxpref.errors import UserError
from jaxpref.rewards import shaping
from jaxpref.rewards.base import Reward, Sampled, checked, shown
from jaxpref.rewards.function import call, columns_of, find, from_function
from jaxpref.rewards.implicit import ImplicitReward
from jaxpref.rewards.model import RewardModel, check_template, from_model, rewards_of
from jaxpref.rewards.scoring import Scorer, score
from jaxpref.rewards.shaping import Moments, no_moments
from jaxpref.workdir import AnyPath, as_path

__all__ = [
    "ImplicitReward",
    "Moments",
    "Reward",
    "RewardModel",
    "Rewards",
    "Sampled",
    "Scorer",
    "Scores",
    "build",
    "call",
    "check_template",
    "checked",
    "columns_of",
    "find",
    "from_function",
    "from_model",
    "no_moments",
    "open_scorer",
    "rewards_of",
    "score",
    "shaping",
    "shown",
]


class Scores(NamedTuple):
    """What rewards say of responses.

    Attributes:
      total: the weighted sum, one value a response.
      by_name: what each reward says by itself, without its weight.
    """

    total: Float[np.ndarray, " responses"]
    by_name: dict[str, Float[np.ndarray, " responses"]]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards with their weights, and what becomes of their sum.

    Attributes:
      parts: the rewards by name.
      weights: the factor of each in the sum, by name.
      knobs: the group `reward` of a config, see `REWARD_KNOBS`.
    """

    parts: Mapping[str, Reward]
    weights: Mapping[str, float]
    knobs: ConfigDict

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards, under which they are logged."""
        return tuple(self.parts)

    def __call__(self, sampled: Sampled) -> Scores:
        """The rewards of responses.

        Raises:
          UserError: a reward function raises or gives what is no reward, or a reward model gives
            NaN; the message says for which prompt.
        """
        by_name = {
            name: checked(f"the reward {name!r}", reward(sampled), sampled)
            for name, reward in self.parts.items()
        }
        total = np.zeros(len(sampled.responses))
        for name, values in by_name.items():
            total += self.weights[name] * values
        return Scores(checked("the sum of the rewards", total, sampled), by_name)

    def shaped(
        self, scores: Scores, sampled: Sampled, moments: Moments
    ) -> Float[np.ndarray, " responses"]:
        """The rewards to learn from: normalised, then clipped, then less the penalties.

        Args:
          scores: of the responses.
          sampled: the responses.
          moments: of all sums of rewards so far, see `shaping.update`.
        """
        knobs, values = self.knobs, scores.total
        if knobs["normalize"]:
            values = shaping.normalise(values, moments)
        return shaping.penalised(
            shaping.clip(values, knobs["clip"]),
            sampled.lengths,
            sampled.finished,
            length_penalty=knobs["length_penalty"],
            truncation_penalty=knobs["truncation_penalty"],
        )


def open_scorer(path: str | AnyPath, *, max_length: int = 0, chat_template: str = "") -> Scorer:
    """Opens what scores responses: a reward model, or the implicit reward of a policy's run.

    Args:
      path: see `RewardModel` and `ImplicitReward`; of a workdir its run's method says which.
      max_length: see `RewardModel`.
      chat_template: see `tokenizer.chat_template`; empty for its own.

    Raises:
      UserError: nothing there gives rewards.
    """
    run = weights.config_of(as_path(path))
    of_policy = run is not None and run.algorithm.name != "reward"
    kind = ImplicitReward if of_policy else RewardModel
    return kind(path, max_length=max_length, chat_template=chat_template)


def build(
    reward: ConfigDict,
    tokenizer: Any,
    *,
    max_length: int,
    mesh: Mesh | None = None,
    conversations: bool = False,
) -> Rewards:
    """The rewards that a config asks for; all are opened before any weights are loaded.

    Args:
      reward: the group `reward` of a config.
      tokenizer: the policy's.
      max_length: tokens of the longest prompt with a response.
      mesh: over which reward models are sharded; None for all devices.
      conversations: whether prompts are lists of messages.

    Raises:
      UserError: a reward cannot be had, or not with this policy.
    """
    sources = config_lib.reward_sources(reward)
    models = {
        source["name"]: _open(source["path"], reward, tokenizer, max_length, mesh, conversations)
        for source in sources
        if source["path"]
    }
    functions = {s["name"]: find(s["function"]) for s in sources if s["function"]}
    parts = {
        name: from_function(f"the reward function {name!r}", functions[name])
        if name in functions
        else from_model(models[name], tokenizer, rows=reward.batch_size, dtype=reward.dtype)
        for name in (source["name"] for source in sources)
    }
    weights = {source["name"]: float(source["weight"]) for source in sources}
    return Rewards(parts, weights, reward)


def _open(
    path: str,
    reward: ConfigDict,
    tokenizer: Any,
    max_length: int,
    mesh: Mesh | None,
    conversations: bool,
) -> RewardModel:
    model = RewardModel(path, max_length=reward.max_length, at_least=max_length, mesh=mesh)
    if model.row_length < max_length and model.reads_ids(tokenizer, conversations):
        raise UserError(
            f"reward.max_length is {reward.max_length}, but a prompt with a response may have "
            f"{max_length} tokens, all of which the reward model {path} is to see: raise it, or "
            "leave it at 0."
        )
    check_template(model, tokenizer, conversations)
    return model
