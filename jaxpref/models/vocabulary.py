"""Embeddings of tokens, from a table that may lie over many devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref import sharding
from jaxpref.collectives import Split


def look_up(
    table: Float[Array, "vocabulary width"], tokens: Int[Array, "*positions"]
) -> Float[Array, "*positions width"]:
    """The rows of a table that tokens name.

    On a mesh activations move, and never the table: each device looks up, in its own columns, the
    tokens of all devices that share the table's width with it, and sends them what they need.

    Args:
      table: embeddings.
      tokens: token ids below the vocabulary size; others give NaN.
    """
    split = sharding.table_split(table.shape)
    if split is None:
        return jnp.take(table, tokens, axis=0)

    def look_up_here(table: Array, tokens: Array) -> Array:
        return _look_up_here(table, tokens, split)

    flat = tokens.ravel()
    padded = jnp.pad(flat, (0, -flat.size % split.shards))
    rows = jax.shard_map(look_up_here, in_specs=(split.table, split.rows), out_specs=split.rows)
    return rows(table, padded)[: flat.size].reshape(*tokens.shape, -1)


def _look_up_here(
    table: Float[Array, "entries columns"], tokens: Int[Array, " positions"], split: Split
) -> Float[Array, "positions width"]:
    if split.width is not None:
        tokens = jax.lax.all_gather(tokens, split.width, tiled=True)
    entries = table.shape[0]
    first = jnp.int32(0)
    if split.vocabulary is not None:
        first = jax.lax.axis_index(split.vocabulary) * entries
    here = (tokens >= first) & (tokens < first + entries)
    found = jnp.where(here[:, None], table[jnp.where(here, tokens - first, 0)], 0)
    if split.vocabulary is not None:
        entries *= jax.lax.axis_size(split.vocabulary)
        found = jax.lax.psum(found, split.vocabulary)
    known = (tokens >= 0) & (tokens < entries)
    found = jnp.where(known[:, None], found, jnp.nan)
    if split.width is None:
        return found
    return jax.lax.all_to_all(found, split.width, split_axis=0, concat_axis=1, tiled=True)
