"""A decoder as the rest of the library knows models."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.logprobs import LMHead
from jaxpref.losses.inputs import check_range
from jaxpref.models.decoder import Decoder
from jaxpref.models.experts import load_balancing_loss
from jaxpref.models.protocol import Model, ModelOutput
from jaxpref.packing import PackedBatch


def packed(decoder: Decoder, temperature: float = 1.0) -> Model:
    """A decoder as a function of a packed batch.

    Args:
      decoder: with an LM head or a scalar head.
      temperature: of the LM head, see `LMHead`: the policy is what is sampled at it.

    Raises:
      ValueError: the temperature is not above 0, or it is not 1 and the head is scalar.
    """
    config = decoder.config
    check_range("packed", above=0, temperature=temperature)
    if config.scalar_head and temperature != 1:
        raise ValueError(
            "packed expected a temperature of 1 for a decoder with a scalar head, whose output is "
            f"no distribution; got {temperature}."
        )

    def model(params: Any, batch: PackedBatch, key: Array | None = None) -> ModelOutput:
        hidden, sown = decoder.apply(
            {"params": params},
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.positions),
            batch.tree,
            method="hidden_states",
            mutable=["intermediates"],
            rngs=None if key is None else {"dropout": key},
        )
        auxiliary = {}
        if config.router_loss:
            (router_logits,) = sown["intermediates"]["router_logits"]
            real = jnp.asarray(batch.group).ravel() > 0
            balance = load_balancing_loss(router_logits, real, config.experts_per_token)
            auxiliary["router_loss"] = config.router_loss * balance
        method = "scalar_head" if config.scalar_head else "lm_head"
        head = decoder.apply({"params": params}, method=method)
        if isinstance(head, LMHead):
            head = dataclasses.replace(head, temperature=temperature)
        return ModelOutput(hidden, head, auxiliary)

    return model
