"""What a decoder remembers of the tokens that it has seen, for decoding token by token.

A prompt and the branches that continue it are a tree, as in `jaxpref.packing`: the prompt's keys
and values are kept once, and every branch reads them beside its own. Both reads are one softmax:
their weighted values are added up and divided by their sums of weights together (Hydragen,
Juravsky et al. 2024, arXiv 2402.05099, section 3.2, without its gradient).

Each layer has arrays of its own, which the decode loop writes in place: a scan over the layers
would take and return all of them for every token, and copy them (jax 17845).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Held(NamedTuple):
    """Keys, already rotated, and values of one layer.

    The axes lie as the products of attention take them, so that none of it is transposed, which
    would be a copy for every token.

    Attributes:
      prompt_keys: of the prompts.
      prompt_values: the same.
      keys: of what each branch has added.
      values: the same.
    """

    prompt_keys: Float[Array, "prompts kv_heads head_dim prompt_slots"]
    prompt_values: Float[Array, "prompts kv_heads prompt_slots head_dim"]
    keys: Float[Array, "prompts branches kv_heads head_dim slots"]
    values: Float[Array, "prompts branches kv_heads slots head_dim"]


class Places(NamedTuple):
    """Where the held tokens are, in all layers.

    Attributes:
      prompt: position of each slot's token in its sequence; -1 where there is none.
      own: the same of the branches' slots. The slots are a ring: a branch that begins late has
        its first token where the others have a later one.
      used: tokens written so far; the next one goes to slot `used % slots` of every branch.
    """

    prompt: Int[Array, "prompts prompt_slots"]
    own: Int[Array, "prompts branches slots"]
    used: Int[Array, ""]


class Cache(NamedTuple):
    """All that a decoder remembers of prompts and their branches.

    Attributes:
      layers: keys and values by layer.
      places: where their tokens are.
    """

    layers: tuple[Held, ...]
    places: Places


def branch(
    prompts: tuple[tuple[Array, Array], ...],
    real: Bool[Array, "prompts prompt_slots"],
    branches: int,
    slots: int,
    dtype: str | None = None,
) -> Cache:
    """A cache of prompts, each with empty branches.

    Args:
      prompts: keys and values `[prompts, prompt_slots, kv_heads, head_dim]` of each layer.
      real: which of the prompts' tokens are tokens; others are padding, on either side.
      branches: how many branches a prompt has.
      slots: tokens that a branch has room for.
      dtype: of the keys and values; None for what they are given in.
    """

    def held(key: Array, value: Array) -> Held:
        rows, _, kv_heads, head_dim = key.shape
        key, value = key.astype(dtype or key.dtype), value.astype(dtype or value.dtype)
        shape = (rows, branches, kv_heads)
        return Held(
            jnp.transpose(key, (0, 2, 3, 1)),
            jnp.swapaxes(value, 1, 2),
            jnp.zeros((*shape, head_dim, slots), key.dtype),
            jnp.zeros((*shape, slots, head_dim), value.dtype),
        )

    positions = jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)
    own = jnp.full((real.shape[0], branches, slots), -1, jnp.int32)
    places = Places(positions, own, jnp.zeros((), jnp.int32))
    return Cache(tuple(held(*layer) for layer in prompts), places)


def widened(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens in each branch, none of which has gone around."""
    more = slots - cache.places.own.shape[-1]

    def wider(x: Array, axis: int, value: int = 0) -> Array:
        return jnp.pad(
            x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value
        )

    layers = tuple(
        held._replace(keys=wider(held.keys, 4), values=wider(held.values, 3))
        for held in cache.layers
    )
    own = wider(cache.places.own, 2, -1)
    return Cache(layers, cache.places._replace(own=own))


def seated(places: Places, positions: Int[Array, "prompts branches"]) -> Places:
    """The places with one more token in each branch."""
    slot = places.used % places.own.shape[-1]
    own = jax.lax.dynamic_update_slice(
        places.own,
        positions[..., None].astype(jnp.int32),
        (jnp.zeros_like(slot), jnp.zeros_like(slot), slot),
    )
    return places._replace(own=own, used=places.used + 1)


