"""The most reward for every KL to the reference, where all responses are listed.

The frontier is what `enumerable.optimum` gives for all beta: the reference, tilted by the reward.
How near a policy comes to it says how much of its KL it has spent well.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpref.evaluation.enumerable import Worth, objective, optimum

# Halvings of an interval of the logarithm of 1 / beta.
_STEPS = 100
_LEAST, _MOST = -30.0, 30.0


def best_reward(
    kl: float | Float[Array | np.ndarray, "*points"],
    reference_logps: Float[Array | np.ndarray, " responses"],
    rewards: Float[Array | np.ndarray, " responses"],
) -> Float[Array, "..."]:
    """The highest mean reward of any policy whose KL to the reference is at most `kl`.

    It is found by bisection over beta, since reward and KL of the optimum both grow as beta falls
    (Rafailov et al. 2023, arXiv 2305.18290, equation 4, as the solution of the constrained
    problem).

    Args:
      kl: in nats, at least 0.
      reference_logps: of all responses under the reference, in nats.
      rewards: of all responses.
    """
    reference, rewards = jnp.asarray(reference_logps), jnp.asarray(rewards)
    highest, spread = rewards.max(), jnp.ptp(rewards)

    def worth(log_strength: Array) -> Worth:
        """Of the optimum whose beta is the rewards' spread over this strength."""
        # Below 0, so that however strong a reward is no exponential overflows.
        below = (rewards - highest) / jnp.where(spread > 0, spread, 1)
        best = optimum(reference, jnp.exp(log_strength) * below, beta=1.0)
        return objective(best.logps, reference, rewards, beta=0.0)

    def of_point(kl: Array) -> Array:
        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2
            within = worth(middle).kl <= kl
            return jnp.where(within, middle, low), jnp.where(within, high, middle)

        start = jnp.asarray(_LEAST, reference.dtype), jnp.asarray(_MOST, reference.dtype)
        return worth(jax.lax.fori_loop(0, _STEPS, halve, start)[0]).reward

    kl = jnp.asarray(kl, reference.dtype)
    return jax.vmap(of_point)(kl.reshape(-1)).reshape(kl.shape)


def gain_share(
    reward: float | Float[Array | np.ndarray, "*points"],
    kl: float | Float[Array | np.ndarray, "*points"],
    reference_logps: Float[Array | np.ndarray, " responses"],
    rewards: Float[Array | np.ndarray, " responses"],
) -> Float[Array, "..."]:
    """The reward gained over the reference, as a share of the most that its KL allows.

    Args:
      reward: mean rewards of policies.
      kl: of these policies to the reference, in nats.
      reference_logps: of all responses under the reference, in nats.
      rewards: of all responses.

    Returns:
      1 on the frontier, and where nothing can be gained; 0 for the reference's reward.
    """
    before = (jnp.exp(jnp.asarray(reference_logps)) * jnp.asarray(rewards)).sum()
    most = best_reward(kl, reference_logps, rewards) - before
    gained = jnp.asarray(reward) - before
    return jnp.where(most > 0, gained / jnp.where(most > 0, most, 1), 1)
