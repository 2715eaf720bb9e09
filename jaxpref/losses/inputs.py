"""Checks and conversions with which every loss begins."""

from numbers import Real

import jax.numpy as jnp
from jaxtyping import Array


def checked(loss: str, **inputs: Array) -> tuple[Array, ...]:
    """The inputs in at least float32.

    Args:
      loss: its name, for messages.
      inputs: the arrays by name, in the order in which they are returned.

    Raises:
      ValueError: the shapes differ, which broadcasting would turn into a wrong loss.
    """
    if len({x.shape for x in inputs.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"{loss} expected inputs of one shape, one value per pair; got {shapes}.")
    return tuple(in_float32(x) for x in inputs.values())


def in_float32(x: Array) -> Array:
    """The input in float32; what is float64 stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_range(
    loss: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    **values: object,
) -> None:
    """Refuses parameters that are outside a range, or NaN.

    Args:
      loss: the name of the loss that has the parameters, for messages.
      above: every parameter must be larger than this.
      least: every parameter must be at least this.
      below: every parameter must be smaller than this.
      most: every parameter must be at most this.
      values: the parameters by name. A traced value is no plain number and is not checked.

    Raises:
      ValueError: a parameter is outside the range.
    """
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    for name, value in values.items():
        if not isinstance(value, Real):
            continue
        number = float(value)
        holds = {
            "above": lambda bound, x=number: x > bound,
            "at least": lambda bound, x=number: x >= bound,
            "below": lambda bound, x=number: x < bound,
            "at most": lambda bound, x=number: x <= bound,
        }
        if not all(holds[word](bound) for word, bound in given.items()):
            wanted = " and ".join(f"{word} {bound:g}" for word, bound in given.items())
            raise ValueError(f"{loss} expected {name} {wanted}; got {value}.")


def check_smoothing(loss: str, label_smoothing: object) -> None:
    """Refuses a label smoothing below 0, or of a half or more.

    Raises:
      ValueError: the label smoothing is outside this range.
    """
    check_range(loss, least=0, below=0.5, label_smoothing=label_smoothing)


def per_token(sums: Array, lengths: Array) -> Array:
    """Sums over responses divided by the responses' lengths; an absent response keeps its 0."""
    return sums / jnp.maximum(lengths, 1)
