"""Packed rows, and what is read of a model's output for their scored tokens."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpref.packing.tree import Alignment, Seats, Tree, sees

if TYPE_CHECKING:
    Values = Array | np.ndarray
else:
    # Where nothing has values yet, shapes stand for arrays, as JAX has it.
    Values = Any

# The fields of a batch that have a row for each row of tokens.
ROW_FIELDS = ("tokens", "positions", "group", "branch", "source", "place", "target", "response")


class Written(NamedTuple):
    """What is known of a whole batch where a process has written its own rows alone.

    Attributes:
      digest: of the plan and of the tokens of all groups, for processes to compare.
      tokens: in the rows of all processes.
    """

    digest: Int[Values, "*micro"]
    tokens: Int[Values, "*micro"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Groups packed into rows. Arrays may be NumPy's or JAX's.

    The batch of a train step has one more leading axis: its micro-batches.

    Attributes:
      tokens: token ids.
      positions: position of each token in its own prompt-plus-response sequence.
      group: 1, 2, ... within a row; 0 is padding.
      branch: 0 for a prompt, k for the k-th response of the group.
      source: which token's hidden state predicts, counted over the shard's rows laid
        end to end.
      place: where the scored token itself is, counted alike.
      target: the token to predict.
      response: `g * K + k` for the k-th response (from 0) of the batch's g-th group;
        `groups * K` is padding.
      lengths: scored tokens of each response; 0 where there is no response.
      extras: further arrays `[groups, ...]` in batch order, such as `reference_logps`.
      token_extras: further values of each scored position, such as advantages.
      written: of a batch that has the rows of one process alone, and is on no device yet.
      shards: number of equal blocks of rows whose scored positions share a table.
      aligned: where prompts end and responses start.
    """

    tokens: Int[Values, "*micro rows length"]
    positions: Int[Values, "*micro rows length"]
    group: Int[Values, "*micro rows length"]
    branch: Int[Values, "*micro rows length"]
    source: Int[Values, "*micro rows scored"]
    place: Int[Values, "*micro rows scored"]
    target: Int[Values, "*micro rows scored"]
    response: Int[Values, "*micro rows scored"]
    lengths: Int[Values, "*micro groups responses"]
    extras: Mapping[str, Shaped[Values, "..."]]
    token_extras: Mapping[str, Shaped[Values, "*micro rows scored"]] = dataclasses.field(
        default_factory=dict
    )
    written: Written | None = None
    shards: int = dataclasses.field(default=1, metadata={"static": True})
    aligned: Alignment = dataclasses.field(default=Alignment(), metadata={"static": True})

    @property
    def tree(self) -> Tree:
        """Groups and branches, for a model: who sees whom, without an array of all pairs."""
        return Tree(self.group, self.branch, self.aligned)


def attention_mask(batch: PackedBatch) -> Bool[Array, "rows length length"]:
    """Who sees whom in a batch, as `mask[row, query, key]`, by the rule of `sees`.

    For models of your own. It has an entry for every pair of tokens in a row; those of
    `jaxpref.models` take `batch.tree` instead.
    """
    order = jnp.arange(batch.tokens.shape[1])
    seats = Seats(order, jnp.asarray(batch.positions), jax.tree.map(jnp.asarray, batch.tree))
    return sees(seats, seats)


def gather_sources(
    hidden: Float[Array, "rows length width"], batch: PackedBatch
) -> Float[Array, "rows scored width"]:
    """The hidden states that predict the scored tokens; a gather within each shard."""
    return _gather(hidden, batch, batch.source)


def gather_places(
    hidden: Float[Array, "rows length width"], batch: PackedBatch
) -> Float[Array, "rows scored width"]:
    """The hidden states of the scored tokens themselves."""
    return _gather(hidden, batch, batch.place)


