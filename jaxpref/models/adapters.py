"""Low-rank adapters (LoRA, arXiv 2106.09685) and the base that they adapt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.losses.inputs import in_float32
from jaxpref.models.decoder import Decoder
from jaxpref.nf4 import Nf4
from jaxpref.trainable import partition

# Matches the paths of the adapters' parameters.
ADAPTERS = r"_lora_[ab]$"


def without_adapters(model: Decoder) -> Decoder:
    """The base: the same model without its adapters."""
    return model.clone(config=dataclasses.replace(model.config, lora=None))


def merge_adapters(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The same function without adapters: `W + alpha / rank * A B` in place of each `W`.

    Args:
      model: with adapters; one without is given back as it is.
      params: of the model.

    Returns:
      The model without adapters, and its parameters.
    """
    lora = model.config.lora
    if lora is None:
        return model, params
    adapters, base = partition(params, ADAPTERS)
    base = dequantize(base)
    layers = dict(base["layers"])
    for name in _adapted(adapters):
        weight = layers[name]
        change = jax.jit(_product)(
            adapters["layers"][f"{name}_lora_a"], adapters["layers"][f"{name}_lora_b"]
        )
        change = change.reshape(weight.shape) * lora.scale
        layers[name] = (in_float32(weight) + change).astype(weight.dtype)
    return without_adapters(model), {**base, "layers": layers}


def dequantize(params: Any) -> Any:
    """The parameters, with those that are in four bits turned into float32."""
    return jax.tree.map(
        lambda x: jax.jit(x.dequantize, static_argnums=0)("float32") if isinstance(x, Nf4) else x,
        params,
        is_leaf=lambda x: isinstance(x, Nf4),
    )


def _adapted(adapters: Any) -> list[str]:
    """The names of the matrices in the layers that have adapters."""
    names = adapters.get("layers", {})
    return sorted(name.removesuffix("_lora_a") for name in names if name.endswith("_lora_a"))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`A B` of every layer, with all inputs as one axis and all outputs as another."""
    layers, rank = a.shape[0], a.shape[-1]
    a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
    return jnp.einsum("lir,lro->lio", in_float32(a), in_float32(b))
