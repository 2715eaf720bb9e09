"""The parameters as decoding takes them: adapters merged, layers apart, in the compute dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxpref import models, sharding
from jaxpref.models import Decoder


def prepare(model: Decoder, mesh: Mesh | None, params: Any) -> Any:
    """The parameters of `unrolled(model)`, from those of the model.

    They are a copy, whole on every device but for what `mesh.tensor` splits: from parts along
    their width they would be gathered anew for every token.
    """
    layers, others = apart(params)
    weights = dict(beside(model, mesh, others))
    # One after the other: what all of them are computed from would lie on every device at once.
    for number in range(model.config.layers):
        weights[f"layers_{number}"] = one_layer(model, mesh, layers, np.int32(number))
    return weights


def unrolled(model: Decoder) -> Decoder:
    """What decodes: no adapters, layers written out."""
    return Decoder(models.without_adapters(model).config, unrolled=True)


def places(decoder: Decoder, mesh: Mesh) -> Any:
    """Where decoding has each of the parameters of what decodes."""
    boxed = jax.eval_shape(lambda: models.init_params(decoder, jax.random.key(0), boxed=True))
    return sharding.shardings(mesh, boxed, sharding.GENERATION_RULES)


def apart(params: Any) -> tuple[Any, Any]:
    """The parameters of the layers, and the others."""
    return params["layers"], {name: part for name, part in params.items() if name != "layers"}


@partial(jax.jit, static_argnums=(0, 1))
def one_layer(model: Decoder, mesh: Mesh | None, params: Any, layer: Array | int) -> Any:
    """The parameters of one layer as decoding takes them, from those of all."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1), params)
    _, merged = models.merge_adapters(model, {"layers": one})
    weights = jax.tree.map(lambda x: x[0], models.dequantize(merged["layers"]))
    return _in_place(model, mesh, {"layers_0": weights})["layers_0"]


@partial(jax.jit, static_argnums=(0, 1))
def beside(model: Decoder, mesh: Mesh | None, params: Any) -> Any:
    """The parameters that belong to no layer, as decoding takes them."""
    return _in_place(model, mesh, models.dequantize(params))


def _in_place(model: Decoder, mesh: Mesh | None, weights: Any) -> Any:
    """Parameters in the compute dtype, where decoding has them."""
    dtype = jnp.dtype(model.config.dtype)
    # Norms stay as they are: they are computed in float32.
    weights = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, weights)
    if mesh is None:
        return weights
    all_places = places(unrolled(model), mesh)
    return jax.lax.with_sharding_constraint(weights, {name: all_places[name] for name in weights})
