"""Losses that add up others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.language_modeling import nll
from jaxpref.losses.pairs import PreferenceOutput, Scalar
from jaxpref.losses.preference import bco, dpo


def mpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    chosen_lengths: Int[Array, "*batch"],
    shift: Scalar,
    beta: Scalar = 0.1,
    dpo_weight: Scalar = 0.8,
    bco_weight: Scalar = 0.2,
    nll_weight: Scalar = 1.0,
) -> PreferenceOutput:
    """Mixed Preference Optimization: DPO's, BCO's and SFT's loss of the same pairs.

    Formula: $L = w_p L_{DPO} + w_q L_{BCO} - w_g \\log \\pi(y_w | x) / |y_w|$.

    Source: Wang et al. 2024 (arXiv 2411.10442), equation 1, whose quality loss is BCO's.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      chosen_lengths: tokens of the chosen responses; 0 counts as 1.
      shift: see `bco`.
      beta: inverse temperature of the implicit reward.
      dpo_weight: $w_p$.
      bco_weight: $w_q$.
      nll_weight: $w_g$.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    logps = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    preference = dpo(*logps, beta=beta)
    quality = bco(*logps, shift=shift, beta=beta)
    likelihood = nll_weight * nll(policy_chosen_logps) / jnp.maximum(chosen_lengths, 1)
    total = dpo_weight * preference.losses + bco_weight * quality.losses
    return preference._replace(losses=total + likelihood)
