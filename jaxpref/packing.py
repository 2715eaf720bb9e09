"""The preference tree: K responses that share one prompt, packed into rows.

A group is a prompt followed by its K responses; a row holds several groups:

    tokens     p p p p | a a a | b b b b |  q q | c c | d d d |  . .
    positions  0 1 2 3 | 4 5 6 | 4 5 6 7 |  0 1 | 2 3 | 2 3 4 |  0 0
    group      1 1 1 1   1 1 1   1 1 1 1    2 2   2 2   2 2 2    0 0     0 = padding
    branch     0 0 0 0   1 1 1   2 2 2 2    0 0   1 1   2 2 2    0 0     0 = prompt, k = k-th

A token sees the earlier tokens of its group that lie in the prompt or in its own
branch, so every response sees exactly what it would see in a row of its own.

What is scored is a table apart: `source` says which hidden state predicts, `target`
which token, `response` whose it is. The first token of every response is predicted
from the prompt's last hidden state. Only these positions ever meet the LM head. A
response may have tokens that it sees but that are not scored, such as what a user said
between two turns of the assistant; they are in its branch and not in the table.

Rows are divided into equal shards, one a device along the batch axes of the mesh, and
the scored positions of a shard's rows share one table, so that a long response in one
row may use the room that another row leaves.

A group too long for one row is split over several, each with the prompt again. Losses
still see whole groups, because sums per response come out in batch order, wherever
the responses were placed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


class Group(NamedTuple):
    """Token ids of a prompt and its responses.

    Attributes:
      prompt: the prompt, at least one token.
      responses: K responses of at least one token each.
      context: which tokens of each response are seen but not scored; None for none.
    """

    prompt: Int[np.ndarray, " prompt_tokens"]
    responses: Sequence[Int[np.ndarray, " response_tokens"]]
    context: Sequence[Bool[np.ndarray, " response_tokens"]] | None = None

    @property
    def scored(self) -> list[Int[np.ndarray, " scored_tokens"]]:
        """The places in each response of the tokens that are scored."""
        if self.context is None:
            return [np.arange(len(response)) for response in self.responses]
        return [np.flatnonzero(~context) for context in self.context]

    @property
    def scored_lengths(self) -> list[int]:
        """How many tokens of each response are scored."""
        if self.context is None:
            return [len(response) for response in self.responses]
        return [int((~context).sum()) for context in self.context]


class Tree(NamedTuple):
    """Whose token each one is: the tree itself, as the drawing above has it.

    Attributes:
      group: 1, 2, ... within a row; 0 is padding.
      branch: 0 for a prompt, k for the k-th response of the group.
    """

    group: Int[Array | np.ndarray, "*micro rows length"]
    branch: Int[Array | np.ndarray, "*micro rows length"]


class Seats(NamedTuple):
    """Where the tokens of rows sit: all that `sees` needs to say who sees whom.

    Attributes:
      order: each token's place in its row, or its slot in a cache; the same in every row.
      positions: position of each token in its own sequence, which windows are measured in.
      tree: groups and branches; None where a row is one sequence.
    """

    order: Int[Array, " length"]
    positions: Int[Array, "rows length"]
    tree: Tree | None = None

    def between(self, start: int, end: int) -> "Seats":
        """The seats of the tokens from `start` to before `end`."""
        return jax.tree.map(lambda x: x[..., start:end], self)


def sees(
    queries: Seats, keys: Seats, window: Int[Array, ""] | int | None = None
) -> Bool[Array, "rows queries keys"]:
    """Who sees whom, as `mask[row, query, key]`: the one rule of attention.

    A query sees a key that is not later, is in the same group, and is in the prompt (branch 0)
    or in the query's own branch. Padding sees padding, so that no query is left without a key.

    Args:
      queries: seats of the tokens that look.
      keys: seats of the tokens that are looked at; with a tree if the queries have one.
      window: a query sees only keys whose position is less than this before its own; 0 or
        None for all keys.

    Raises:
      ValueError: only one of them has a tree.
    """
    if (queries.tree is None) != (keys.tree is None):
        raise ValueError("queries and keys should both have a tree, or neither.")
    mask = (queries.order[:, None] >= keys.order[None, :])[None]
    if queries.tree is not None and keys.tree is not None:
        mask &= queries.tree.group[:, :, None] == keys.tree.group[:, None, :]
        own, branch = queries.tree.branch[:, :, None], keys.tree.branch[:, None, :]
        mask &= (branch == 0) | (branch == own)
    if window is not None:
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]
        mask &= (distance < window) | (window == 0)
    return jnp.broadcast_to(mask, (queries.positions.shape[0], *mask.shape[1:]))


# The fields of a batch that have a row for each row of tokens.
ROW_FIELDS = ("tokens", "positions", "group", "branch", "source", "place", "target", "response")


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
      shards: number of equal blocks of rows whose scored positions share a table.
    """

    tokens: Int[Array | np.ndarray, "*micro rows length"]
    positions: Int[Array | np.ndarray, "*micro rows length"]
    group: Int[Array | np.ndarray, "*micro rows length"]
    branch: Int[Array | np.ndarray, "*micro rows length"]
    source: Int[Array | np.ndarray, "*micro rows scored"]
    place: Int[Array | np.ndarray, "*micro rows scored"]
    target: Int[Array | np.ndarray, "*micro rows scored"]
    response: Int[Array | np.ndarray, "*micro rows scored"]
    lengths: Int[Array | np.ndarray, "*micro groups responses"]
    extras: Mapping[str, Shaped[Array | np.ndarray, "..."]]
    token_extras: Mapping[str, Shaped[Array | np.ndarray, "*micro rows scored"]] = (
        dataclasses.field(default_factory=dict)
    )
    shards: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def tree(self) -> Tree:
        """Groups and branches, for a model: who sees whom, without an array of all pairs."""
        return Tree(self.group, self.branch)


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


