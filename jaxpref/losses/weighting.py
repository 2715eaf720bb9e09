"""Weights on tokens and on pairs, for losses that are computed from weighted log-probs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.inputs import check_range, checked
from jaxpref.losses.preference import Scalar


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
