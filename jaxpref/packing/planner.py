"""Which group goes into which row, by lengths alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


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
    most = rows * budget.row_length, rows * budget.scored_length
    opened: list[_Filling] = []
    found: list[Plan] = []
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        wanted = np.array([sizes[group], scored[group]])
        for number, filling in enumerate([*opened, _Filling([], [], np.zeros(2, int))]):
            if (filling.held + wanted > most).any():
                continue
            # Groups come longest first, so that each is added to what was placed before it.
            tried = _Filling(
                [list(row) for row in filling.rows], list(filling.free), filling.held + wanted
            )
            _best_fit(
                parts[group],
                prompt_lengths,
                response_lengths,
                budget.row_length,
                table,
                into=tried,
            )
            dealt = _dealt(tried.rows, response_lengths, budget, rows)
            if dealt is not None:
                opened[number : number + 1], found[number : number + 1] = [tried], [dealt]
                break
        else:
            raise ValueError(
                f"group {group}, with a prompt of {prompt_lengths[group]} tokens and responses of "
                f"{list(response_lengths[group])}, does not fit a micro-batch of {rows} rows with "
                f"{budget.row_length} tokens and {budget.scored_length} scored ones each. Give it "
                "more rows (sampling.rows), or make them longer (data.row_length)."
            )
    return found


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


def widen(plan: Plan, rows: int, shards: int = 1) -> Plan:
    """The plan with empty rows added to each shard until there are `rows` in all."""
    old, new = len(plan) // shards, rows // shards
    blocks = [plan[i * old : (i + 1) * old] for i in range(shards)]
    return [row for block in blocks for row in [*block, *([] for _ in range(new - old))]]


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


class _Filling(NamedTuple):
    """Rows that are being filled.

    Attributes:
      rows: the parts of each.
      free: tokens, and scored tokens, that each has room for.
      held: tokens and scored tokens of all groups in them.
    """

    rows: Plan
    free: list[tuple[int, int]]
    held: Int[np.ndarray, " two"]


def _best_fit(
    parts: Sequence[Part],
    prompt_lengths: Sequence[int],
    response_lengths: Lengths,
    row_length: int,
    scored_length: int | None = None,
    into: _Filling | None = None,
) -> Plan:
    """Parts in rows, longest first, each in the fullest row that has room for it.

    A row has at most `scored_length` tokens of responses, unless a single one has more. Where rows
    are given in `into`, the parts are added to them in place.
    """
    most = row_length if scored_length is None else scored_length
    scored = {p: sum(response_lengths[p.group][k] for k in p.responses) for p in parts}
    sizes = {part: prompt_lengths[part.group] + scored[part] for part in parts}
    rows, free, _ = into or _Filling([], [], np.zeros(2, int))
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
