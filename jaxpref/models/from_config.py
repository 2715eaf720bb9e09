"""The model with random weights that a config describes."""

import dataclasses
import json

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.models import splash
from jaxpref.models.config import DecoderConfig, Lora
from jaxpref.models.decoder import Decoder
from jaxpref.models.huggingface import Origin, make_rope
from jaxpref.packing import Alignment


def build(config: ConfigDict, tokenizer_size: int) -> Decoder:
    """The model that the group `model` of a config describes: a Llama of a size of its own.

    Args:
      config: the group.
      tokenizer_size: how many ids the tokenizer can give.

    Raises:
      UserError: the embedding table has fewer rows than that, or the shape is impossible.
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
    # It depends on the devices, too: see `attention_of`.
    shape |= {"vocabulary_size": size, "lora": lora(config), "attention": "blockwise"}
    rope = make_rope(config.head_dim, rope_theta=config.rope_theta)
    try:
        return Decoder(DecoderConfig(**shape, rope=(rope,)), _as_llama(config, size))
    except ValueError as error:
        raise UserError(str(error)) from error


def attention_of(config: ConfigDict, platform: str) -> str:
    """Which attention a run has on devices of a platform, see `DecoderConfig.attention`.

    Args:
      config: a whole config.
      platform: as JAX names it.

    Raises:
      UserError: the config asks for one that there cannot be.
    """
    asked = config.model.attention
    why = splash.refusal(config.data.row_length or config.data.max_length, platform)
    if asked == "splash" and why is not None:
        raise UserError(
            f"model.attention is 'splash', which cannot be had: {why}. With 'auto' it is taken "
            "where it can."
        )
    return "blockwise" if asked == "blockwise" or why is not None else "splash"


def alignment(config: ConfigDict, mesh: Mesh) -> Alignment:
    """How a run's rows have to be aligned for its attention.

    Args:
      config: a whole config.
      mesh: over which the run is sharded.
    """
    if attention_of(config, mesh.devices.flat[0].platform) == "blockwise":
        return Alignment()
    return Alignment.of(config.data.row_length or config.data.max_length)


def lora(config: ConfigDict) -> Lora | None:
    """The adapters that the group `model` of a config asks for; None for no adapters.

    Raises:
      UserError: one of `lora.targets` is no product that can have adapters.
    """
    if not config.lora.rank:
        return None
    try:
        return Lora(**{**config.lora, "targets": tuple(config.lora.targets)})
    except ValueError as error:
        raise UserError(str(error)) from error


def _as_llama(config: ConfigDict, vocabulary_size: int) -> Origin:
    """An origin with the `config.json` of a Llama of this shape, for export."""
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
        # Versions of transformers before 5 read the key here, not in `rope_parameters`.
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "dtype": config.param_dtype,
    }
    return Origin("LlamaForCausalLM", config=json.dumps(fields, indent=2) + "\n")