def _gather(hidden: Array, batch: PackedBatch, places: Array | np.ndarray) -> Array:
    rows, length, width = hidden.shape
    by_shard = hidden.reshape(batch.shards, rows // batch.shards * length, width)
    places = jnp.asarray(places)
    index = places.reshape(batch.shards, -1)
    return jnp.take_along_axis(by_shard, index[..., None], axis=1).reshape(*places.shape, width)


def is_last(batch: PackedBatch) -> Bool[Array, "rows scored"]:
    """Which scored tokens are the last of their response."""
    response = jnp.asarray(batch.response)
    by_shard = response.reshape(batch.shards, -1)
    padding = jnp.full((batch.shards, 1), batch.lengths.size, by_shard.dtype)
    following = jnp.concatenate([by_shard[:, 1:], padding], axis=1)
    return ((by_shard != following) & (by_shard < batch.lengths.size)).reshape(response.shape)


def index_in_response(batch: PackedBatch) -> Int[Array, "rows scored"]:
    """The place of each scored token among those of its response, from 0."""
    response = jnp.asarray(batch.response)
    by_shard = response.reshape(batch.shards, -1)
    index = jnp.broadcast_to(jnp.arange(by_shard.shape[1])[None], by_shard.shape)
    before = jnp.concatenate([jnp.full((batch.shards, 1), -1), by_shard[:, :-1]], axis=1)
    first = jax.lax.cummax(jnp.where(by_shard != before, index, 0), axis=1)
    return (index - first).reshape(response.shape)


def last_places(batch: PackedBatch, passed_over: int) -> Int[Array, "rows scored"]:
    """`batch.place`, but where a response ends: there, the place of what a classifier reads.

    That is the last token which is not `passed_over`: of the response, else of its prompt; if
    there is none, the prompt's first token (transformers' rule for sequence classifiers).
    """
    by_shard = lambda x: jnp.asarray(x).reshape(batch.shards, -1)  # noqa: E731
    place, target = by_shard(batch.place), by_shard(batch.target)
    index = jnp.broadcast_to(jnp.arange(place.shape[1])[None], place.shape)
    first = index - by_shard(index_in_response(batch))
    latest = jax.lax.cummax(jnp.where(target != passed_over, index, -1), axis=1)
    own = jnp.take_along_axis(place, jnp.maximum(latest, 0), axis=1)
    tokens, of_prompt = by_shard(batch.tokens), by_shard(batch.branch) == 0
    anchor = of_prompt & ((tokens != passed_over) | (by_shard(batch.positions) == 0))
    flat = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    in_prompt = jax.lax.cummax(jnp.where(anchor, flat, 0), axis=1)
    end_of_prompt = jnp.take_along_axis(by_shard(batch.source), first, axis=1)
    before = jnp.take_along_axis(in_prompt, end_of_prompt, axis=1)
    ends = by_shard(is_last(batch))
    places = jnp.where(ends, jnp.where(latest >= first, own, before), place)
    return places.reshape(batch.response.shape)


def response_sums(
    values: Float[Array, "*positions"], response: Int[Array, "*positions"], responses: int
) -> Float[Array, " responses"]:
    """Sums per-token values over each response.

    Args:
      values: one value a scored position.
      response: the response that each position belongs to. Ids outside
        `[0, responses)` mark padding and are dropped.
      responses: how many responses there are.

    Returns:
      One sum a response; 0 for a response without positions.
    """
    # A value at a padded position may be anything, NaN too; it must not reach a gradient.
    counts = (response >= 0) & (response < responses)
    return jax.ops.segment_sum(
        jnp.where(counts, values, 0).ravel(),
        jnp.where(counts, response, responses).ravel(),
        num_segments=responses,
    )


def response_means(
    values: Float[Array, "*positions"], response: Int[Array, "*positions"], responses: int
) -> Float[Array, " responses"]:
    """As `response_sums`, divided by each response's number of positions (0 if it has none)."""
    counts = response_sums(jnp.ones_like(values), response, responses)
    return response_sums(values, response, responses) / jnp.maximum(counts, 1)


def sum_by_response(
    values: Float[Array, "rows scored"], batch: PackedBatch
) -> Float[Array, "groups responses"]:
    """Sums per-token values over each response, in batch order."""
    groups, responses = batch.lengths.shape
    sums = response_sums(values, jnp.asarray(batch.response), groups * responses)
    return sums.reshape(groups, responses)