class Budget(NamedTuple):
    """The fixed shape of a row, and how rows are dealt out.

    Attributes:
      row_length: tokens a row.
      scored_length: scored tokens a row; the rows of a shard pool theirs.
      shards: rows come in multiples of this.
    """

    row_length: int
    scored_length: int
    shards: int = 1


class Part(NamedTuple):
    """A group's prompt with some of its responses, which go into one row together."""

    group: int
    responses: tuple[int, ...]


# Rows, each a list of the parts it holds. There is a multiple of `shards` of them,
# and some may be empty.
Plan = list[list[Part]]
Lengths = Sequence[Sequence[int]]


# A function of prompt lengths, response lengths, the budget, and the scored tokens of each
# response.
Planner = Callable[[Sequence[int], Lengths, Budget, Lengths | None], Plan]


def plan_tree(
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    budget: Budget,
    scored_lengths: Lengths | None = None,
) -> Plan:
    """Places groups in as few rows as best-fit decreasing finds.

    Args:
      prompt_lengths: tokens of each group's prompt.
      response_lengths: tokens of each group's responses.
      budget: the shape of a row.
      scored_lengths: those of them that are scored; None: all.

    Returns:
      The rows, as many as `round_rows` allows and divisible by `budget.shards`; the
      same plan for the same lengths, on every host.

    Raises:
      ValueError: a prompt with one response is longer than a row.
    """
    parts = _split_all(prompt_lengths, response_lengths, budget.row_length)
    rows = _best_fit(
        [part for group in parts for part in group],
        prompt_lengths,
        response_lengths,
        budget.row_length,
    )
    return _deal(rows, scored_lengths or response_lengths, budget)


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    budget: Budget,
    rows: int,
) -> list[Plan]:
    """Places groups in micro-batches of a fixed shape, as few as first fit finds.

    However long responses are, the shape stays the same; their number varies. All responses of a
    group are in one micro-batch, so that losses which compare them see them together.

    Args:
      prompt_lengths: tokens of each group's prompt.
      response_lengths: tokens of each group's responses.
      budget: the shape of a row.
      rows: of a micro-batch, over all shards.

    Returns:
      The rows of each micro-batch.

    Raises:
      ValueError: a prompt with one response is longer than a row, or a group is too large for a
        micro-batch.
    """
    if rows % budget.shards:
        raise ValueError(f"{rows} rows cannot be dealt out evenly to {budget.shards} shards.")
    # A row with more scored tokens than the table of its shard would find no place.
    table = rows // budget.shards * budget.scored_length
    parts = _split_all(prompt_lengths, response_lengths, budget.row_length, table)
    scored = [sum(lengths) for lengths in response_lengths]
    # The prompt is in each of the rows that a group is split over.
    sizes = [
        scored_tokens + len(of_group) * prompt
        for scored_tokens, of_group, prompt in zip(scored, parts, prompt_lengths, strict=True)
    ]
    found: list[tuple[list[int], Plan]] = []
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        for number, (held, _) in enumerate([*found, ([], [])]):
            groups = [*held, group]
            if (
                sum(sizes[g] for g in groups) > rows * budget.row_length
                or sum(scored[g] for g in groups) > rows * budget.scored_length
            ):
                continue
            packed = _best_fit(
                [part for g in groups for part in parts[g]],
                prompt_lengths,
                response_lengths,
                budget.row_length,
                table,
            )
            dealt = _dealt(packed, response_lengths, budget, rows)
            if dealt is not None:
                found[number : number + 1] = [(groups, dealt)]
                break
        else:
            raise ValueError(
                f"group {group}, with a prompt of {prompt_lengths[group]} tokens and responses of "
                f"{list(response_lengths[group])}, does not fit a micro-batch of {rows} rows with "
                f"{budget.row_length} tokens and {budget.scored_length} scored ones each. Give it "
                "more rows (sampling.rows), or make them longer (data.row_length)."
            )
    return [dealt for _, dealt in found]


