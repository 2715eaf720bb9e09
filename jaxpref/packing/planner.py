"""Which group goes into which row, by lengths alone."""

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

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
    of_groups = prompt_lengths, response_lengths, scored_lengths
    # The rows of a shard share a table of scored tokens, so that these alone close no row.
    rows = _filled(_sized(*of_groups, budget), budget.row_length)
    total = round_rows(len(rows.parts), budget.shards)
    while (dealt := _dealt(rows.scored, budget, total)) is None:
        # Where few rows share a table, fuller and emptier ones do not even out. Rows that are
        # closed by their scored tokens, and groups that are split by theirs, may still need no
        # more.
        table = total // budget.shards * budget.scored_length
        closed = _filled(_sized(*of_groups, budget, table), budget.row_length, table)
        if (dealt := _dealt(closed.scored, budget, total)) is not None:
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
    sized = _sized(prompt_lengths, response_lengths, scored_lengths, budget, table)
    left, found = _longest_first(sized), list[Plan]()
    pieces, most = [0] * len(left), 1
    for group in reversed(left):
        pieces[group.group] = most = max(most, len(group.pieces))
    while left:
        # First fit asks each group in turn which is the first micro-batch with room for it. To ask
        # each micro-batch in turn which groups it has room for comes to the same.
        filling = _MicroBatch(budget, rows)
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
    filling = _MicroBatch(budget, rows)
    groups = _sized(prompts, responses, scored, budget, filling.table)
    return not filling.fill(groups, [len(groups[0].pieces)])


class _Piece(NamedTuple):
    """A part, with what it takes of a row.

    Attributes:
      part: the part.
      tokens: how many it has.
      taken: how many it takes, up to where another group may follow.
      scored: those that are scored.
    """

    part: Part
    tokens: int
    taken: int
    scored: int


class _Sized(NamedTuple):
    """A group in pieces that fit rows, longest first, with what they take together.

    The prompt is in each of them.
    """

    group: int
    pieces: list[_Piece]
    tokens: int
    scored: int


_S = TypeVar("_S", _Piece, _Sized)


def _longest_first(sized: Iterable[_S]) -> list[_S]:
    """These in the order in which they find the fullest rows."""
    return sorted(sized, key=lambda one: -one.tokens)


def _sized(
    prompts: Sequence[int],
    responses: Lengths,
    scored: Lengths | None,
    budget: Budget,
    scored_length: float = math.inf,
) -> list[_Sized]:
    """The groups, each whole if it fits a row, else in parts that do, first fit decreasing.

    Args:
      prompts: tokens of each group's prompt.
      responses: tokens of each group's responses.
      scored: those of the responses' tokens that are scored; None: all.
      budget: the shape of a row.
      scored_length: what a row may have of them, unless a single response has more.
    """
    row_length, aligned = budget.row_length, budget.aligned
    plain = aligned == Alignment()

    def piece_of(group: int, chosen: tuple[int, ...]) -> _Piece:
        of_part, of_scored = responses[group], scored_lengths[group]
        if len(chosen) < len(of_part):
            of_part, of_scored = [of_part[k] for k in chosen], [of_scored[k] for k in chosen]
        tokens = taken = prompts[group] + sum(of_part)
        if not plain:
            if len(chosen) > 1:
                tokens = aligned.places(prompts[group], of_part)[1][-1] + of_part[-1]
            taken = min(aligned.after(tokens), row_length)
        return _Piece(Part(group, chosen), tokens, taken, sum(of_scored))

    def fits(piece: _Piece) -> bool:
        return piece.tokens <= row_length and piece.scored <= scored_length

    def split(group: int) -> list[_Piece]:
        pieces: list[_Piece] = []
        for k in sorted(range(len(responses[group])), key=lambda k: -responses[group][k]):
            _check_fits(group, k, prompts[group], responses[group][k], row_length)
            for number, piece in enumerate(pieces):
                longer = piece_of(group, tuple(sorted([*piece.part.responses, k])))
                if fits(longer):
                    pieces[number] = longer
                    break
            else:
                pieces.append(piece_of(group, (k,)))
        return pieces

    scored_lengths = responses if scored is None else scored
    groups = []
    for group, of_group in enumerate(responses):
        whole = piece_of(group, tuple(range(len(of_group))))
        if fits(whole):
            groups.append(_Sized(group, [whole], whole.tokens, whole.scored))
        else:
            pieces = split(group)
            tokens, of_scored = sum([x.tokens for x in pieces]), sum([x.scored for x in pieces])
            groups.append(_Sized(group, _longest_first(pieces), tokens, of_scored))
    return groups


