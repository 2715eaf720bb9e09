"""A mixture of experts: each token goes through the few experts that its router picks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses.inputs import in_float32
from jaxpref.models.grouped import grouped_product


def mix_experts(
    x: Float[Array, "tokens width"],
    router_logits: Float[Array, "tokens experts"],
    gate: Float[Array, "experts width inner"],
    up: Float[Array, "experts width inner"],
    down: Float[Array, "experts inner width"],
    *,
    per_token: int,
    normalize: bool,
    activation: Callable[[Array], Array],
) -> Float[Array, "tokens width"]:
    """The weighted outputs of each token's `per_token` most probable experts.

    No token is dropped: the copies of the tokens are sorted by expert, and each expert
    multiplies its own run of rows (see `grouped_product`).

    Args:
      x: inputs.
      router_logits: unnormalised log-probabilities of the experts.
      gate: weights of the projection that `activation` is applied to.
      up: weights of the one that it is multiplied with.
      down: weights of the projection back.
      per_token: how many experts a token goes to.
      normalize: whether the weights of a token's experts are made to add up to one (Mixtral,
        arXiv 2401.04088, section 2.1).
      activation: of the gate.
    """
    probabilities = jax.nn.softmax(in_float32(router_logits), axis=-1)
    share, chosen = jax.lax.top_k(probabilities, per_token)
    if normalize:
        share = share / share.sum(axis=-1, keepdims=True)
    order = jnp.argsort(chosen.ravel(), stable=True)
    token = order // per_token
    sizes = jnp.bincount(chosen.ravel(), length=gate.shape[0])
    rows = x[token]
    gated = activation(grouped_product(rows, gate, sizes))
    inner = gated * grouped_product(rows, up, sizes)
    out = grouped_product(inner, down, sizes) * share.ravel()[order, None].astype(x.dtype)
    return jnp.zeros_like(x).at[token].add(out)


def load_balancing_loss(
    router_logits: Float[Array, "layers tokens experts"],
    real: Bool[Array, " tokens"],
    per_token: int,
) -> Float[Array, ""]:
    """How unevenly the experts are used.

    It is `experts` times the sum, over the experts, of an expert's share of the tokens times
    its mean probability (Switch Transformers, arXiv 2101.03961, equation 4), over all layers
    together as in transformers. Its value is `per_token` if all experts are used equally.

    Args:
      router_logits: unnormalised log-probabilities of the experts in every layer.
      real: which tokens count.
      per_token: how many experts a token goes to.
    """
    layers, _, experts = router_logits.shape
    probabilities = jax.nn.softmax(in_float32(router_logits), axis=-1)
    _, chosen = jax.lax.top_k(probabilities, per_token)
    weights = real.astype(probabilities.dtype) / (layers * jnp.maximum(real.sum(), 1))
    share = jnp.einsum("t,ltke->e", weights, jax.nn.one_hot(chosen, experts))
    return experts * jnp.sum(share * jnp.einsum("t,lte->e", weights, probabilities))
