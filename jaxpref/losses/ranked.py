"""Losses on K responses of one prompt, the best first along the last axis."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses.inputs import check_range, checked, per_token
from jaxpref.losses.pairs import Scalar
from jaxpref.losses.reward import plackett_luce


class RankedOutput(NamedTuple):
    """What a loss on ranked responses returns.

    Attributes:
      losses: the loss of each prompt.
      rewards: the values that the loss brings into the right order; no gradient.
    """

    losses: Float[Array, "*batch"]
    rewards: Float[Array, "*batch responses"]


def rrhf(
    policy_logps: Float[Array, "*batch responses"],
    lengths: Int[Array, "*batch responses"],
    scores: Float[Array, "*batch responses"],
    *,
    rank_weight: Scalar = 1.0,
) -> RankedOutput:
    """RRHF: mean log-probabilities in the order of the scores, and SFT on the best response.

    Formula, with $p_i = \\frac{1}{|y_i|} \\log \\pi_\\theta(y_i|x)$ and the best response $b$:
    $L = w \\sum_{s_i < s_j} \\max(0, p_i - p_j) - \\log \\pi_\\theta(y_b|x)$.

    Source: Yuan et al. 2023 (arXiv 2304.05302), equations 2 to 5, which add both terms with
    weight 1; their code has a weight for the first one.

    Args:
      policy_logps: summed log-probability of each response, in nats.
      lengths: tokens of each response; 0 for a response that is absent.
      scores: $s$, the score of each response. Responses with equal scores are not ranked
        against each other; of those with the highest score the first one is the best.
      rank_weight: $w$.

    Returns:
      `RankedOutput(losses, rewards)` in float32; rewards are $p$.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("rrhf", least=0, rank_weight=rank_weight)
    logps, counts, scores = checked(
        "rrhf", policy_logps=policy_logps, lengths=lengths, scores=scores
    )
    present = counts > 0
    logps = jnp.where(present, logps, 0.0)
    means = per_token(logps, counts)
    worse = scores[..., :, None] < scores[..., None, :]
    both = present[..., :, None] & present[..., None, :]
    violations = jax.nn.relu(means[..., :, None] - means[..., None, :])
    ranking = jnp.where(worse & both, violations, 0.0).sum((-1, -2))
    best = jnp.argmax(jnp.where(present, scores, -jnp.inf), axis=-1)
    nll = -jnp.take_along_axis(logps, best[..., None], -1)[..., 0]
    return RankedOutput(rank_weight * ranking + nll, jax.lax.stop_gradient(means))


def plackett_luce_dpo(
    policy_logps: Float[Array, "*batch responses"],
    reference_logps: Float[Array, "*batch responses"],
    *,
    beta: Scalar = 0.1,
    where: Bool[Array, "*batch responses"] | None = None,
) -> RankedOutput:
    """DPO for rankings: the Plackett-Luce likelihood of implicit rewards.

    Formula, with rewards $\\hat r$ as in `dpo` and responses ranked best first:
    $L = -\\sum_k \\log \\frac{\\exp \\hat r_k}{\\sum_{j \\ge k} \\exp \\hat r_j}$; for two
    responses it is DPO's.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 20 (appendix A.3).

    Args:
      policy_logps: summed log-probability of each response under the policy, in nats.
      reference_logps: the same under the frozen reference; no gradient.
      beta: inverse temperature of the implicit reward.
      where: True for the responses that are present; None if all are.

    Returns:
      `RankedOutput(losses, rewards)` in float32.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("plackett_luce_dpo", above=0, beta=beta)
    policy, reference = checked(
        "plackett_luce_dpo", policy_logps=policy_logps, reference_logps=reference_logps
    )
    rewards = beta * (policy - jax.lax.stop_gradient(reference))
    return RankedOutput(plackett_luce(rewards, where=where), jax.lax.stop_gradient(rewards))


def all_pairs(
    loss: Callable[..., Float[Array, "*batch pairs"]],
    *values: Float[Array, "*batch responses"],
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    """The mean of a pairwise loss over all pairs of K ranked responses.

    Source: for reward models, Ouyang et al. 2022 (arXiv 2203.02155), equation 1, the mean
    over K choose 2 pairs.

    Args:
      loss: takes, for each array in `values`, the values of the better responses and then
        those of the worse ones. With `policy` and `reference` as values it is called as
        `loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected)`.
      values: arrays with one value per response, ranked best first along the last axis.
      where: True for the responses that are present; None if all are.

    Returns:
      One value per prompt; 0 where fewer than two responses are present.

    >>> import jax.numpy as jnp
    >>> all_pairs(lambda chosen, rejected: rejected - chosen, jnp.array([3.0, 2.0, 0.0])).item()
    -2.0
    """
    if where is not None:
        # This comes before the loss, because the value of an absent response may be anything,
        # even NaN, and must not reach a gradient.
        values = tuple(jnp.where(where, x, 0.0) for x in values)
    first, second = np.triu_indices(values[0].shape[-1], 1)
    pairs = [side for x in values for side in (x[..., first], x[..., second])]
    losses = loss(*pairs)
    counts = jnp.ones_like(losses)
    if where is not None:
        both = where[..., first] & where[..., second]
        losses, counts = jnp.where(both, losses, 0.0), both.astype(losses.dtype)
    return losses.sum(-1) / jnp.maximum(counts.sum(-1), 1)
