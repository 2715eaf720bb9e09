"""What every loss does with its inputs first."""

import jax.numpy as jnp
from jaxtyping import Array


def checked(loss: str, **inputs: Array) -> tuple[Array, ...]:
    """The inputs in at least float32.

    Raises:
      ValueError: their shapes differ, which broadcasting would turn into a wrong loss.
    """
    if len({x.shape for x in inputs.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"{loss} expected inputs of one shape, one value per pair; got {shapes}.")
    return tuple(in_float32(x) for x in inputs.values())


def in_float32(x: Array) -> Array:
    """The input in float32, or in float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_smoothing(loss: str, label_smoothing: object, *, above: bool = False) -> None:
    """Refuses a label smoothing outside 0 to below a half; `above` excludes 0 too.

    Raises:
      ValueError: it is outside. A traced value cannot be checked.
    """
    if isinstance(label_smoothing, float | int) and not (
        (label_smoothing > 0 if above else label_smoothing >= 0) and label_smoothing < 0.5
    ):
        raise ValueError(
            f"{loss} expected label_smoothing {'above' if above else 'from'} 0 to below 0.5; got "
            f"{label_smoothing}."
        )


def per_token(sums: Array, lengths: Array) -> Array:
    """Sums over responses divided by their lengths; an absent response keeps its 0."""
    return sums / jnp.maximum(lengths, 1)
