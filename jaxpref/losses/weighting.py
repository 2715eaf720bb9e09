"""Weights on tokens, responses and pairs, which losses or log-probs are multiplied by."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses.inputs import check_range, checked
from jaxpref.losses.pairs import Scalar


def length_desensitized(
    index: Int[Array, "*tokens"], shared_length: Int[Array, "*tokens"], *, alpha: Scalar
) -> Float[Array, "*tokens"]:
    """LD-DPO's weight of each token's log-probability in its response's sum.

    Formula: 1 for the first $\\min(|y_w|, |y_l|)$ tokens of a response, $\\alpha$ for the rest.

    Source: Liu et al. 2024 (arXiv 2409.06411), equation 10.

    Args:
      index: the place of each token in its response, from 0.
      shared_length: the length of the shorter response of each token's pair, in tokens.
      alpha: $\\alpha$, from 0 to 1; with 1 the loss is plain DPO.

    Raises:
      ValueError: alpha is below 0 or above 1.
    """
    check_range("length_desensitized", least=0, most=1, alpha=alpha)
    return jnp.where(index < shared_length, 1.0, alpha)


def wpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    *,
    largest: Scalar = math.inf,
) -> Float[Array, "*batch"]:
    """WPO's weight of each pair: how likely the policy is to give these two responses.

    Formula: $w = \\exp(\\bar \\ell_w + \\bar \\ell_l)$ with $\\bar \\ell = \\frac{1}{|y|} \\sum_t
    \\log \\frac{\\pi_\\theta(y_t|\\cdot)}{\\sum_v \\pi_\\theta(v|\\cdot)^2}$; the fraction
    is 1 on average for the policy's own samples.

    Source: Zhou et al. 2024 (arXiv 2406.11827), equation 2, with the alignment that the paper
    calls sampled. In the authors' code no weight exceeds 1.

    Args:
      chosen_logps: $\\bar \\ell$ of each chosen response, in nats; no gradient. See
        `logprobs.token_logprobs_and_collision`.
      rejected_logps: the same for the rejected responses.
      largest: an upper bound of the weights, above 0.

    Raises:
      ValueError: the shapes differ, or `largest` is not above 0.
    """
    check_range("wpo", above=0, largest=largest)
    chosen, rejected = checked("wpo", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(chosen + rejected), largest))


def truncated_importance(
    policy_logps: Float[Array, "*batch"],
    sampler_logps: Float[Array, "*batch"],
    *,
    largest: Scalar = 2.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """The weight of what one program has sampled and another one trains, with a cap.

    Formula: $w = \\min(\\pi_{old}(y) / \\pi_{sampler}(y), c)$.

    Both are the same policy, computed otherwise: by decoding and in a packed batch, in another
    dtype, or sampled with top-k, top-p or min-p. The mean of what is sampled, each times its weight
    without the cap, is the mean under $\\pi_{old}$; the cap bounds the variance and biases it.

    Source: Ionides 2008, "Truncated Importance Sampling" (Journal of Computational and Graphical
    Statistics 17); for language models Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training" (fengyao.notion.site/off-policy-rl).

    Args:
      policy_logps: of each token or response under the policy as it is trained, before the
        update, in nats; no gradient.
      sampler_logps: the same under the distribution that it was drawn from; no gradient.
      largest: $c$, the largest weight, above 0.
      where: which of them are there; None for all.

    Returns:
      The weights in float32 (float64 stays float64), 0 where nothing is.

    Raises:
      ValueError: the shapes differ, or `largest` is not above 0.

    >>> old, sampler = jnp.log(jnp.array([0.3, 0.9])), jnp.log(jnp.array([0.4, 0.1]))
    >>> [round(float(x), 4) for x in truncated_importance(old, sampler)]
    [0.75, 2.0]
    """
    check_range("truncated_importance", above=0, largest=largest)
    policy, sampler = checked(
        "truncated_importance", policy_logps=policy_logps, sampler_logps=sampler_logps
    )
    here = jnp.ones(policy.shape, bool) if where is None else where
    weights = jnp.minimum(jnp.exp(policy - sampler), largest)
    return jax.lax.stop_gradient(jnp.where(here, weights, 0))
