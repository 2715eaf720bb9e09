"""Products with weights that lie over the devices of a mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxpref import collectives, sharding

# What a weight goes through from its parts to a product.
_GATHERING = {jax.lax.all_gather_p, jax.lax.reshape_p, jax.lax.transpose_p}


class Weight(NamedTuple):
    """A weight, and the logical names of its axes (see `jaxpref.sharding`)."""

    value: Float[Array, "*axes"]
    axes: tuple[str, ...]


def multiply(
    x: Float[Array, "tokens inputs"], weight: Weight, inputs: int = 1
) -> Float[Array, "tokens outputs"]:
    """A product with a weight whose first `inputs` axes are summed over.

    Args:
      x: inputs, whose tokens lie along `rows`.
      weight: in the dtype to compute in.
      inputs: how many of its axes are summed over.
    """

    def product(x: Array, value: Array) -> Array:
        return x @ value.reshape(x.shape[1], -1)

    summed, kept = weight.axes[0], weight.axes[inputs]
    return on_own_rows(product, (x,), (weight,), given=(summed,), made=kept, summed=summed)


def on_own_rows(
    function: Callable[..., Array],
    rows: Sequence[Float[Array, "tokens _"]],
    weights: Sequence[Weight],
    *,
    given: Sequence[str],
    made: str,
    summed: str,
) -> Float[Array, "tokens _"]:
    """What each device makes of its own tokens with weights that are whole along `fsdp`.

    The parts of the weights are gathered, forward and backward, and their gradients are scattered.
    Left to XLA, it would hang on the mesh and on the backend what is exchanged, and on some the
    gradients are summed whole on every device.

    Args:
      function: of arrays of tokens and the weights' values.
      rows: arrays of tokens.
      weights: in the dtype to compute in.
      given: the logical names of the last axes of `rows`.
      made: that of the last axis of what comes out.
      summed: that of the axis over which the function sums: what comes out is added up over the
        parts of it.
    """
    specs = [sharding.spec_of(weight.axes, weight.value.shape) for weight in weights]
    first = sharding.spec_of(("rows",), rows[0].shape[:1])
    if first is None or first[0] is None or not any(spec and "fsdp" in spec for spec in specs):
        return function(*rows, *(weight.value for weight in weights))
    # Activations are whole where the weights are gathered, and split as these are elsewhere.
    along: dict[str, Any] = {
        name: None if axis == "fsdp" else axis
        for weight, spec in zip(weights, specs, strict=True)
        for name, axis in zip(weight.axes, spec or (), strict=True)
    }

    def here(*parts: Array) -> Array:
        whole = [
            _whole(part, spec or PartitionSpec(), first[0])
            for part, spec in zip(parts[len(rows) :], specs, strict=True)
        ]
        out = function(*parts[: len(rows)], *whole)
        return out if along[summed] is None else jax.lax.psum(out, along[summed])

    of_rows = [PartitionSpec(first[0], along.get(name)) for name in given]
    of_output = PartitionSpec(first[0], along.get(made))
    mapped = jax.shard_map(here, in_specs=(*of_rows, *specs), out_specs=of_output)
    return mapped(*rows, *(weight.value for weight in weights))


def _whole(part: Array, spec: PartitionSpec, rows: tuple[str, ...]) -> Array:
    """The parts of a weight along `fsdp` as one."""
    # Said before they are gathered, so that it is the scattered gradient that is summed over what
    # has the same part for other rows.
    part = jax.lax.pcast(part, tuple(name for name in rows if name not in spec), to="varying")
    if "fsdp" not in spec:
        return part
    axis = spec.index("fsdp")
    first = jnp.moveaxis(part, axis, 0)
    whole = collectives.gather(first.reshape(len(first), -1), "fsdp", 0)
    return jnp.moveaxis(whole.reshape(-1, *first.shape[1:]), 0, axis)


def policy_of_gathered(width: int) -> Any:
    """What the backward pass keeps where it computes nothing again but the gathers of weights.

    Args:
      width: of the model.

    Returns:
      A policy for `jax.checkpoint`; None where nothing is gathered.
    """
    spec = sharding.spec_of(("width",), (width,))
    if spec is None or spec[0] is None or jax.sharding.get_abstract_mesh().shape[spec[0]] == 1:
        return None

    def keeps(primitive: Any, *_: Any, **params: Any) -> bool:
        # All weights with all of their parts together would not fit. The gather is in a function
        # that has a gradient of its own.
        inner = getattr(params.get("call_jaxpr"), "eqns", ())
        return not {primitive, *(step.primitive for step in inner)} & _GATHERING

    return keeps
