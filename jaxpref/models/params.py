"""A model's parameters: random ones, and what is known of them before they have values."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpref import sharding as sharding_lib
from jaxpref.models.decoder import Decoder


def init_params(model: Decoder, key: jax.Array, *, boxed: bool = False) -> Any:
    """Random parameters, as nested dictionaries of arrays.

    Args:
      model: the model.
      key: a random key.
      boxed: keep the logical axis names, in `flax.linen.LogicallyPartitioned` boxes.
    """
    params = _init(model.clone(origin=None), key)
    return params if boxed else nn.meta.unbox(params)


# Parameter by parameter it would be compiled many times.
@partial(jax.jit, static_argnums=0)
def _init(model: Decoder, key: jax.Array) -> Any:
    # `setup` declares every parameter, so any method of the model will do here.
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, tokens, method="hidden_states")["params"]


def abstract_params(model: Decoder, mesh: Mesh | None = None) -> Any:
    """The shapes, dtypes and shardings of a model's parameters.

    Args:
      model: the model.
      mesh: shards the parameters; without a mesh they are on the first device.

    Returns:
      Nested dictionaries of `jax.ShapeDtypeStruct`.
    """
    boxed = jax.eval_shape(lambda key: init_params(model, key, boxed=True), jax.random.key(0))
    shapes = nn.meta.unbox(boxed)
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    else:
        shardings = sharding_lib.shardings(mesh, boxed)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
