"""Decoders in Flax Linen: pure functions of their parameters."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.models.adapters import dequantize, merge_adapters, save_adapters, without_adapters
from jaxpref.models.classifiers import as_scalar, padding_beside_adapters, with_scalar_head
from jaxpref.models.decoder import Cache, Decoder, DecoderConfig, Lora, Rope, empty_cache
from jaxpref.models.huggingface import (
    Origin,
    from_pretrained,
    save_pretrained,
)
from jaxpref.models.huggingface.families import make_rope

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Lora",
    "Rope",
    "as_scalar",
    "build",
    "dequantize",
    "empty_cache",
    "from_pretrained",
    "init_params",
    "make_rope",
    "merge_adapters",
    "padding_beside_adapters",
    "save_adapters",
    "save_pretrained",
    "with_scalar_head",
    "without_adapters",
]


def build(config: ConfigDict, tokenizer_size: int) -> Decoder:
    """The model with random weights that the group `model` of a config describes.

    It is a Llama in all but size.

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
    if config.head_dim % 2:
        raise UserError(f"model.head_dim must be even for rotary; got {config.head_dim}.")
    names = {field.name for field in dataclasses.fields(DecoderConfig)}
    shape = {name: value for name, value in config.items() if name in names}
    shape |= {"vocabulary_size": size, "lora": lora(config)}
    rope = make_rope(config.head_dim, rope_theta=config.rope_theta)
    try:
        return Decoder(DecoderConfig(**shape, rope=(rope,)), _as_llama(config, size))
    except ValueError as error:
        raise UserError(str(error)) from error


def lora(config: ConfigDict) -> Lora | None:
    """The adapters that the group `model` of a config asks for.

    Raises:
      UserError: a target is none.
    """
    if not config.lora.rank:
        return None
    try:
        return Lora(**{**config.lora, "targets": tuple(config.lora.targets)})
    except ValueError as error:
        raise UserError(str(error)) from error


def _as_llama(config: ConfigDict, vocabulary_size: int) -> Origin:
    """The same shape as a Llama's `config.json`, for export."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        # As older readers spell it.
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "dtype": config.param_dtype,
    }
    return Origin("LlamaForCausalLM", config=json.dumps(fields, indent=2) + "\n")


def init_params(model: Decoder, key: jax.Array, *, boxed: bool = False) -> Any:
    """Random parameters, as a tree of arrays.

    Args:
      model: the model.
      key: a random key.
      boxed: keep the logical axis names, in `flax.linen.LogicallyPartitioned` boxes.
    """
    # Every parameter is declared in setup, whatever the method.
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = model.init(key, tokens, method="hidden_states")["params"]
    return params if boxed else nn.meta.unbox(params)
