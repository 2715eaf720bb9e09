"""Reward and value models: a scalar head on a decoder, which transformers calls a classifier.

A sequence classifier of transformers reads its value at the last token that is not
`pad_token_id`. If the padding token is EOS, it passes over the EOS of a response; a reward model
that is grown here reads that EOS. So a model that was imported keeps its `pad_token_id` and
passes over the same tokens, and a model that is exported gets a padding token that no text
ends in.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.models.decoder import Decoder

# The fields in which a classifier's config differs from that of its language model.
SCALAR_HEAD: dict[str, Any] = {"scalar_head": True, "tied_head": True, "head_bias": False}
_PAD = "<|pad|>"


def as_scalar(model: Decoder) -> Decoder:
    """The same model with a scalar head in place of its LM head, if it has none yet."""
    return model.clone(config=dataclasses.replace(model.config, **SCALAR_HEAD))


def with_scalar_head(model: Decoder, params: Any, key: jax.Array) -> tuple[Decoder, Any]:
    """A reward or value model that begins as a language model with a new head.

    Args:
      model: with an LM head.
      params: of the model.
      key: a random key for the weights of the new head.

    Returns:
      The model with a scalar head, and its parameters. They share all arrays but the heads'
      with `params`.
    """
    scalar, width = as_scalar(model), features(model)
    score = (
        jax.random.normal(key, (1, width), jnp.dtype(model.config.param_dtype))
        * (width + 1) ** -0.5
    )
    body = {name: part for name, part in params.items() if name not in ("head", "head_bias")}
    return scalar, {**body, "score": score}


def features(model: Decoder) -> int:
    """The size of the hidden states that a head reads."""
    return model.config.embedding_width or model.config.width


def _with_own_padding(tokenizer: Any) -> Any:
    """The tokenizer if it pads with a token that no text ends in, else a copy that does."""
    own, template = tokenizer.pad_token, tokenizer.chat_template or ""
    if own is not None and own != tokenizer.eos_token and own not in template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": _PAD})
    return tokenizer


def padding_beside_adapters(model: Decoder, tokenizer: Any) -> tuple[Any, str]:
    """The tokenizer to save beside adapters.

    The adapters' base keeps its own `pad_token_id` and the size of its embedding, so the reader
    has to be told which padding token to set.

    Args:
      model: with a scalar head.
      tokenizer: a `transformers` tokenizer; it is not changed.

    Returns:
      The tokenizer, and what to set so that transformers reads the same rewards.
    """
    pad = model.config.pad_token_id
    if pad is None:
        padded = _with_own_padding(tokenizer)
        if padded.pad_token_id < model.config.vocabulary_size:
            tokenizer, pad = padded, padded.pad_token_id
        else:
            # The base's embedding has no row for a new token.
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = None
    how = "" if pad is not None else ", and score one text at a time"
    return tokenizer, (
        "transformers reads a reward at the last token that is not padding: set "
        f"model.config.pad_token_id = {pad} after loading{how}"
    )


def with_padding(model: Decoder, params: Any, tokenizer: Any) -> tuple[Decoder, Any, Any]:
    """Gives a model a padding token, so that transformers reads the same rewards from it.

    No text may end in the padding token. The tokenizer's own one is taken, unless it is EOS or
    stands in the chat template; else a new token is added, and a row for it to the embedding
    if that has none to spare.

    Args:
      model: with a scalar head that reads a text's last token, whatever that is.
      params: of the model.
      tokenizer: a `transformers` tokenizer; it is not changed.

    Returns:
      The model with its `pad_token_id`, its parameters, and the tokenizer that pads with it.
    """
    tokenizer = _with_own_padding(tokenizer)
    pad, rows = tokenizer.pad_token_id, model.config.vocabulary_size
    missing = max(pad + 1 - rows, 0)
    if missing:
        grow = jax.jit(lambda table: jnp.pad(table, ((0, missing), (0, 0))))
        params = {**params, "embedding": grow(params["embedding"])}
    config = dataclasses.replace(
        model.config, vocabulary_size=rows + missing, pad_token_id=int(pad)
    )
    return model.clone(config=config), params, tokenizer
