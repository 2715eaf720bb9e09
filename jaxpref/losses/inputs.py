"""What every loss does with its inputs first."""

from numbers import Real

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


def check_range(
    loss: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    **values: object,
) -> None:
    """Refuses numbers outside the range given, with a NaN.

    Args:
      loss: whose parameters they are.
      above: what they should be larger than.
      least: what they should be at least.
      below: what they should be smaller than.
      most: what they should be at most.
      values: parameters by name; what is no plain number (a traced value) cannot be checked.

    Raises:
      ValueError: one is outside.
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
    """Refuses a label smoothing outside 0 to below a half.

    Raises:
      ValueError: it is outside.
    """
    check_range(loss, least=0, below=0.5, label_smoothing=label_smoothing)


def per_token(sums: Array, lengths: Array) -> Array:
    """Sums over responses divided by their lengths; an absent response keeps its 0."""
    return sums / jnp.maximum(lengths, 1)