def attend(
    query: Float[Array, "rows one heads head_dim"],
    key: Float[Array, "rows one kv_heads head_dim"],
    value: Float[Array, "rows one kv_heads head_dim"],
    positions: Int[Array, "prompts branches"],
    held: Held,
    places: Places,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "rows one heads head_dim"], Held]:
    """Attention of one new token in each branch to its prompt and its branch, and to itself.

    Args:
      query: of the new tokens, already rotated; a row is a branch, those of a prompt together.
      key: of the new tokens.
      value: of the new tokens.
      positions: of the new tokens in their sequences.
      held: what the layer remembers.
      places: where its tokens are.
      window: see `packing.sees`; None for all keys.
      scale: of the scores; by default `head_dim ** -0.5`.
      soft_cap: bounds the scores, see `attention`.

    Returns:
      The weighted values in the queries' dtype, and what the layer remembers now.
    """
    prompts, branches, kv_heads, slots, head_dim = held.values.shape
    shape = (prompts, branches, kv_heads)
    dtype, accumulator = query.dtype, jnp.promote_types(query.dtype, jnp.float32)

    def product(one: Array, other: Array) -> Array:
        return jnp.matmul(one, other.astype(dtype), preferred_element_type=accumulator)

    def scores(queries: Array, keys: Array) -> Array:
        found = product(queries, keys) * (head_dim**-0.5 if scale is None else scale)
        return found if soft_cap is None else soft_cap * jnp.tanh(found / soft_cap)

    def by_prompt(x: Array) -> Array:
        """All queries of a prompt that share a key head, in one product."""
        return jnp.swapaxes(x, 1, 2).reshape(prompts, kv_heads, -1, x.shape[-1])

    def by_branch(x: Array) -> Array:
        apart = x.reshape(prompts, kv_heads, branches, -1, x.shape[-1])
        return jnp.swapaxes(apart, 1, 2)

    def seen(scores: Array, held: Array) -> Array:
        visible = held >= 0
        if window is not None:
            visible &= positions[..., None] - held < window
        # The mask is added because that is faster, as in `jaxpref.models.attention`.
        return scores + jnp.where(visible, 0, jnp.finfo(accumulator).min / 2)[:, :, None, None]

    each, new_keys, new_values = (x.reshape(*shape, -1, head_dim) for x in (query, key, value))
    of_prompt = by_branch(scores(by_prompt(each), held.prompt_keys))
    of_prompt = seen(of_prompt, places.prompt[:, None])
    of_own = seen(scores(each, held.keys), places.own)
    # The new token is read from its key itself: the cache is read before it is written.
    of_new = scores(each, jnp.swapaxes(new_keys, 3, 4))
    # What is not seen has weight 0 beside the new token, which always is.
    highest = jnp.maximum(jnp.maximum(of_prompt.max(-1), of_own.max(-1))[..., None], of_new)
    weights = [jnp.exp(x - highest) for x in (of_prompt, of_own, of_new)]
    total = jnp.sum(jnp.stack([x.sum(-1, keepdims=True) for x in weights]), axis=0)
    from_prompt, from_own, from_new = (x.astype(dtype) for x in weights)
    attended = by_branch(product(by_prompt(from_prompt), held.prompt_values))
    attended += product(from_own, held.values) + product(from_new, new_values)

    slot = places.used % slots
    zero = jnp.zeros_like(slot)
    put = jax.lax.dynamic_update_slice
    # XLA writes in place only what it knows to be read before. So what is written hangs on what
    # was read, by conditions that always hold but for a NaN, which is then in the result, too.
    new_keys = jnp.where(total[..., :1, :] > 0, new_keys, 0)
    new_values = jnp.where(attended[..., :1, :] < jnp.inf, new_values, 0)
    new_keys = jnp.swapaxes(new_keys, 3, 4).astype(held.keys.dtype)
    held = held._replace(
        keys=put(held.keys, new_keys, (zero, zero, zero, zero, slot)),
        values=put(
            held.values, new_values.astype(held.values.dtype), (zero, zero, zero, slot, zero)
        ),
    )
    return (attended / total).astype(dtype).reshape(query.shape), held
