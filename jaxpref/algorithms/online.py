"""What the train loop needs of a method that learns from what the policy samples."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpref import packing
from jaxpref.algorithms.base import Algorithm
from jaxpref.measurements import Metric

Tokens = Float[Array, "shards tokens"]
Controls = Mapping[str, Float[Array, ""]]


class Rollout(NamedTuple):
    """All tokens that were sampled in a step, as the tables of its packed batches have them.

    Attributes:
      response: whose token it is, `prompt * K + k`; prompts * K for padding.
      logps: log-probs under the policy that sampled, as training computes them.
      reference_logps: under the reference; None without one.
      values: the critic's, read before each token; None without a critic.
      rewards: of the responses.
      greedy_rewards: of the greedy response to each prompt; None if there is none.
    """

    response: Int[Array, "shards tokens"]
    logps: Tokens
    reference_logps: Tokens | None
    values: Tokens | None
    rewards: Float[Array, "prompts samples"]
    greedy_rewards: Float[Array, " prompts"] | None

    @property
    def where(self) -> Bool[Array, "shards tokens"]:
        """Which tokens are there."""
        return self.response < self.rewards.size

    @property
    def ends(self) -> Bool[Array, "shards tokens"]:
        """Which tokens are the last of their response."""
        padding = jnp.full_like(self.response[:, :1], self.rewards.size)
        following = jnp.concatenate([self.response[:, 1:], padding], axis=1)
        return self.where & (self.response != following)

    @property
    def log_ratios(self) -> Tokens:
        """Log-probs under the policy less those under the reference; 0 without one."""
        if self.reference_logps is None:
            return jnp.zeros_like(self.logps)
        return jnp.where(self.where, self.logps - self.reference_logps, 0)

    def summed(self, values: Tokens) -> Float[Array, "prompts samples"]:
        """Values of tokens added up over each response."""
        sums = packing.response_sums(values, self.response, self.rewards.size)
        return sums.reshape(self.rewards.shape)

    def on_tokens(self, values: Float[Array, "prompts samples"]) -> Tokens:
        """A response's value on each of its tokens; 0 on padding."""
        padded = jnp.concatenate([values.ravel(), jnp.zeros(1, values.dtype)])
        return padded[self.response]


class Learned(NamedTuple):
    """What is to be learned from a rollout.

    Attributes:
      advantages: of each token.
      returns: what the critic should have said before each token; None without a critic.
      controls: what the run carries to the next step.
      metrics: what is worth logging.
    """

    advantages: Tokens
    returns: Tokens | None
    controls: dict[str, Float[Array, ""]]
    metrics: dict[str, Metric]


class Online(NamedTuple):
    """A method that learns from what the policy samples.

    It either weighs all tokens, by `learned`, or chooses responses, by `choose`.

    Attributes:
      policy: the loss of the policy's updates.
      learned: what is to be learned from a rollout, and what is carried on; None for a method
        that chooses.
      choose: from the rewards of a prompt's responses to those that are trained on, in order; none
        if the prompt is left out. None for a method that weighs tokens.
      critic: the loss of the critic's updates; None for a method without one.
      controls: what is carried to the first step.
      greedy: whether it needs the greedy response to each prompt, which is not trained on.
      pool: whether the best response of all steps so far to a prompt takes part in the choice.
      epochs: passes over the responses of a step.
      minibatches: updates in a pass.
      stop_kl: KL of a token to the policy that sampled at which updates stop; 0: never.
      largest_kl: KL of a response to the reference at which the run stops; 0: never.
    """

    policy: Algorithm
    learned: Callable[[Rollout, Controls], Learned] | None = None
    choose: Callable[[Float[np.ndarray, " samples"]], tuple[int, ...]] | None = None
    critic: Algorithm | None = None
    controls: Mapping[str, float] = {}
    greedy: bool = False
    pool: bool = False
    epochs: int = 1
    minibatches: int = 1
    stop_kl: float = 0.0
    largest_kl: float = 0.0
