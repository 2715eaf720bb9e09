"""Which group goes into which row, by lengths alone."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpref.packing.filling import (
    Budget,
    Lengths,
    MicroBatch,
    Part,
    Plan,
    best_fit,
    check_fits,
    deal_out,
    in_pieces,
    longest_first,
)

# Fewer at a time leave a device idle.
_LEAST_TOKENS = 2_048


class Shape(NamedTuple):
    """What micro-batches of one shape are compiled for.

    Attributes:
      rows: of a micro-batch, over all shards.
      micro_batches: how many there are; the last ones may be empty.
    """

    rows: int
    micro_batches: int


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
    of_groups = prompt_lengths, response_lengths, scored_lengths
    # The rows of a shard share a table of scored tokens, so that these alone close no row.
    rows = best_fit(in_pieces(*of_groups, budget), budget.row_length)
    total = round_rows(len(rows.parts), budget.shards)
    while (dealt := deal_out(rows.scored, budget, total)) is None:
        # Where few rows share a table, fuller and emptier ones do not even out. Rows that are
        # closed by their scored tokens, and groups that are split by theirs, may still need no
        # more.
        table = total // budget.shards * budget.scored_length
        closed = best_fit(in_pieces(*of_groups, budget, table), budget.row_length, table)
        if (dealt := deal_out(closed.scored, budget, total)) is not None:
            rows = closed
            break
        total = round_rows(total + 1, budget.shards)
    return dealt.laid_out(rows.parts, total // budget.shards)


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    budget: Budget,
    rows: int,
    scored_lengths: Lengths | None = None,
) -> list[Plan]:
    """Places groups in micro-batches of a fixed shape, as few as first fit finds.

    However long responses are, the shape stays the same; their number varies. All responses of a
    group are in one micro-batch, so that losses which compare them see them together.

    Args:
      prompt_lengths: tokens of each group's prompt.
      response_lengths: tokens of each group's responses.
      budget: the shape of a row.
      rows: of a micro-batch, over all shards.
      scored_lengths: those of the responses' tokens that are scored; None: all.

    Returns:
      The rows of each micro-batch.

    Raises:
      ValueError: a prompt with one response is longer than a row, or a group is too large for a
        micro-batch.
    """
    if rows % budget.shards:
        raise ValueError(f"{rows} rows cannot be dealt out evenly to {budget.shards} shards.")
    table = rows // budget.shards * budget.scored_length
    sized = in_pieces(prompt_lengths, response_lengths, scored_lengths, budget, table)
    left, found = longest_first(sized), list[Plan]()
    pieces, most = [0] * len(left), 1
    for group in reversed(left):
        pieces[group.group] = most = max(most, len(group.pieces))
    while left:
        # First fit asks each group in turn which is the first micro-batch with room for it. To ask
        # each micro-batch in turn which groups it has room for comes to the same.
        filling = MicroBatch(budget, rows)
        refused = filling.fill(left, pieces)
        if len(refused) == len(left):
            longest = left[0].group
            raise ValueError(
                f"group {longest}, with a prompt of {prompt_lengths[longest]} tokens and responses "
                f"of {list(response_lengths[longest])}, does not fit a micro-batch of {rows} rows "
                f"with {budget.row_length} tokens and {budget.scored_length} scored ones each. "
                "Give it more rows (data.rows), or make them longer (data.row_length)."
            )
        found.append(filling.plan())
        left = refused
    return found


def fixed_shape(
    prompt_lengths: Int[np.ndarray, " groups"],
    response_lengths: Int[np.ndarray, "groups responses"],
    budget: Budget,
    *,
    batch_size: int,
    rows: int = 0,
    scored_lengths: Int[np.ndarray, "groups responses"] | None = None,
) -> Shape:
    """The shape of micro-batches for whatever groups a batch has of these.

    Args:
      prompt_lengths: tokens of each group's prompt.
      response_lengths: tokens of each group's responses; 0 where there is none.
      budget: the shape of a row.
      batch_size: groups a batch; where there are fewer groups than that, they are in it repeatedly.
      rows: of a micro-batch, over all shards; 0: an eighth of what an average batch needs, or
        2,048 tokens a shard if that is more, and as many as any of the groups needs.
      scored_lengths: those of the responses' tokens that are scored; None: all.

    Returns:
      The rows, and as many micro-batches as the longest groups need, with one to spare where other
      groups might need one more.

    Raises:
      ValueError: see `plan_micro_batches`.
    """
    scored_lengths = response_lengths if scored_lengths is None else scored_lengths
    tokens = prompt_lengths + response_lengths.sum(1)
    scored = scored_lengths.sum(1)

    there = response_lengths > 0

    def of(groups: np.ndarray) -> tuple[list[int], Lengths, Lengths]:
        here = there[groups].tolist()

        def present(table: np.ndarray) -> Lengths:
            return [
                list(itertools.compress(*x)) for x in zip(table[groups].tolist(), here, strict=True)
            ]

        return prompt_lengths[groups].tolist(), present(response_lengths), present(scored_lengths)

    given = rows
    if not given:
        share = max(tokens.mean() / budget.row_length, scored.mean() / budget.scored_length)
        average = batch_size * share / budget.shards
        rows = _rows_a_shard(average, budget.row_length) * budget.shards
    # How many rows a shard surely suffice: where shards are as many as responses, each may have a
    # shard of its own. Else one shard has room for all of them, whole or each in a row of its own.
    aligned = budget.aligned
    laid = -(-prompt_lengths // aligned.prompt) * aligned.prompt
    laid += (-(-response_lengths // aligned.response) * aligned.response).sum(1)
    alone = np.where(laid <= budget.row_length, 1, there.sum(1))
    alone = np.where(there.sum(1) > budget.shards, alone, 1)
    in_one = _in_one_table(response_lengths, scored_lengths, budget.shards)
    wanted = np.maximum(alone, -(-in_one // budget.scored_length))
    too_long = prompt_lengths + response_lengths.max(1) > budget.row_length
    wanted = np.where(too_long, np.iinfo(wanted.dtype).max, wanted)
    # Those that want most come first: where they need more rows, these suffice for most others.
    for group in np.argsort(-wanted, kind="stable"):
        if wanted[group] <= rows // budget.shards:
            break
        one = of(np.array([group]))
        if given:
            plan_micro_batches(*one[:2], budget, rows, one[2])
            continue
        while not _holds(rows, *one, budget):
            rows += budget.shards
    longest = np.resize(np.argsort(-tokens, kind="stable")[:batch_size], batch_size)
    prompts, responses, of_scored = of(longest)
    plans = plan_micro_batches(prompts, responses, budget, rows, of_scored)
    # There are never more than if each group had a row to itself, as long as any rows can be dealt
    # out to the shards.
    fit = (laid <= budget.row_length).all() and (scored <= budget.scored_length).all()
    dealt = rows == budget.shards or budget.scored_length == budget.row_length
    most = -(-batch_size // rows) if fit and dealt else len(plans) + 1
    return Shape(rows, min(len(plans) + 1, most))


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
            check_fits(group, k, prompt, length, budget.row_length)
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
    *,
    batch_size: int = 0,
    rows: int = 0,
    shards: int = 1,
    cut: bool = True,
) -> int:
    """Scored tokens a row: the data's own share, and a tenth more, which keeps tables full.

    Where the few rows of a shard would have no room for what has to be in one table, it is as much
    as that takes: with more rows instead every batch would have these, and larger tables too.

    Args:
      prompt_lengths: tokens of each group's prompt.
      response_lengths: tokens of each group's responses; 0 where there is none.
      row_length: tokens a row.
      scored_lengths: those of the responses' tokens that are scored; None: all.
      batch_size: groups a batch; 0: so many that all tables have room.
      rows: of a micro-batch, over all shards; 0: as `fixed_shape` chooses them.
      shards: that rows are dealt out to.
      cut: whether a batch is cut into micro-batches.
    """
    tokens = int(prompt_lengths.sum()) + int(response_lengths.sum())
    scored = response_lengths if scored_lengths is None else scored_lengths
    share = int(scored.sum()) / max(tokens, 1)
    length = int(1.1 * share * row_length + 1)
    if batch_size and len(scored):
        average = batch_size * tokens / len(scored) / row_length / shards
        of_shard = _rows_a_shard(average, row_length) if cut else math.ceil(average)
        # A group that fits no row may be in as many as it has responses, in one shard if need be.
        count = (response_lengths > 0).sum(1)
        split = (prompt_lengths + response_lengths.sum(1) > row_length) & (count > shards)
        of_shard = rows // shards or max(of_shard, int(np.where(split, count, 1).max()))
        in_one = int(_in_one_table(response_lengths, scored, shards).max())
        length = max(length, -(-in_one // of_shard))
    return min(-(-length // 16) * 16, row_length)


def _rows_a_shard(average: float, row_length: int) -> int:
    """The rows of a micro-batch for a batch that needs so many rows a shard on average."""
    least = min(_LEAST_TOKENS / row_length, 1.1 * average)
    return math.ceil(max(average / 8, least))


def _in_one_table(
    response_lengths: Int[np.ndarray, "groups responses"],
    scored_lengths: Int[np.ndarray, "groups responses"],
    shards: int,
) -> Int[np.ndarray, " groups"]:
    """The scored tokens of each group that have to be in the table of one shard."""
    apart = (response_lengths > 0).sum(1) <= shards
    return np.where(apart, scored_lengths.max(1), scored_lengths.sum(1))


def _holds(
    rows: int, prompts: Sequence[int], responses: Lengths, scored: Lengths, budget: Budget
) -> bool:
    """Whether an empty micro-batch of so many rows has room for one group."""
    filling = MicroBatch(budget, rows)
    groups = in_pieces(prompts, responses, scored, budget, filling.table)
    return not filling.fill(groups, [len(groups[0].pieces)])


def _deal(rows: Plan, scored_lengths: Lengths, budget: Budget) -> Plan:
    """Deals rows to shards, with as many empty ones as it takes that no table overflows."""
    scored = [sum(scored_lengths[p.group][k] for p in row for k in p.responses) for row in rows]
    total = round_rows(len(rows), budget.shards)
    while (dealt := deal_out(scored, budget, total)) is None:
        total = round_rows(total + 1, budget.shards)
    return dealt.laid_out(rows, total // budget.shards)
