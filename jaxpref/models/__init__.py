"""Decoders in Flax Linen: pure functions of their parameters."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig", "build", "init_params"]


def build(config: ConfigDict, tokenizer_size: int) -> Decoder:
    """The model that the group `model` of a config describes.

    Args:
      config: the group.
      tokenizer_size: ids that the tokenizer can give.

    Raises:
      UserError: the embedding table is smaller than that, or the shape is impossible.
    """
    size = config.vocabulary_size or tokenizer_size
    if size < tokenizer_size:
        raise UserError(
            f"model.vocabulary_size is {size}, but the tokenizer gives ids up to "
            f"{tokenizer_size - 1}; make it at least {tokenizer_size}, or 0 to take that."
        )
    names = {field.name for field in dataclasses.fields(DecoderConfig)}
    shape = {name: value for name, value in config.items() if name in names}
    try:
        return Decoder(DecoderConfig(**{**shape, "vocabulary_size": size}))
    except ValueError as error:
        raise UserError(str(error)) from error


def init_params(model: Decoder, key: jax.Array, *, boxed: bool = False) -> Any:
    """Random parameters, as a tree of arrays.

    Args:
      model: the model.
      key: a random key.
      boxed: keep the logical axis names, in `flax.linen.LogicallyPartitioned` boxes.
    """
    params = model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    return params if boxed else nn.meta.unbox(params)
