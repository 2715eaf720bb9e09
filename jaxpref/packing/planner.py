"""Which group goes into which row, by lengths alone."""

import bisect
import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpref.packing.tree import Alignment

# Fewer at a time leave a device idle.
_LEAST_TOKENS = 2_048


class Budget(NamedTuple):
    """The fixed shape of a row, and how rows are dealt out.

    Attributes:
      row_length: tokens a row.
      scored_length: scored tokens a row; the rows of a shard pool theirs.
      shards: rows come in multiples of this.
      aligned: where prompts end and responses start.
      own: the shards whose rows this process writes; None: all. Plans do not depend on it.
    """

    row_length: int
    scored_length: int
    shards: int = 1
    aligned: Alignment = Alignment()
    own: tuple[int, ...] | None = None


class Shape(NamedTuple):
    """What micro-batches of one shape are compiled for.

    Attributes:
      rows: of a micro-batch, over all shards.
      micro_batches: how many there are; the last ones may be empty.
    """

    rows: int
    micro_batches: int


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
    lengths = _Lengths.of(prompt_lengths, response_lengths, scored_lengths, budget)
    # The rows of a shard share a table of scored tokens, so that these alone close no row.
    rows = _filled(lengths, budget.row_length, None)
    total = round_rows(len(rows), budget.shards)
    while (dealt := _dealt(rows, lengths.scored, budget, total)) is None:
        # Where few rows share a table, fuller and emptier ones do not even out. Rows that are
        # closed by their scored tokens may still be few enough.
        table = total // budget.shards * budget.scored_length
        closed = _filled(lengths, budget.row_length, table)
        if (dealt := _dealt(closed, lengths.scored, budget, total)) is not None:
            break
        total = round_rows(total + 1, budget.shards)
    return dealt


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
    lengths = _Lengths.of(prompt_lengths, response_lengths, scored_lengths, budget)
    # A row with more scored tokens than the table of its shard would find no place.
    table = rows // budget.shards * budget.scored_length
    parts = _split_all(lengths, budget.row_length, table)
    # The prompt is in each of the rows that a group is split over.
    sizes = [np.sum([lengths.of_part(part) for part in of_group], axis=0) for of_group in parts]
    most = rows * budget.row_length, rows * budget.scored_length
    opened: list[_Filling] = []
    found: list[Plan] = []
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group][0]):
        for number, filling in enumerate([*opened, _Filling.empty()]):
            if (filling.held + sizes[group] > most).any():
                continue
            # Groups come longest first, so that each is added to what was placed before it.
            tried = filling.copy()
            _best_fit(parts[group], lengths, budget.row_length, table, tried)
            dealt = _dealt(tried.rows, lengths.scored, budget, rows)
            if dealt is not None:
                opened[number : number + 1], found[number : number + 1] = [tried], [dealt]
                break
        else:
            raise ValueError(
                f"group {group}, with a prompt of {prompt_lengths[group]} tokens and responses of "
                f"{list(response_lengths[group])}, does not fit a micro-batch of {rows} rows with "
                f"{budget.row_length} tokens and {budget.scored_length} scored ones each. Give it "
                "more rows (data.rows), or make them longer (data.row_length)."
            )
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

    def of(groups: np.ndarray) -> tuple[list[int], Lengths, Lengths]:
        here = response_lengths[groups] > 0
        return (
            prompt_lengths[groups].tolist(),
            [x[y].tolist() for x, y in zip(response_lengths[groups], here, strict=True)],
            [x[y].tolist() for x, y in zip(scored_lengths[groups], here, strict=True)],
        )

    given = rows
    if not given:
        share = max(tokens.mean() / budget.row_length, scored.mean() / budget.scored_length)
        average = batch_size * share / budget.shards
        least = min(_LEAST_TOKENS / budget.row_length, 1.1 * average)
        rows = math.ceil(max(average / 8, least)) * budget.shards
    # One shard has room for all others: each of their responses has a row, if need be.
    wanted = np.maximum((response_lengths > 0).sum(1), -(-scored // budget.scored_length))
    too_long = prompt_lengths + response_lengths.max(1) > budget.row_length
    for group in np.flatnonzero(too_long | (wanted > rows // budget.shards)):
        prompts, responses, of_scored = of(np.array([group]))
        if given:
            plan_micro_batches(prompts, responses, budget, rows, of_scored)
        else:
            rows = max(rows, len(plan_tree(prompts, responses, budget, of_scored)))
    longest = np.resize(np.argsort(-tokens, kind="stable")[:batch_size], batch_size)
    prompts, responses, of_scored = of(longest)
    plans = plan_micro_batches(prompts, responses, budget, rows, of_scored)
    # There are never more than if each group had a row to itself, as long as any rows can be dealt
    # out to the shards.
    of_prompts, of_responses = (
        -(-x // multiple) * multiple
        for x, multiple in zip((prompt_lengths, response_lengths), budget.aligned, strict=True)
    )
    places = of_prompts + of_responses.sum(1)
    alone = (places <= budget.row_length).all() and (scored <= budget.scored_length).all()
    dealt = rows == budget.shards or budget.scored_length == budget.row_length
    most = -(-batch_size // rows) if alone and dealt else len(plans) + 1
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


class _Lengths(NamedTuple):
    """Tokens of each group: of its prompt, of its responses, and those of these that are scored."""

    prompts: Sequence[int]
    responses: Lengths
    scored: Lengths
    aligned: Alignment

    @classmethod
    def of(
        cls, prompts: Sequence[int], responses: Lengths, scored: Lengths | None, budget: Budget
    ) -> "_Lengths":
        """Where nothing else is said, all tokens of responses are scored."""
        return cls(prompts, responses, responses if scored is None else scored, budget.aligned)

    def of_part(self, part: Part) -> tuple[int, int]:
        """Tokens that a part takes of a row, and scored ones."""
        group, chosen = part
        responses, scored = self.responses[group], self.scored[group]
        if self.aligned == Alignment() or len(chosen) < 2:
            tokens = self.prompts[group] + sum(responses[k] for k in chosen)
        else:
            of_part = [responses[k] for k in chosen]
            tokens = self.aligned.places(self.prompts[group], of_part)[1][-1] + of_part[-1]
        return tokens, sum(scored[k] for k in chosen)


class _Filling(NamedTuple):
    """Rows that are being filled.

    Attributes:
      rows: the parts of each.
      free: tokens that each has room for, with the row's number and the scored tokens that it has
        room for; sorted.
      held: tokens and scored tokens in all of them.
    """

    rows: Plan
    free: list[tuple[int, int, float]]
    held: Int[np.ndarray, " two"]

    @classmethod
    def empty(cls) -> "_Filling":
        """No rows."""
        return cls([], [], np.zeros(2, int))

    def copy(self) -> "_Filling":
        """Another that can be filled further, while this one stays."""
        return _Filling([list(row) for row in self.rows], list(self.free), self.held.copy())


def _filled(lengths: _Lengths, row_length: int, scored_length: int | None) -> Plan:
    """All groups in as few rows as best-fit decreasing finds; one that fits a row stays whole."""
    filling = _Filling.empty()
    parts = _split_all(lengths, row_length, None)
    every = [part for group in parts for part in group]
    _best_fit(every, lengths, row_length, scored_length, filling)
    return filling.rows


def _split_all(lengths: _Lengths, row_length: int, scored_length: int | None) -> list[list[Part]]:
    """The parts of each group, none of which is too long for a row."""
    most = math.inf if scored_length is None else scored_length
    return [_split(group, lengths, row_length, most) for group in range(len(lengths.prompts))]


def _split(group: int, lengths: _Lengths, row_length: int, scored_length: float) -> list[Part]:
    """The group whole if it fits a row, else in parts that do, first fit decreasing."""
    prompt, responses = lengths.prompts[group], lengths.responses[group]

    def fits(chosen: Sequence[int]) -> bool:
        tokens, scored = lengths.of_part(Part(group, tuple(chosen)))
        return tokens <= row_length and scored <= scored_length

    if fits(range(len(responses))):
        return [Part(group, tuple(range(len(responses))))]
    parts: list[list[int]] = []
    for k in sorted(range(len(responses)), key=lambda k: -responses[k]):
        _check_fits(group, k, prompt, responses[k], row_length)
        for part in parts:
            if fits([*part, k]):
                part.append(k)
                break
        else:
            parts.append([k])
    return [Part(group, tuple(sorted(part))) for part in parts]


def _best_fit(
    parts: Sequence[Part],
    lengths: _Lengths,
    row_length: int,
    scored_length: int | None,
    into: _Filling,
) -> None:
    """Adds parts to rows, longest first, each to the fullest one that has room for it.

    A row has at most `scored_length` scored tokens, unless a single response has more; None: any.
    """
    most = math.inf if scored_length is None else scored_length
    sizes = {part: lengths.of_part(part) for part in parts}
    for part in sorted(parts, key=lambda part: -sizes[part][0]):
        tokens, scored = sizes[part]
        # Another group may follow from there on.
        tokens = min(lengths.aligned.after(tokens), row_length)
        place = bisect.bisect_left(into.free, (tokens,))
        while place < len(into.free) and into.free[place][2] < scored:
            place += 1
        if place < len(into.free):
            room, row, of_scored = into.free.pop(place)
        else:
            room, row, of_scored = row_length, len(into.rows), most
            into.rows.append([])
        into.rows[row].append(part)
        bisect.insort(into.free, (room - tokens, row, of_scored - scored))
        into.held[:] += tokens, scored


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
    # The shards that have room for a row, by the scored tokens that they hold.
    loads = [(0, shard) for shard in range(budget.shards)]
    for row in order:
        load, shard = heapq.heappop(loads)
        if load + scored[row] > per_shard * budget.scored_length:
            return None
        shards[shard].append(row)
        if len(shards[shard]) < per_shard:
            heapq.heappush(loads, (load + scored[row], shard))
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
