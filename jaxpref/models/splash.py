"""Attention over packed rows on TPUs: one call of JAX's splash-attention kernel.

Who sees whom is computed inside of the kernel, so that no array of all pairs of tokens exists.
Groups are the kernel's segments. Within a group a query sees the keys up to itself but for those
between its prompt's end and its own branch's start. These two and its own place are what the kernel
is given of each query, as one number of 32 bits.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpref import sharding
from jaxpref.packing import LONGEST_ALIGNED, Alignment, Seats, Tree

# The numbers of a query have this many bits together.
_BITS = 32
# Queries and keys of a block; shorter rows are one block, of whole lanes.
_BLOCK = 512
_LANES = 128
# What remat keeps of the kernel: its output and the log-sum-exps.
KEPT = "attended"


def refusal(row_length: int, platform: str) -> str | None:
    """Why the kernel cannot be had; None if it can.

    Args:
      row_length: tokens of a row.
      platform: of the devices, as JAX names it.
    """
    if platform != "tpu":
        return f"it is a kernel for TPUs, and the devices here are {platform}s"
    if row_length > LONGEST_ALIGNED:
        return f"it takes rows of up to {LONGEST_ALIGNED} tokens, and these have {row_length}"
    return None


def can(seats: Seats) -> bool:
    """Whether the kernel takes these rows, which may be others than those that were packed."""
    length = seats.order.shape[0]
    if seats.tree is None or length > LONGEST_ALIGNED:
        return length <= LONGEST_ALIGNED
    return seats.tree.aligned.includes(Alignment.of(length))


def splash_attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    seats: Seats,
    *,
    window: Int[Array, ""] | int | None = None,
    windows: tuple[int, ...] = (),
    scale: float | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """As `attention`, which has the arguments.

    Args:
      query: queries, already rotated.
      key: keys.
      value: values.
      seats: of the tokens, in the order of the row; a tree is aligned as `Alignment.of` its length
        says.
      window: see `packing.sees`; positions in a sequence are those in the row, but for what a
        branch does not see.
      windows: all that `window` may be, where it is an array.
      scale: of the scores; by default `head_dim ** -0.5`.
      soft_cap: bounds the scores; None for none.
      interpret: compute it without the kernel's compiler, on any device, slowly.

    Raises:
      ValueError: the tree is not aligned.
    """
    length, tree = query.shape[1], seats.tree
    wanted = Alignment.of(length)
    if tree is not None and not tree.aligned.includes(wanted):
        raise ValueError(
            f"splash attention over rows of {length} tokens needs prompts that end at multiples of "
            f"{wanted.prompt} and responses that start at multiples of {wanted.response}; this "
            f"tree has {tuple(tree.aligned)}. Pack it with Budget(..., aligned=Alignment.of(...))."
        )
    padded = -(-length // _LANES) * _LANES if length <= _BLOCK else -(-length // _BLOCK) * _BLOCK
    if tree is None:
        whole = jnp.zeros(query.shape[:2], jnp.int32)
        tree = Tree(whole + 1, whole)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    arrays = (query * jnp.asarray(factor, query.dtype), key, value, tree.group, tree.branch)
    missing = padded - length
    given = [
        jnp.pad(jnp.asarray(x), [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) for x in arrays
    ]
    if isinstance(window, int) or window is None:
        windows = (window or 0,)
    kernels = [
        _sharded(partial(_attend, _Visible(padded, w), soft_cap=soft_cap, interpret=interpret))
        for w in windows
    ]
    if len(kernels) == 1:
        return kernels[0](*given)[:, :length]
    which = jnp.argmax(jnp.asarray(windows) == window)
    return jax.lax.switch(which, kernels, *given)[:, :length]


def _sharded(attend: Any) -> Any:
    """The function on each device's own rows and heads."""

    def on_mesh(query: Array, key: Array, value: Array, group: Array, branch: Array) -> Array:
        names = ("rows", "length", "heads", "head_dim")
        of_queries = sharding.spec_of(names, query.shape)
        if of_queries is None:
            return attend(query, key, value, group, branch)
        of_keys = sharding.spec_of(("rows", "length", "kv_heads", "head_dim"), key.shape)
        assert of_keys is not None
        if of_keys[2] != of_queries[2]:
            # A device's query heads would not find theirs among all key heads.
            key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
            of_keys = of_queries
        of_tree = jax.sharding.PartitionSpec(of_queries[0])
        # The kernel's outputs do not say over which devices they vary.
        call = jax.shard_map(
            attend,
            in_specs=(of_queries, of_keys, of_keys, of_tree, of_tree),
            out_specs=of_queries,
            check_vma=False,
        )
        return call(query, key, value, group, branch)

    return on_mesh


class _Numbers(NamedTuple):
    """What a query is given: each of its numbers is an array over queries.

    Attributes:
      place: in the row.
      prompt_end: of its group, where it is in a branch but the first; else 0.
      branch_start: of its own branch; else 0, too.
    """

    place: Any
    prompt_end: Any
    branch_start: Any


