"""A decoder as the rest of the library knows models."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.models.decoder import Decoder
from jaxpref.models.experts import load_balancing_loss
from jaxpref.models.protocol import Model, ModelOutput
from jaxpref.packing import PackedBatch


def packed(decoder: Decoder) -> Model:
    """A decoder as a function of a packed batch."""
    config = decoder.config

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
        return ModelOutput(hidden, head, auxiliary)

    return model