class _Rows:
    """Rows that are being filled, by best fit.

    Attributes:
      parts: of each row.
      scored: tokens of each row.
    """

    def __init__(self, row_length: int, scored_length: float):
        """No rows yet.

        Args:
          row_length: tokens a row.
          scored_length: scored tokens a row, unless a single response has more.
        """
        self._row_length, self._scored_length = row_length, scored_length
        self.parts: Plan = []
        self.scored: list[int] = []
        # Tokens that each row has room for, with its number; sorted.
        self._free: list[tuple[int, int]] = []

    @property
    def most_room(self) -> int:
        """Tokens that the emptiest row has room for."""
        return self._free[-1][0]

    def fullest(self, piece: _Piece, but: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
        """The fullest row that has room for a piece, or else a new one, with that room before it.

        Args:
          piece: the piece.
          but: what was found for others, which are not added yet.
        """
        scored, most = self.scored, self._scored_length - piece.scored
        fuller = bisect.bisect_left(self._free, (piece.taken,))
        for place in itertools.islice(self._free, fuller, None):
            if scored[place[1]] <= most and place not in but:
                return place
        opened = len(scored)
        return self._row_length, opened + sum(row >= opened for _, row in but)

    def add(self, piece: _Piece, room: int, row: int) -> None:
        """Adds a piece to what `fullest` found for it."""
        if row < len(self.parts):
            del self._free[bisect.bisect_left(self._free, (room, row))]
        else:
            self.parts.append([])
            self.scored.append(0)
        self.parts[row].append(piece.part)
        self.scored[row] += piece.scored
        bisect.insort(self._free, (room - piece.taken, row))


def _filled(groups: Iterable[_Sized], row_length: int, scored_length: float = math.inf) -> _Rows:
    """Groups in as few rows as best fit finds, the longest pieces first."""
    rows = _Rows(row_length, scored_length)
    for piece in _longest_first([piece for group in groups for piece in group.pieces]):
        rows.add(piece, *rows.fullest(piece))
    return rows


class _Dealt(NamedTuple):
    """Rows that are dealt out to shards.

    Attributes:
      shards: of each row.
      loads: scored tokens of each shard.
      held: how many rows it holds.
    """

    shards: list[int]
    loads: list[int]
    held: list[int]

    def laid_out(self, rows: Plan, per_shard: int) -> Plan:
        """The rows of each shard after another, with empty ones where it has too few."""
        plan: Plan = [[] for _ in range(per_shard * len(self.held))]
        ends = list(range(0, len(plan), per_shard))
        for row, shard in zip(rows, self.shards, strict=True):
            plan[ends[shard]] = row
            ends[shard] += 1
        return plan


def _dealt(scored: Sequence[int], budget: Budget, total: int) -> _Dealt | None:
    """Deals rows to shards, most scored tokens first; None if a shard's table would overflow."""
    if len(scored) > total:
        return None
    per_shard = total // budget.shards
    dealt = _Dealt([0] * len(scored), [0] * budget.shards, [0] * budget.shards)
    # The shards that have room for a row, by the scored tokens that they hold.
    with_room = [(0, shard) for shard in range(budget.shards)]
    for row in sorted(range(len(scored)), key=scored.__getitem__, reverse=True):
        load, shard = with_room[0]
        load += scored[row]
        if load > per_shard * budget.scored_length:
            return None
        dealt.shards[row], dealt.loads[shard] = shard, load
        dealt.held[shard] += 1
        if dealt.held[shard] < per_shard:
            heapq.heapreplace(with_room, (load, shard))
        else:
            heapq.heappop(with_room)
    return dealt


class _MicroBatch:
    """A micro-batch that is being filled.

    To deal out its rows for each group anew would take most of the time. So each row keeps a shard
    while the tables have room, and only if one overflows are all rows dealt out again.

    Attributes:
      table: the scored tokens that a shard has room for.
    """

    def __init__(self, budget: Budget, rows: int):
        """An empty one.

        Args:
          budget: the shape of a row.
          rows: over all shards.
        """
        self._budget, self._total, self._per_shard = budget, rows, rows // budget.shards
        self.table = self._per_shard * budget.scored_length
        # A row with more scored tokens than the table of its shard would find no place.
        self._rows = _Rows(budget.row_length, self.table)
        self._dealt = _Dealt([], [0] * budget.shards, [0] * budget.shards)
        # Tokens that there is room for, and scored ones.
        self._room, self._scored_room = rows * budget.row_length, rows * budget.scored_length
        # The fewest scored tokens of a group that could not be dealt out. Those with as many would
        # be tried in vain, but for rare ones in rows that lie better.
        self._refused: float = math.inf

    def fill(self, groups: Sequence[_Sized], pieces: Sequence[int]) -> list[_Sized]:
        """Adds the groups that there is room for.

        Args:
          groups: longest first.
          pieces: for each group by its number, the most pieces that it or a shorter one is in.

        Returns:
          The other groups.
        """
        refused: list[_Sized] = []
        at, most = 0, self._room
        while at < len(groups):
            group = groups[at]
            if group.tokens > most:
                shorter = bisect.bisect_left(groups, -most, at, key=lambda group: -group.tokens)
                refused += groups[at:shorter]
                at = shorter
            elif self._add(group):
                at += 1
            else:
                refused.append(group)
                at += 1
                continue
            if at < len(groups):
                most = self._most(pieces[groups[at].group])
        return refused

    def _most(self, pieces: int) -> int:
        """As many tokens as a group in so many pieces may have, though it may find no room."""
        if len(self._rows.parts) < self._total:
            return self._room
        return min(self._room, pieces * self._rows.most_room)

    def plan(self) -> Plan:
        """Its rows, those with most scored tokens dealt out first if they can be."""
        dealt = _dealt(self._rows.scored, self._budget, self._total) or self._dealt
        return dealt.laid_out(self._rows.parts, self._per_shard)

    def _add(self, group: _Sized) -> bool:
        """Adds a group if there is room for it."""
        if group.scored > self._scored_room:
            return False
        rows, found = self._rows, list[tuple[int, int]]()
        for piece in group.pieces:
            found.append(rows.fullest(piece, found))
            if found[-1][1] >= self._total:
                return False
        if not self._deal_out(group, [row for _, row in found]):
            return False
        for piece, (room, row) in zip(group.pieces, found, strict=True):
            rows.add(piece, room, row)
            self._room -= piece.taken
        self._scored_room -= group.scored
        return True

    def _deal_out(self, group: _Sized, chosen: Sequence[int]) -> bool:
        """Whether the shards have room for a group in these rows, which they hold if they have."""
        before = _Dealt(*map(list, self._dealt))
        shards, loads, held = self._dealt
        fits = True
        for piece, row in zip(group.pieces, chosen, strict=True):
            if row == len(shards):
                shards.append(self._emptiest())
                held[shards[row]] += 1
            loads[shards[row]] += piece.scored
            fits = fits and loads[shards[row]] <= self.table
        if fits:
            return True
        dealt = None
        if group.scored < self._refused:
            scored = self._rows.scored + [0] * (len(shards) - len(before.shards))
            for piece, row in zip(group.pieces, chosen, strict=True):
                scored[row] += piece.scored
            dealt = _dealt(scored, self._budget, self._total)
            if dealt is None:
                self._refused = group.scored
        self._dealt = dealt or before
        return dealt is not None

    def _emptiest(self) -> int:
        """The shard that has fewest scored tokens of those with room for a row."""
        loads, held = self._dealt.loads, self._dealt.held
        emptiest = loads.index(min(loads))
        if held[emptiest] < self._per_shard:
            return emptiest
        with_room = (shard for shard, rows in enumerate(held) if rows < self._per_shard)
        return min(with_room, key=loads.__getitem__)


def _deal(rows: Plan, scored_lengths: Lengths, budget: Budget) -> Plan:
    """Deals rows to shards, with as many empty ones as it takes that no table overflows."""
    scored = [sum(scored_lengths[p.group][k] for p in row for k in p.responses) for row in rows]
    total = round_rows(len(rows), budget.shards)
    while (dealt := _dealt(scored, budget, total)) is None:
        total = round_rows(total + 1, budget.shards)
    return dealt.laid_out(rows, total // budget.shards)


def _check_fits(group: int, k: int, prompt: int, response: int, row_length: int) -> None:
    if prompt + response > row_length:
        raise ValueError(
            f"group {group}: a prompt of {prompt} tokens and response {k} of {response} do not fit "
            f"a row of {row_length}. Truncate them, or make rows longer (data.row_length)."
        )
