"""Filling rows with groups, and dealing the rows out to shards."""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from jaxpref.packing.tree import Alignment


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


class Part(NamedTuple):
    """A group's prompt with some of its responses, which go into one row together."""

    group: int
    responses: tuple[int, ...]


# Rows, each a list of the parts it holds. There is a multiple of `shards` of them,
# and some may be empty.
Plan = list[list[Part]]
Lengths = Sequence[Sequence[int]]


class Piece(NamedTuple):
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


class Sized(NamedTuple):
    """A group in pieces that fit rows, longest first, with what they take together.

    The prompt is in each of them.
    """

    group: int
    pieces: list[Piece]
    tokens: int
    scored: int


_S = TypeVar("_S", Piece, Sized)


def longest_first(sized: Iterable[_S]) -> list[_S]:
    """These in the order in which they find the fullest rows."""
    return sorted(sized, key=lambda one: -one.tokens)


def in_pieces(
    prompts: Sequence[int],
    responses: Lengths,
    scored: Lengths | None,
    budget: Budget,
    scored_length: float = math.inf,
) -> list[Sized]:
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

    def piece_of(group: int, chosen: tuple[int, ...]) -> Piece:
        of_part, of_scored = responses[group], scored_lengths[group]
        if len(chosen) < len(of_part):
            of_part, of_scored = [of_part[k] for k in chosen], [of_scored[k] for k in chosen]
        tokens = taken = prompts[group] + sum(of_part)
        if not plain:
            if len(chosen) > 1:
                tokens = aligned.places(prompts[group], of_part)[1][-1] + of_part[-1]
            taken = min(aligned.after(tokens), row_length)
        return Piece(Part(group, chosen), tokens, taken, sum(of_scored))

    def fits(piece: Piece) -> bool:
        return piece.tokens <= row_length and piece.scored <= scored_length

    def split(group: int) -> list[Piece]:
        pieces: list[Piece] = []
        for k in sorted(range(len(responses[group])), key=lambda k: -responses[group][k]):
            check_fits(group, k, prompts[group], responses[group][k], row_length)
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
            groups.append(Sized(group, [whole], whole.tokens, whole.scored))
        else:
            pieces = split(group)
            tokens, of_scored = sum([x.tokens for x in pieces]), sum([x.scored for x in pieces])
            groups.append(Sized(group, longest_first(pieces), tokens, of_scored))
    return groups


class Rows:
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

    def fullest(self, piece: Piece, but: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
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

    def add(self, piece: Piece, room: int, row: int) -> None:
        """Adds a piece to what `fullest` found for it."""
        if row < len(self.parts):
            del self._free[bisect.bisect_left(self._free, (room, row))]
        else:
            self.parts.append([])
            self.scored.append(0)
        self.parts[row].append(piece.part)
        self.scored[row] += piece.scored
        bisect.insort(self._free, (room - piece.taken, row))


def best_fit(groups: Iterable[Sized], row_length: int, scored_length: float = math.inf) -> Rows:
    """Groups in as few rows as best fit finds, the longest pieces first."""
    rows = Rows(row_length, scored_length)
    for piece in longest_first([piece for group in groups for piece in group.pieces]):
        rows.add(piece, *rows.fullest(piece))
    return rows


class Dealt(NamedTuple):
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


def deal_out(scored: Sequence[int], budget: Budget, total: int) -> Dealt | None:
    """Deals rows to shards, most scored tokens first; None if a shard's table would overflow."""
    if len(scored) > total:
        return None
    per_shard = total // budget.shards
    dealt = Dealt([0] * len(scored), [0] * budget.shards, [0] * budget.shards)
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


class MicroBatch:
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
        self._rows = Rows(budget.row_length, self.table)
        self._dealt = Dealt([], [0] * budget.shards, [0] * budget.shards)
        # Tokens that there is room for, and scored ones.
        self._room, self._scored_room = rows * budget.row_length, rows * budget.scored_length
        # The fewest scored tokens of a group that could not be dealt out. Those with as many would
        # be tried in vain, but for rare ones in rows that lie better.
        self._refused: float = math.inf

    def fill(self, groups: Sequence[Sized], pieces: Sequence[int]) -> list[Sized]:
        """Adds the groups that there is room for.

        Args:
          groups: longest first.
          pieces: for each group by its number, the most pieces that it or a shorter one is in.

        Returns:
          The other groups.
        """
        refused: list[Sized] = []
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
        dealt = deal_out(self._rows.scored, self._budget, self._total) or self._dealt
        return dealt.laid_out(self._rows.parts, self._per_shard)

    def _add(self, group: Sized) -> bool:
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

    def _deal_out(self, group: Sized, chosen: Sequence[int]) -> bool:
        """Whether the shards have room for a group in these rows, which they hold if they have."""
        before = Dealt(*map(list, self._dealt))
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
            dealt = deal_out(scored, self._budget, self._total)
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


def check_fits(group: int, k: int, prompt: int, response: int, row_length: int) -> None:
    """Refuses a response that no row has room for behind its prompt."""
    if prompt + response > row_length:
        raise ValueError(
            f"group {group}: a prompt of {prompt} tokens and response {k} of {response} do not fit "
            f"a row of {row_length}. Truncate them, or make rows longer (data.row_length)."
        )
