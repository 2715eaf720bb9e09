"""Losses of plain language modelling."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def nll(
    logps: Float[Array, "*batch"], *, where: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """Negative log-likelihood, the loss of supervised fine-tuning.

    Formula, per token or, given summed log-probs, per response:
    $L = -\\log \\pi_\\theta(y_t \\mid x, y_{<t})$.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5, and, on the
    chosen responses, the Preferred-FT baseline of Rafailov et al. 2023
    (arXiv 2305.18290), section 6.

    Args:
      logps: log-probabilities in nats, any shape.
      where: True for the entries that count. The others give loss 0 and
        gradient 0, so that summing the result and dividing by the number of
        True entries equals the mean over `logps[where]`.

    Returns:
      The loss in nats, in float32 (float64 stays float64), shaped like `logps`.

    >>> import jax.numpy as jnp
    >>> nll(jnp.array([-0.5, -2.0])).tolist()
    [0.5, 2.0]
    """
    logps = logps.astype(jnp.promote_types(logps.dtype, jnp.float32))
    return -logps if where is None else jnp.where(where, -logps, 0.0)
