"""f-divergences for the implicit reward $\\beta f'(\\pi_\\theta / \\pi_{ref})$ of f-DPO.

Each function takes log-ratios $\\log u$ in nats and gives $f'(u)$ up to a constant, which
cancels in a margin. Source: Wang et al. 2023 (arXiv 2309.16240), table 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses.inputs import check_range

# Larger exponents are cut to this, because exp soon overflows in float32. Where an exponent is
# cut, the gradient is 0.
_LARGEST_EXPONENT = 80.0


def reverse_kl(log_ratios: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """$f'(u) = \\log u$, the divergence of PPO and DPO."""
    return log_ratios


def forward_kl(log_ratios: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """$f'(u) = 1 - 1 / u$; log-ratios below -80 count as -80."""
    return 1 - jnp.exp(jnp.minimum(-log_ratios, _LARGEST_EXPONENT))


def jensen_shannon(log_ratios: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """$f'(u) = \\log \\frac{2 u}{1 + u}$."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratios)


def alpha_divergence(
    log_ratios: Float[Array, "*batch"], alpha: float = 0.5
) -> Float[Array, "*batch"]:
    """$f'(u) = \\frac{1 - u^{-\\alpha}}{\\alpha}$, from reverse KL (0) to forward KL (1).

    TRL's coefficient is one minus this alpha.

    Args:
      log_ratios: in nats.
      alpha: from 0, where the limit $\\log u$ is taken, to 1.

    Raises:
      ValueError: alpha is below 0 or above 1.
    """
    check_range("alpha_divergence", least=0, most=1, alpha=alpha)
    if alpha == 0:
        return log_ratios
    return -jnp.expm1(jnp.minimum(-alpha * log_ratios, _LARGEST_EXPONENT)) / alpha
