"""What a judging comes to: rates with intervals, and how far they are to be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table

from jaxpref.errors import UserError
from jaxpref.evaluation.judges.base import Comparison, Verdicts
from jaxpref.evaluation.win_rates import (
    Agreement,
    Interval,
    LengthControlled,
    WinRate,
    both_orders,
    length_controlled,
    win_rate,
)

# A score a prompt and sample; NaN where there is none.
_Scores = Float[np.ndarray, "prompts samples"]


class Judged(NamedTuple):
    """How often A's responses are preferred to B's.

    Attributes:
      win_rate: A's, over the prompts with a score.
      at_equal_lengths: the rate as if both were equally long, in characters.
      position_bias: from -1 to 1, how much the judge prefers what comes first; None if the order
        is nothing to it, or fewer than 2 prompts were asked in both orders.
      prompts: how many have a score.
      prompts_without_score: how many are left out, since no verdict on them can be read.
      comparisons: of two responses.
      comparisons_without_score: how many of them.
      if_all_lost: the rate if every verdict that cannot be read were for B.
      if_all_won: the rate if every one were for A.
      length_a: mean number of characters of A's responses, over the prompts.
      length_b: of B's.
      counts: of what was found in the files.
      told: what the judge says of itself.
      agreement: with another judging of the same responses, if one was named.
    """

    win_rate: WinRate
    at_equal_lengths: LengthControlled
    position_bias: float | None
    prompts: int
    prompts_without_score: int
    comparisons: int
    comparisons_without_score: int
    if_all_lost: float
    if_all_won: float
    length_a: float
    length_b: float
    counts: Mapping[str, int]
    told: Mapping[str, Any]
    agreement: Agreement | None = None


def judged(
    comparisons: Sequence[Comparison], verdicts: Verdicts, counts: Mapping[str, int], seed: int = 0
) -> Judged:
    """The rates that a judge's verdicts give. Several samples of a prompt are averaged first.

    Args:
      comparisons: those of one prompt follow each other.
      verdicts: on those whose responses differ; equal responses are a tie.
      counts: of what was found in the files.
      seed: of the bootstrap.

    Raises:
      UserError: fewer than 2 prompts have a verdict that can be read.
    """
    numbers = np.array([x.number for x in comparisons])
    scores = _by_prompt(numbers, verdicts.scores)
    missing = np.isnan(verdicts.scores)
    here = ~np.isnan(scores).all(1)
    if here.sum() < 2:
        raise UserError(
            f"{missing.sum():,} of {len(missing):,} comparisons have no verdict that can be read, "
            f"so {here.sum()} of {len(here):,} prompts have a score; a rate needs 2. Look at what "
            "the judge has answered."
        )
    # Where a comparison has no score, its lengths do not count either.
    length_a, length_b = (
        np.nanmean(_by_prompt(numbers, np.where(missing, np.nan, lengths))[here], 1)
        for lengths in np.array([[len(x.a), len(x.b)] for x in comparisons], float).T
    )
    return Judged(
        win_rate(scores[here], seed=seed),
        length_controlled(scores[here], length_a - length_b, seed=seed),
        _position_bias(comparisons, verdicts),
        int(here.sum()),
        int((~here).sum()),
        len(missing),
        int(missing.sum()),
        _rate_if(verdicts, numbers, 0.0),
        _rate_if(verdicts, numbers, 1.0),
        float(length_a.mean()),
        float(length_b.mean()),
        counts,
        verdicts.told,
    )


def _rate_if(verdicts: Verdicts, numbers: np.ndarray, score: float) -> float:
    """The rate if every verdict that cannot be read were this score."""
    orders = (verdicts.first, verdicts.first if verdicts.second is None else verdicts.second)
    first, second = (np.nan_to_num(x, nan=score) for x in orders)
    return float(np.nanmean(_by_prompt(numbers, (first + second) / 2), 1).mean())


def _by_prompt(numbers: np.ndarray, values: np.ndarray) -> _Scores:
    """Values of comparisons as a row a prompt, with NaN behind those that have fewer samples."""
    counts = np.bincount(numbers)
    table = np.full((len(counts), counts.max()), np.nan)
    table[np.arange(counts.max()) < counts[:, None]] = values
    return table


def _position_bias(comparisons: Sequence[Comparison], verdicts: Verdicts) -> float | None:
    if verdicts.second is None:
        return None
    asked = ~np.isnan(verdicts.scores) & np.array([x.a != x.b for x in comparisons])
    _, numbers = np.unique(np.array([x.number for x in comparisons])[asked], return_inverse=True)
    if len(numbers) == 0 or numbers.max() < 1:
        return None
    orders = (_by_prompt(numbers, x[asked]) for x in (verdicts.first, verdicts.second))
    return both_orders(*orders).position_bias


def as_json(value: Any) -> Any:
    """Named tuples as objects; what is no number as null."""
    if hasattr(value, "_asdict"):
        return {name: as_json(one) for name, one in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def table(found: Judged, a: str, b: str, judge: str) -> Table:
    """What was found, for the terminal."""
    rate, equal, both = found.win_rate, found.at_equal_lengths, found.agreement
    rows = [
        ("win rate of A", f"{rate.rate:.3f}", _shown(rate.interval)),
        ("  wins, ties, losses", f"{rate.wins:,}, {rate.ties:,}, {rate.losses:,}", ""),
        ("win rate at equal lengths", f"{equal.rate:.3f}", _shown(equal.interval)),
        ("  slope by length", f"{equal.slope:.3f}", "held at a bound" * equal.bounded),
        ("mean characters of A, of B", f"{found.length_a:.1f}, {found.length_b:.1f}", ""),
    ]
    if found.position_bias is not None:
        rows.append(("position bias", f"{found.position_bias:+.3f}", ""))
    if found.comparisons_without_score:
        missing, of = found.comparisons_without_score, found.comparisons
        rows += [
            ("comparisons without a verdict", f"{missing:,} of {of:,}", ""),
            ("  prompts left out for that", f"{found.prompts_without_score:,}", ""),
            ("  win rate if all were won", f"{found.if_all_won:.3f}", ""),
            ("  win rate if all were lost", f"{found.if_all_lost:.3f}", ""),
        ]
    if both is not None:
        rows += [
            ("agreement with the other judge", f"{both.share:.3f}", _shown(both.interval)),
            ("  Cohen's kappa", f"{both.kappa:.3f}", _shown(both.kappa_interval)),
        ]
    shown = Table(title=f"A: {a}\nB: {b}\njudge: {judge}", title_justify="left")
    shown.add_column("")
    shown.add_column("", justify="right")
    shown.add_column("95% interval", justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def _shown(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"
