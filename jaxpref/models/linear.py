"""Products with weights that lie over the devices of a mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxpref import collectives, sharding

# What a weight goes through from its parts to a product, by the names of JAX's primitives.
_GATHERING = {"all_gather", "pvary", "reshape", "transpose"}


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

    spec = sharding.spec_of(weight.axes, weight.value.shape)
    name, parts = sharding.gathered_along()
    if spec is None or parts == 1 or name not in spec:
        return product(x, weight.value)
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
    """What each device makes of its own tokens with weights that are whole along their width.

    The parts of the weights are gathered, forward and backward, and their gradients are scattered.
    Left to XLA, it would hang on the mesh and on the backend what is exchanged, and on some the
    gradients are summed whole on every device.

    Args:
      function: of arrays of tokens and the weights' values, which all vary along the same axes of
        the mesh.
      rows: arrays of tokens.
      weights: in the dtype to compute in.
      given: the logical names of the last axes of `rows`.
      made: that of the last axis of what comes out.
      summed: that of the axis over which the function sums: what comes out is added up over the
        parts of it.
    """
    tokens = sharding.spec_of(("rows",), rows[0].shape[:1])
    if tokens is None or tokens[0] is None or not rows[0].size:
        return function(*rows, *(weight.value for weight in weights))
    name, _ = sharding.gathered_along()
    specs = [
        sharding.spec_of(weight.axes, weight.value.shape) or PartitionSpec() for weight in weights
    ]
    # Activations are whole where the weights are gathered, and split as these are elsewhere.
    along: dict[str, Any] = {
        axis: None if part == name else part
        for weight, spec in zip(weights, specs, strict=True)
        for axis, part in zip(weight.axes, spec, strict=True)
    }

    in_specs = (*(PartitionSpec(tokens[0], along.get(axis)) for axis in given), *specs)
    names = [{name for part in spec for name in sharding.names_in(part)} for spec in in_specs]
    everywhere = set().union(*names)

    def here(*parts: Array) -> Array:
        # Said before weights are gathered, so that it is the scattered gradient that is summed
        # over what has the same part for other rows.
        varying = [
            jax.lax.pcast(part, tuple(sorted(everywhere - its)), to="varying")
            for part, its in zip(parts, names, strict=True)
        ]
        whole = [
            _whole(part, spec, name) for part, spec in zip(varying[len(rows) :], specs, strict=True)
        ]
        out = function(*varying[: len(rows)], *whole)
        return out if along[summed] is None else jax.lax.psum(out, along[summed])

    out_specs = PartitionSpec(tokens[0], along.get(made))
    mapped = jax.shard_map(here, in_specs=in_specs, out_specs=out_specs)
    return mapped(*rows, *(weight.value for weight in weights))


def _whole(part: Array, spec: PartitionSpec, name: str | None) -> Array:
    """The parts of a weight along an axis of the mesh as one."""
    if name is None or name not in spec:
        return part
    axis = spec.index(name)
    first = jnp.moveaxis(part, axis, 0)
    whole = collectives.gather(first.reshape(len(first), -1), name, 0)
    return jnp.moveaxis(whole.reshape(-1, *first.shape[1:]), 0, axis)


def keeps_no_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: all is kept but weights with all of their parts.

    All of them together would not fit. Where it is used nothing but their gathers is computed
    again.
    """
    # A gather may be in a function that has a gradient of its own.
    inner = getattr(params.get("call_jaxpr"), "eqns", ())
    return not {primitive.name, *(step.primitive.name for step in inner)} & _GATHERING