def plan_padded(
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    budget: Budget,
    scored_lengths: Lengths | None = None,
) -> Plan:
    """One response a row with its prompt, the layout of other libraries, for comparison."""
    rows = []
    for group, (prompt, responses) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        for k, length in enumerate(responses):
            _check_fits(group, k, prompt, length, budget.row_length)
            rows.append([Part(group, (k,))])
    return _deal(rows, scored_lengths or response_lengths, budget)


def round_rows(rows: int, shards: int = 1) -> int:
    """The number of rows to allocate for `rows`: few sizes, so few compilations.

    Rows per shard are exact up to 16, then round up to an eighth of a power of two: at
    most an eighth is empty, and sizes within a factor of two compile at most 8 times.
    """
    per_shard = max(-(-rows // shards), 1)
    step = max(2 ** ((per_shard - 1).bit_length() - 4), 1)
    return -(-per_shard // step) * step * shards


def scored_budget(
    prompt_lengths: Int[np.ndarray, " groups"],
    response_lengths: Int[np.ndarray, "groups responses"],
    row_length: int,
    scored_lengths: Int[np.ndarray, "groups responses"] | None = None,
) -> int:
    """Scored tokens a row that keep the table full: the data's own share, and a tenth more."""
    tokens = int(prompt_lengths.sum()) + int(response_lengths.sum())
    scored = response_lengths if scored_lengths is None else scored_lengths
    share = int(scored.sum()) / max(tokens, 1)
    return min(-(-int(1.1 * share * row_length + 1) // 16) * 16, row_length)


def plan(groups: Sequence[Group], budget: Budget, planner: Planner = plan_tree) -> Plan:
    """Plans the rows of `groups`.

    Raises:
      ValueError: an empty prompt or response, or one too long for a row; or a response none
        of whose tokens is scored.
    """
    _check_groups(groups)
    if min(budget) < 1:
        raise ValueError(f"a row needs at least one token and one scored token; got {budget}.")
    return planner(
        [len(group.prompt) for group in groups],
        [[len(response) for response in group.responses] for group in groups],
        budget,
        [group.scored_lengths for group in groups],
    )


def widen(plan: Plan, rows: int, shards: int = 1) -> Plan:
    """The plan with empty rows added to each shard until there are `rows` in all."""
    old, new = len(plan) // shards, rows // shards
    blocks = [plan[i * old : (i + 1) * old] for i in range(shards)]
    return [row for block in blocks for row in [*block, *([] for _ in range(new - old))]]


def pack(
    groups: Sequence[Group],
    *,
    row_length: int,
    scored_length: int | None = None,
    shards: int = 1,
    planner: Planner = plan_tree,
) -> PackedBatch:
    """Packs groups into rows.

    Args:
      groups: prompts with their responses; K may differ from group to group.
      row_length: tokens a row, at least the longest prompt plus response.
      scored_length: scored tokens a row; by default `row_length`, which always suffices.
      shards: blocks of rows, one a device along the batch axes of the mesh.
      planner: `plan_tree`, or `plan_padded` for one response a row.

    Returns:
      The batch, with NumPy arrays, its groups in the order given.

    Raises:
      ValueError: an empty prompt or response, or one too long for a row.

    >>> import numpy as np
    >>> group = Group(np.array([1, 2]), [np.array([3]), np.array([4, 5])])
    >>> pack([group], row_length=6).branch.tolist()
    [[0, 0, 1, 2, 2, 0]]
    """
    budget = Budget(row_length, row_length if scored_length is None else scored_length, shards)
    return materialise(plan(groups, budget, planner), groups, budget)


def pack_micro_batches(
    groups: Sequence[Group],
    budget: Budget,
    *,
    rows: int,
    micro_batches: int = 1,
    responses: int | None = None,
    batch_size: int | None = None,
) -> PackedBatch:
    """Packs groups into micro-batches of a fixed shape.

    In the tables every micro-batch has all groups; one that it does not hold is absent there.

    Args:
      groups: prompts with their responses, all of whose tokens are scored.
      budget: the shape of a row.
      rows: of a micro-batch, over all shards.
      micro_batches: how many there are at least; those beyond what the groups need come last and
        are empty.
      responses: see `materialise`.
      batch_size: see `materialise`.

    Raises:
      ValueError: see `plan_micro_batches`.
    """
    _check_groups(groups)
    plans = plan_micro_batches(
        [len(group.prompt) for group in groups],
        [[len(response) for response in group.responses] for group in groups],
        budget,
        rows,
    )
    empty: Plan = [[] for _ in range(rows)]
    plans += [empty] * (micro_batches - len(plans))
    size = batch_size or len(groups)
    parts = [
        materialise(plan, groups, budget, responses=responses, batch_size=size) for plan in plans
    ]
    return jax.tree.map(lambda *xs: np.stack(xs), *parts)


def materialise(
    plan: Plan,
    groups: Sequence[Group],
    budget: Budget,
    *,
    responses: int | None = None,
    batch_size: int | None = None,
) -> PackedBatch:
    """Writes the tokens of `groups` where `plan` places them.

    Args:
      plan: the rows.
      groups: the groups that were planned.
      budget: the shape that was planned for.
      responses: K of the tables; by default the largest K among the groups.
      batch_size: groups in the tables; by default those given. More are absent, with
        length 0.
    """
    rows, shards = len(plan), budget.shards
    responses = responses or max((len(group.responses) for group in groups), default=1)
    batch_size = batch_size or len(groups)
    tokens, positions, group_ids, branch = np.zeros((4, rows, budget.row_length), np.int32)
    table = (shards, rows // shards * budget.scored_length)
    source, place, target = np.zeros((3, *table), np.int32)
    response = np.full(table, batch_size * responses, np.int32)
    lengths = np.zeros((batch_size, responses), np.int32)
    filled = [0] * shards
    for row, parts in enumerate(plan):
        shard, row_in_shard = divmod(row, rows // shards)
        first_of_row = row_in_shard * budget.row_length
        end = 0
        for number, part in enumerate(parts, start=1):
            prompt = groups[part.group].prompt
            start, end = end, end + len(prompt)
            tokens[row, start:end] = prompt
            positions[row, start:end] = np.arange(len(prompt))
            group_ids[row, start:end] = number
            last_of_prompt = first_of_row + end - 1
            scored_places = groups[part.group].scored
            for k in part.responses:
                ids, places = groups[part.group].responses[k], scored_places[k]
                start, end = end, end + len(ids)
                tokens[row, start:end] = ids
                positions[row, start:end] = np.arange(len(prompt), len(prompt) + len(ids))
                group_ids[row, start:end] = number
                branch[row, start:end] = k + 1
                scored = slice(filled[shard], filled[shard] + len(places))
                filled[shard] += len(places)
                # Each token is predicted from the one before it, the first from the prompt.
                here = places + start + first_of_row
                source[shard, scored] = here - 1
                if places[0] == 0:
                    source[shard, scored.start] = last_of_prompt
                place[shard, scored] = here
                target[shard, scored] = ids[places]
                response[shard, scored] = part.group * responses + k
                lengths[part.group, k] = len(places)
    by_row = (rows, budget.scored_length)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        group=group_ids,
        branch=branch,
        source=source.reshape(by_row),
        place=place.reshape(by_row),
        target=target.reshape(by_row),
        response=response.reshape(by_row),
        lengths=lengths,
        extras={},
        shards=shards,
    )


def _split_all(
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    row_length: int,
    scored_length: int | None = None,
) -> list[list[Part]]:
    """The parts of each group, none of which is too long for a row."""
    return [
        _split(group, prompt, responses, row_length, scored_length or row_length)
        for group, (prompt, responses) in enumerate(
            zip(prompt_lengths, response_lengths, strict=True)
        )
    ]


def _split(
    group: int, prompt: int, responses: Sequence[int], row_length: int, scored_length: int
) -> list[Part]:
    """The group whole if it fits a row, else in parts that do, first fit decreasing."""
    room = min(row_length - prompt, scored_length)
    if sum(responses) <= room:
        return [Part(group, tuple(range(len(responses))))]
    parts: list[list[int]] = []
    for k in sorted(range(len(responses)), key=lambda k: -responses[k]):
        _check_fits(group, k, prompt, responses[k], row_length)
        for part in parts:
            if sum(responses[j] for j in part) + responses[k] <= room:
                part.append(k)
                break
        else:
            parts.append([k])
    return [Part(group, tuple(sorted(part))) for part in parts]


def _best_fit(
    parts: Sequence[Part],
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    row_length: int,
    scored_length: int | None = None,
) -> Plan:
    """Parts in rows, longest first, each in the fullest row that has room for it.

    A row has at most `scored_length` tokens of responses, unless a single one has more.
    """
    most = row_length if scored_length is None else scored_length
    scored = {p: sum(response_lengths[p.group][k] for k in p.responses) for p in parts}
    sizes = {part: prompt_lengths[part.group] + scored[part] for part in parts}
    rows: Plan = []
    free: list[tuple[int, int]] = []
    for part in sorted(parts, key=lambda part: -sizes[part]):
        fits = [
            (room, row)
            for row, (room, of_scored) in enumerate(free)
            if room >= sizes[part] and of_scored >= scored[part]
        ]
        if fits:
            _, row = min(fits)
        else:
            row = len(rows)
            rows.append([])
            free.append((row_length, most))
        rows[row].append(part)
        room, of_scored = free[row]
        free[row] = room - sizes[part], of_scored - scored[part]
    return rows


def _scored(rows: Plan, scored_lengths: Lengths) -> list[int]:
    """The scored tokens of each row."""
    return [sum(scored_lengths[p.group][k] for p in row for k in p.responses) for row in rows]


def _deal(rows: Plan, scored_lengths: Lengths, budget: Budget) -> Plan:
    """Deals rows to shards, with as many empty ones as it takes that no table overflows."""
    total = round_rows(len(rows), budget.shards)
    while (dealt := _dealt(rows, scored_lengths, budget, total)) is None:
        total = round_rows(total + 1, budget.shards)
    return dealt


def _dealt(rows: Plan, scored_lengths: Lengths, budget: Budget, total: int) -> Plan | None:
    """Deals rows to shards, most scored tokens first; None if a shard's table would overflow."""
    if len(rows) > total:
        return None
    scored = _scored(rows, scored_lengths)
    order = sorted(range(len(rows)), key=lambda row: -scored[row])
    per_shard = total // budget.shards
    shards: list[list[int]] = [[] for _ in range(budget.shards)]
    load = [0] * budget.shards
    for row in order:
        open_shards = [s for s in range(budget.shards) if len(shards[s]) < per_shard]
        shard = min(open_shards, key=lambda s: load[s])
        shards[shard].append(row)
        load[shard] += scored[row]
    if max(load) > per_shard * budget.scored_length:
        return None
    return [
        row
        for shard in shards
        for row in [*(rows[i] for i in sorted(shard)), *([] for _ in range(per_shard - len(shard)))]
    ]


def _check_fits(group: int, k: int, prompt: int, response: int, row_length: int) -> None:
    if prompt + response > row_length:
        raise ValueError(
            f"group {group}: a prompt of {prompt} tokens and response {k} of {response} do not fit "
            f"a row of {row_length}. Truncate them, or make rows longer (data.row_length)."
        )


def _check_groups(groups: Sequence[Group]) -> None:
    for index, group in enumerate(groups):
        empty = [k for k, response in enumerate(group.responses) if len(response) == 0]
        if len(group.prompt) == 0 or empty:
            what = f"response {empty[0]}" if empty else "the prompt"
            raise ValueError(
                f"group {index}: {what} is empty. A prompt needs a token to predict from "
                "(BOS will do), and a response a token to score."
            )
        if group.context is None:
            continue
        sizes = [len(response) for response in group.responses]
        if [len(context) for context in group.context] != sizes:
            raise ValueError(
                f"group {index}: context should say of each token of each response (there are "
                f"{sizes}) whether it is scored; it has {[len(c) for c in group.context]}."
            )
        unscored = [k for k, scored in enumerate(group.scored_lengths) if not scored]
        if unscored:
            raise ValueError(f"group {index}: no token of response {unscored[0]} is scored.")
