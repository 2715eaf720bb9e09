"""Losses of reward models, and the mean and uncertainty of an ensemble of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses.inputs import check_range, checked, in_float32
from jaxpref.losses.pairs import Scalar


def bradley_terry(
    chosen_rewards: Float[Array, "*batch"],
    rejected_rewards: Float[Array, "*batch"],
    *,
    margin: Float[Array, "*batch"] | None = None,
    center_coefficient: Scalar = 0.0,
) -> Float[Array, "*batch"]:
    """The negative log-likelihood of preferences under the Bradley-Terry model.

    Formula, with a margin $m$ and a centering coefficient $c$:
    $L = -\\log \\sigma(r_w - r_l - m) + c (r_w + r_l)^2$.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for two responses; the margin
    is Llama 2's (arXiv 2307.09288, equation 2), centering Eisenstein et al. 2023's (arXiv
    2312.09244, equation 2).

    Args:
      chosen_rewards: the reward of each chosen response.
      rejected_rewards: the same for the rejected responses.
      margin: how much better each chosen response is; None for 0.
      center_coefficient: how strongly the sum of a pair's rewards is pulled to 0. Without
        it the rewards are only determined up to a constant.

    Returns:
      The loss of each pair in float32, in nats; with centering a squared reward is added.

    Raises:
      ValueError: the shapes differ, or the coefficient is negative.

    >>> import jax.numpy as jnp
    >>> print(bradley_terry(jnp.array([1.0]), jnp.array([1.0])))
    [0.6931472]
    """
    check_range("bradley_terry", least=0, center_coefficient=center_coefficient)
    margin = jnp.zeros_like(chosen_rewards) if margin is None else margin
    chosen, rejected, margin = checked(
        "bradley_terry",
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margin=margin,
    )
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return losses + center_coefficient * jnp.square(chosen + rejected)


def plackett_luce(
    rewards: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    """The negative log-likelihood of rankings under the Plackett-Luce model.

    Formula, with responses ranked best first:
    $L = -\\sum_k \\log \\frac{\\exp r_k}{\\sum_{j \\ge k} \\exp r_j}$; for two responses it is
    Bradley-Terry's.

    Source: Plackett 1975 and Luce 1959, as in Rafailov et al. 2023 (arXiv 2305.18290),
    equation 18 (appendix A.3).

    Args:
      rewards: of the responses, ranked best first along the last axis.
      where: True for the responses that are present; None if all are.

    Returns:
      The loss of each prompt, in nats, in float32.
    """
    rewards = in_float32(rewards)
    if where is not None:
        # This is far below any reward, so that absent responses add nothing to a sum of
        # exponentials; and it is finite, so that gradients are finite too.
        rewards = jnp.where(where, rewards, jnp.finfo(rewards.dtype).min / 4)
    following = jax.lax.cumlogsumexp(rewards, axis=rewards.ndim - 1, reverse=True)
    terms = following - rewards
    return (terms if where is None else jnp.where(where, terms, 0.0)).sum(-1)


def binary_reward(
    rewards: Float[Array, "*batch"], desirable: Bool[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The negative log-likelihood of labels, good or not, with the reward as their log-odds.

    Formula: $L = -\\log \\sigma(r)$ for a response that is labelled good, and
    $L = -\\log \\sigma(-r)$ for another one. Unlike `bradley_terry` it determines the level of the
    rewards: 0 is an even chance.

    Source: logistic regression. Outcome-supervised reward models are trained so (Lightman et al.
    2023, arXiv 2305.20050, section 2.5).

    Args:
      rewards: the reward of each response.
      desirable: the label of each response.

    Returns:
      The loss of each response in nats, in float32 (float64 stays float64).

    Raises:
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp
    >>> print(binary_reward(jnp.array([0.0]), jnp.array([True])))
    [0.6931472]
    """
    sign = jnp.where(desirable, 1, -1).astype(rewards.dtype)
    rewards, sign = checked("binary_reward", rewards=rewards, desirable=sign)
    return -jax.nn.log_sigmoid(sign * rewards)


def ensemble_mean(rewards: Float[Array, "members *batch"]) -> Float[Array, "*batch"]:
    """The mean of an ensemble's rewards, in float32."""
    return in_float32(rewards).mean(0)


def ensemble_uncertainty(rewards: Float[Array, "members *batch"]) -> Float[Array, "*batch"]:
    """The variance of an ensemble's rewards over its members, in float32.

    Source: Coste et al. 2023 (arXiv 2310.02743), section 4: uncertainty-weighted
    optimisation maximises the mean less a multiple of this.
    """
    return in_float32(rewards).var(0)
