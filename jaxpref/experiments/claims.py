"""What a paper claims, and whether the points say so."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpref.errors import UserError
from jaxpref.experiments.points import Chosen, Estimate, Point, estimate, select, shown

HELD, FAILED, OPEN = "held", "did not hold", "not resolved"
# With other settings than the record's own a claim may be about what no job measures.
ABSENT = "not measured"


class Claim(NamedTuple):
    """That something measured is at least so large, or larger than something else.

    Attributes:
      text: a sentence.
      measure: what is compared.
      of: labels of the points that are said to be larger. Where several points have them, the
        mean over these points counts.
      than: labels of the points that are said to be smaller; None to compare with a number.
      by: the number, or by how much it is larger at least.
    """

    text: str
    measure: str
    of: Chosen
    than: Chosen | None = None
    by: float = 0.0


class Verdict(NamedTuple):
    """How a claim ends.

    Attributes:
      claim: of which it is.
      verdict: "held" if the whole 95% interval agrees with the claim, "did not hold" if the whole
        interval contradicts it, else "not resolved"; "not measured" if no point is of it.
      found: what was measured, or by how much it is larger.
      over: the units of its interval.
    """

    claim: Claim
    verdict: str
    found: Estimate
    over: str


def decide(claim: Claim, points: Sequence[Point]) -> Verdict:
    """Compares by a 95% interval, unit by unit where both sides have the same units.

    Args:
      claim: what is said.
      points: all that were measured.

    Raises:
      UserError: the points of one side are of different units.
    """
    of, than = _of(claim, claim.of, points), _of(claim, claim.than, points)
    if not of or (claim.than is not None and not than):
        nothing = Estimate(math.nan, math.nan, math.nan, math.nan, 0)
        return Verdict(claim, ABSENT, nothing, "")
    larger, over = _mean(claim, of)
    found = estimate(larger, over)
    if claim.than is not None:
        smaller, other_over = _mean(claim, than)
        if over == other_over and len(larger) == len(smaller):
            found = estimate(larger - smaller, over)
        else:
            found = _apart(found, estimate(smaller, other_over))
        over = over or other_over
    verdict = OPEN
    # No difference at all is not a larger one.
    if found.low > claim.by or (claim.than is None and found.low == claim.by):
        verdict = HELD
    elif found.high < claim.by:
        verdict = FAILED
    return Verdict(claim, verdict, found, over)


def _of(claim: Claim, labels: Chosen | None, points: Sequence[Point]) -> list[Point]:
    """The points with these labels that have the measure."""
    return [p for p in select(points, labels or {}) if claim.measure in p.values]


def _mean(claim: Claim, chosen: Sequence[Point]) -> tuple[Float[np.ndarray, " units"], str]:
    """The measure, in each unit the mean over the points."""
    units = {(len(p.values[claim.measure]), p.over) for p in chosen}
    if len(units) != 1:
        raise UserError(
            f"the claim {claim.text!r} takes {claim.measure} of {shown(chosen[0].labels)} together "
            "with points of other units. Mend the experiment's record."
        )
    values = np.mean([np.asarray(p.values[claim.measure], float) for p in chosen], axis=0)
    return values, chosen[0].over


def _apart(larger: Estimate, smaller: Estimate) -> Estimate:
    """The difference of two means of different units, with normal intervals of both joined."""
    mean, error = larger.mean - smaller.mean, float(np.hypot(larger.error, smaller.error))
    half = float(np.hypot(larger.high - larger.mean, smaller.high - smaller.mean))
    return Estimate(mean, error, mean - half, mean + half, min(larger.units, smaller.units))