@dataclasses.dataclass(frozen=True)
class _Visible:
    """Which keys a query sees within its group; what the kernel calls.

    Equal ones are one function to JAX, so that nothing is compiled twice.

    Attributes:
      length: of the rows.
      window: positions that a query sees back to; 0: all.
    """

    length: int
    window: int

    @property
    def bits(self) -> int:
        """Of a place in the row."""
        return max((self.length - 1).bit_length(), 1)

    def packed(self, numbers: _Numbers) -> Int[Array, "*queries"]:
        """A query's numbers as one."""
        aligned = Alignment.of(self.length)
        word = numbers.place.astype(jnp.uint32)
        shift = self.bits
        for number, multiple in (
            (numbers.branch_start, aligned.response),
            (numbers.prompt_end, aligned.prompt),
        ):
            word |= (number // multiple).astype(jnp.uint32) << shift
            shift += self.bits - (multiple.bit_length() - 1)
        return jax.lax.bitcast_convert_type(word, jnp.int32)

    def unpacked(self, words: Int[Array, "*queries"]) -> _Numbers:
        """The reverse."""
        aligned = Alignment.of(self.length)
        shift, numbers = self.bits, []
        for multiple in (aligned.response, aligned.prompt):
            bits = self.bits - (multiple.bit_length() - 1)
            part = jax.lax.shift_right_logical(words, jnp.full_like(words, shift))
            numbers.append((part & ((1 << bits) - 1)) * multiple)
            shift += bits
        return _Numbers(words & ((1 << self.bits) - 1), *reversed(numbers))

    def __call__(
        self, words: Int[Array, "queries keys"], keys: Int[Array, "queries keys"]
    ) -> Bool[Array, "queries keys"]:
        """Whether each query sees each key, if they are in one group."""
        place, prompt_end, branch_start = self.unpacked(words)
        own, in_prompt = keys >= branch_start, keys < prompt_end
        if self.window:
            # What lies between its prompt and its branch does not count for its distance.
            own &= place - keys < self.window
            in_prompt &= place - (branch_start - prompt_end) - keys < self.window
        return (keys <= place) & (own | in_prompt)


def _attend(
    visible: _Visible,
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    group: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    *,
    soft_cap: float | None,
    interpret: bool,
) -> Float[Array, "rows length heads head_dim"]:
    """On one device; the queries are scaled."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
        splash_attention_mask_info as mask_info,
    )

    block = min(visible.length, _BLOCK)
    of_blocks = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in of_blocks}

    def of_row(query: Array, key: Array, value: Array, group: Array, branch: Array) -> Array:
        numbers = _numbers(group, branch)
        words: Any = visible.packed(numbers)
        live = _live_blocks(numbers, group, block)

        def info(live: Array, *, queries_first: bool) -> Any:
            return mask_info.MaskInfo(
                data_next=_next_live(live, queries_first=queries_first)[None],
                mask_next=None,
                block_mask=live.astype(jnp.int8)[None],
                partial_mask_blocks=None,
                q_sequence=words,
            )

        forward = info(live, queries_first=False)
        kernel: Any = splash.SplashAttentionKernel(
            forward,
            forward,
            info(live, queries_first=True),
            block_sizes=splash.BlockSizes(**sizes),
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name=KEPT,
            mask_function=visible,
            interpret=interpret,
        )
        heads_first = (x.swapaxes(0, 1) for x in (query, key, value))
        return kernel(*heads_first, splash.SegmentIds(group, group)).swapaxes(0, 1)

    return jax.vmap(of_row)(query, key, value, group, branch)


def _numbers(group: Int[Array, " length"], branch: Int[Array, " length"]) -> _Numbers:
    """What a row's tree says of each of its queries."""
    place = jnp.arange(group.shape[0], dtype=jnp.int32)
    changed = (group[1:] != group[:-1]) | (branch[1:] != branch[:-1])
    starts = jnp.concatenate([jnp.ones(1, bool), changed])
    follows_prompt = jnp.concatenate([jnp.zeros(1, bool), branch[:-1] == 0])
    start = jax.lax.cummax(jnp.where(starts, place, 0))
    prompt_end = jax.lax.cummax(jnp.where(starts & follows_prompt & (branch > 0), place, 0))
    # Nothing lies between a prompt and its first branch.
    inside = (branch > 0) & (start > prompt_end)
    return _Numbers(place, jnp.where(inside, prompt_end, 0), jnp.where(inside, start, 0))


def _live_blocks(
    numbers: _Numbers, group: Int[Array, " length"], block: int
) -> Bool[Array, "query_blocks key_blocks"]:
    """Which blocks may have a query that sees a key, by the bounds of the blocks alone."""

    def bounds(x: Array) -> tuple[Array, Array]:
        by_block = x.reshape(-1, block)
        return by_block.min(axis=1), by_block.max(axis=1)

    # The groups of a row are numbered in its order. Padding is 0, and may see or not see itself.
    highest, lowest = bounds(group)[1], bounds(jnp.where(group == 0, group.shape[0], group))[0]
    first, last = bounds(numbers.place)
    live = (highest[None, :] >= lowest[:, None]) & (lowest[None, :] <= highest[:, None])
    live &= first[None, :] <= last[:, None]
    live |= jnp.eye(len(first), dtype=bool)
    end, start = bounds(numbers.prompt_end)[1], bounds(numbers.branch_start)[0]
    hidden = (first[None, :] >= end[:, None]) & (last[None, :] < start[:, None])
    return live & ~hidden


def _next_live(
    live: Bool[Array, "query_blocks key_blocks"], *, queries_first: bool
) -> Int[Array, "query_blocks key_blocks"]:
    """For each block that of keys (or of queries) which the kernel fetches next.

    What is fetched already is not fetched again, so that a block which is passed over names the one
    after it that is not.

    Args:
      live: which are not passed over.
      queries_first: whether the kernel goes through all queries of a block of keys, and not
        through all keys of a block of queries.
    """
    order = live.T if queries_first else live
    count = order.size
    index = jnp.where(order.ravel(), jnp.arange(count), count)
    following = jax.lax.cummin(index, reverse=True).reshape(order.shape)
    inner = jnp.where(following < count, following % order.shape[1], 0)
    return (inner.T if queries_first else inner).astype(np.min_scalar_type(-order.shape[1]))
