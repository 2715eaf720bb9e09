"""Losses on preference pairs against a frozen reference: DPO and its kin.

All losses here take the summed log-probability of the chosen and of the rejected response
under the policy and under the reference, in nats and of one shape, as `dpo` describes. No
gradient flows into the reference. All return one value per pair.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.divergences import reverse_kl
from jaxpref.losses.inputs import check_range, check_smoothing, checked, per_token
from jaxpref.losses.pairs import (
    PreferenceOutput,
    Scalar,
    implicit_rewards,
    log_ratios,
    smoothed_logistic,
    without_gradient,
)


def dpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"] | None,
    reference_rejected_logps: Float[Array, "*batch"] | None,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    reference_free: bool = False,
    divergence: Callable[[Array], Array] = reverse_kl,
    chosen_lengths: Int[Array, "*batch"] | None = None,
    rejected_lengths: Int[Array, "*batch"] | None = None,
) -> PreferenceOutput:
    """Direct Preference Optimization: a logistic loss on the implicit reward margin.

    Formula, with $\\hat r(x, y) = \\beta \\log \\frac{\\pi_\\theta(y|x)}{\\pi_{ref}(y|x)}$,
    $m = \\hat r(x, y_w) - \\hat r(x, y_l)$ and label smoothing $\\epsilon$:
    $L = -(1 - \\epsilon) \\log \\sigma(m) - \\epsilon \\log \\sigma(-m)$.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7. Label smoothing is
    conservative DPO: each label is wrong with probability $\\epsilon$. Another divergence
    than the reverse KL is f-DPO (Wang et al. 2023, arXiv 2309.16240, theorem 1), where
    $\\hat r = \\beta f'(\\pi_\\theta / \\pi_{ref})$. With lengths, each log-ratio is divided
    by its response's length: the length-normalised form of Tulu 3 (arXiv 2411.15124,
    equation 6).

    Args:
      policy_chosen_logps: summed log-probability of each chosen response under
        the policy, in nats; any batch shape.
      policy_rejected_logps: the same for the rejected responses.
      reference_chosen_logps: the chosen responses under the frozen reference.
        No gradient flows into it. May be None if `reference_free`.
      reference_rejected_logps: the same for the rejected responses.
      beta: inverse temperature of the implicit reward; the strength of the
        pull towards the reference.
      label_smoothing: probability that a label is wrong, from 0 to below 0.5.
      reference_free: drop the reference, as if it gave every response the same
        probability. The rewards are then beta times the policy's log-probability.
      divergence: from log-ratios to $f'$, one of `losses.divergences`.
      chosen_lengths: tokens of each chosen response, to divide by; None for sums.
      rejected_lengths: the same for the rejected responses.

    Returns:
      `PreferenceOutput(losses, chosen_rewards, rejected_rewards)`, in float32 (float64
      stays float64), each shaped like the inputs; losses in nats. Finite, with finite
      gradients, for any finite inputs.

    Raises:
      ValueError: the shapes differ, the reference is missing, only one length is given,
        or a parameter is out of range.

    >>> import jax.numpy as jnp
    >>> at_reference = jnp.array([-12.0])
    >>> print(dpo(at_reference, at_reference, at_reference, at_reference).losses)
    [0.6931472]
    """
    if reference_free:
        reference_chosen_logps = jnp.zeros_like(policy_chosen_logps)
        reference_rejected_logps = jnp.zeros_like(policy_rejected_logps)
    if reference_chosen_logps is None or reference_rejected_logps is None:
        raise ValueError(
            "dpo needs the reference's log-probs of both responses; got None. "
            "Pass them, or reference_free=True to do without a reference."
        )
    check_range("dpo", above=0, beta=beta)
    check_smoothing("dpo", label_smoothing)
    chosen, rejected = log_ratios(
        "dpo",
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    chosen, rejected = _per_token("dpo", chosen, rejected, chosen_lengths, rejected_lengths)
    chosen, rejected = beta * divergence(chosen), beta * divergence(rejected)
    return without_gradient(smoothed_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def robust_dpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.1,
) -> PreferenceOutput:
    """Robust DPO: an unbiased estimate of DPO's loss from labels that are sometimes flipped.

    Formula: $L = \\frac{-(1 - \\epsilon) \\log \\sigma(m) + \\epsilon \\log \\sigma(-m)}
    {1 - 2 \\epsilon}$, whose mean over flips with probability $\\epsilon$ is DPO's loss.

    Source: Ray Chowdhury et al. 2024 (arXiv 2403.00409), equation 12.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.
      label_smoothing: the share of flipped labels, from 0 to below 0.5.

    Returns:
      See `dpo`; a loss may be negative.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_smoothing("robust_dpo", label_smoothing)
    chosen, rejected = implicit_rewards(
        "robust_dpo",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    margins = chosen - rejected
    clean, flipped = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = label_smoothing * flipped - (1 - label_smoothing) * clean
    return without_gradient(losses / (1 - 2 * label_smoothing), chosen, rejected)


def ipo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    chosen_lengths: Int[Array, "*batch"] | None = None,
    rejected_lengths: Int[Array, "*batch"] | None = None,
) -> PreferenceOutput:
    """IPO: regresses the difference of log-ratios to a finite margin.

    Formula, with $h = \\log \\frac{\\pi_\\theta(y_w|x) \\pi_{ref}(y_l|x)}
    {\\pi_\\theta(y_l|x) \\pi_{ref}(y_w|x)}$: $L = (h - \\frac{1}{2 \\beta})^2$.

    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17, whose $\\tau$ is beta. The
    paper's log-ratios are of whole responses. TRL divides each by its response's length and
    says that the authors confirmed this; here that is done if the lengths are given.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: regularisation; the target margin is $1 / (2 \\beta)$.
      chosen_lengths: tokens of each chosen response, to divide by; None for the paper's form.
      rejected_lengths: the same for the rejected responses.

    Returns:
      See `dpo`; losses in squared nats.

    Raises:
      ValueError: the shapes differ, only one length is given, or beta is not above 0.
    """
    check_range("ipo", above=0, beta=beta)
    chosen, rejected = log_ratios(
        "ipo",
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    chosen, rejected = _per_token("ipo", chosen, rejected, chosen_lengths, rejected_lengths)
    losses = jnp.square(chosen - rejected - 1 / (2 * beta))
    return without_gradient(losses, beta * chosen, beta * rejected)


def hinge(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
) -> PreferenceOutput:
    """SLiC's hinge on the implicit reward margin: $L = \\max(0, 1 - m)$, $m$ as in `dpo`.

    Source: Liu et al. 2023 (arXiv 2309.06657), equation 11 (hinge-norm), after SLiC-HF
    (arXiv 2305.10425); `slic_hf` is the original, without a reference.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature; the wanted margin of log-ratios is $1 / \\beta$.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    chosen, rejected = implicit_rewards(
        "hinge",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return without_gradient(jax.nn.relu(1 - (chosen - rejected)), chosen, rejected)


def exo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 1e-3,
) -> PreferenceOutput:
    """EXO: the reverse KL from the policy's preference to the smoothed label.

    Formula, with $q = \\sigma(m)$, $m$ as in `dpo`:
    $L = q \\log \\frac{q}{1 - \\epsilon} + (1 - q) \\log \\frac{1 - q}{\\epsilon}$.

    Source: Ji et al. 2024 (arXiv 2402.00856), equation 16, for two responses.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.
      label_smoothing: probability that a label is wrong, above 0 (where the divergence
        is infinite) and below 0.5.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("exo", above=0, below=0.5, label_smoothing=label_smoothing)
    chosen, rejected = implicit_rewards(
        "exo",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    margins = chosen - rejected
    log_q, log_not_q = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = jax.nn.sigmoid(margins) * (log_q - jnp.log1p(-label_smoothing))
    losses += jax.nn.sigmoid(-margins) * (log_not_q - jnp.log(label_smoothing))
    return without_gradient(losses, chosen, rejected)


def nca(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
) -> PreferenceOutput:
    """Noise Contrastive Alignment of pairs, which keeps the chosen likelihood from falling.

    Formula, with rewards as in `dpo`:
    $L = -\\log \\sigma(\\hat r_w) - \\frac12 \\log \\sigma(-\\hat r_w)
    - \\frac12 \\log \\sigma(-\\hat r_l)$.

    Source: Chen et al. 2024 (arXiv 2402.05369), equation 12 with two responses.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    chosen, rejected = implicit_rewards(
        "nca",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return without_gradient(-jax.nn.log_sigmoid(chosen) - noise / 2, chosen, rejected)


def sppo_hard(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
) -> PreferenceOutput:
    """SPPO with win probabilities of 1 and 0: each log-ratio is regressed to its own target.

    Formula, with log-ratios $\\rho$:
    $L = (\\rho_w - \\frac{1}{2 \\beta})^2 + (\\rho_l + \\frac{1}{2 \\beta})^2$.

    Source: Wu et al. 2024 (arXiv 2405.00675), equation 4.7, with $\\eta = 1 / \\beta$.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: one over the paper's step size.

    Returns:
      See `dpo`; losses in squared nats.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("sppo_hard", above=0, beta=beta)
    chosen, rejected = log_ratios(
        "sppo_hard",
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    target = 1 / (2 * beta)
    losses = jnp.square(chosen - target) + jnp.square(rejected + target)
    return without_gradient(losses, beta * chosen, beta * rejected)


def apo_zero(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
) -> PreferenceOutput:
    """APO-zero: raises the chosen and lowers the rejected likelihood, each by itself.

    It is meant for chosen responses that are better than what the model says. Formula, with
    rewards as in `dpo`: $L = 1 - \\sigma(\\hat r_w) + \\sigma(\\hat r_l)$.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.

    Returns:
      See `dpo`; losses from 0 to 2.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    chosen, rejected = implicit_rewards(
        "apo_zero",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return without_gradient(jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), chosen, rejected)


def apo_down(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
) -> PreferenceOutput:
    """APO-down: lowers both likelihoods, the rejected one more.

    It is meant for chosen responses that are worse than what the model says. Formula, with
    rewards as in `dpo`: $L = \\sigma(\\hat r_w) + 1 - \\sigma(\\hat r_w - \\hat r_l)$.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.

    Returns:
      See `dpo`; losses from 0 to 2.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    chosen, rejected = implicit_rewards(
        "apo_down",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    losses = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return without_gradient(losses, chosen, rejected)


def discopop(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.05,
    temperature: Scalar = 0.05,
) -> PreferenceOutput:
    """DiscoPOP: the log-ratio modulated loss that an LLM found.

    Formula, with $m$ as in `dpo` and $g = \\sigma(m / \\tau)$:
    $L = -(1 - g) \\log \\sigma(m) + g \\exp(-m)$.

    Source: Lu et al. 2024 (arXiv 2406.08414), equation 5.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.
      temperature: $\\tau$, above 0 and below 1.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("discopop", above=0, below=1, temperature=temperature)
    chosen, rejected = implicit_rewards(
        "discopop",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    margins = chosen - rejected
    logistic = -jax.nn.log_sigmoid(margins) * jax.nn.sigmoid(-margins / temperature)
    # The product of sigmoid and exp is computed with one exponent, because at margins far below
    # 0 the first factor would be 0 and the second one infinite.
    exponential = jnp.exp(jax.nn.log_sigmoid(margins / temperature) - margins)
    return without_gradient(logistic + exponential, chosen, rejected)


def bco(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"],
    reference_rejected_logps: Float[Array, "*batch"],
    *,
    shift: Scalar,
    beta: Scalar = 0.1,
) -> PreferenceOutput:
    """Binary Classifier Optimization of pairs: is a response a chosen or a rejected one?

    Formula, with rewards as in `dpo`:
    $L = -\\log \\sigma(\\hat r_w - \\delta) - \\log \\sigma(-(\\hat r_l - \\delta))$.

    Source: Jung et al. 2024 (arXiv 2404.04656), equation 13. The paper's $\\delta$ is the
    mean reward of all responses, chosen and rejected, of all steps so far; in TRL's pairwise
    form it is 0.

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      shift: $\\delta$; no gradient flows into it.
      beta: inverse temperature of the implicit reward.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    chosen, rejected = implicit_rewards(
        "bco",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    shift = jax.lax.stop_gradient(shift)
    losses = -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)
    return without_gradient(losses, chosen, rejected)


def _per_token(
    loss: str,
    chosen: Array,
    rejected: Array,
    chosen_lengths: Array | None,
    rejected_lengths: Array | None,
) -> tuple[Array, Array]:
    if chosen_lengths is None and rejected_lengths is None:
        return chosen, rejected
    if chosen_lengths is None or rejected_lengths is None:
        raise ValueError(f"{loss} got one of chosen_lengths and rejected_lengths; pass both.")
    checked(loss, chosen=chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    return per_token(chosen, chosen_lengths), per_token(rejected, rejected_lengths)
