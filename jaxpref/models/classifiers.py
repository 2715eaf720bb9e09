"""Reward and value models: a scalar head on a decoder, which transformers calls a classifier.

transformers' sequence classifiers read the last token that is not `pad_token_id`. Where that
is EOS they pass over the EOS of a response; a reward model that is grown here reads it. So a
model that was imported keeps its `pad_token_id` and passes over the same tokens, and one that
is exported gets a padding token that no text ends in.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.models.decoder import Decoder

# What a language model's head is not in a classifier.
SCALAR_HEAD: dict[str, Any] = {"scalar_head": True, "tied_head": True, "head_bias": False}
_PAD = "<|pad|>"


def as_scalar(model: Decoder) -> Decoder:
    """The same model with a scalar head in place of its LM head, if it has none yet."""
    return model.clone(config=dataclasses.replace(model.config, **SCALAR_HEAD))


def with_scalar_head(model: Decoder, params: Any, key: jax.Array) -> tuple[Decoder, Any]:
    """A reward or value model that begins as a language model with a new head.

    Args:
      model: with an LM head.
      params: of the model; what the two have in common is shared, not copied.
      key: for the new head's random weights.
    """
    scalar, width = as_scalar(model), features(model)
    score = (
        jax.random.normal(key, (1, width), jnp.dtype(model.config.param_dtype))
        * (width + 1) ** -0.5
    )
    body = {name: part for name, part in params.items() if name not in ("head", "head_bias")}
    return scalar, {**body, "score": score}


def features(model: Decoder) -> int:
    """Size of the hidden states that a head sees."""
    return model.config.embedding_width or model.config.width


def _with_own_padding(tokenizer: Any) -> Any:
    """The tokenizer, with a padding token that no text ends in; a copy, if it needs a new one."""
    own, template = tokenizer.pad_token, tokenizer.chat_template or ""
    if own is not None and own != tokenizer.eos_token and own not in template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": _PAD})
    return tokenizer


def padding_beside_adapters(model: Decoder, tokenizer: Any) -> tuple[Any, str]:
    """The tokenizer to keep beside adapters, whose base has a `pad_token_id` that stays.

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
    """The same rewards, by transformers' rule: with a padding token that no text ends in.

    That is the tokenizer's own, unless it is EOS or stands in its chat template; else a new
    one, for which the embedding gets a row if it has none to spare.

    Args:
      model: with a scalar head that reads the last token, whichever it is.
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
