"""The verdict in what a judge has written."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

# The score of the response that came first.
_SCORES = {
    "A>>B": 1.0,
    "A>B": 0.75,
    "A=B": 0.5,
    "B>A": 0.25,
    "B>>A": 0.0,
    "A": 1.0,
    "B": 0.0,
    "C": 0.5,
    "TIE": 0.5,
}
# Longer verdicts come first, since "A" is how "A>B" begins.
_VERDICT = f"({'|'.join(sorted(_SCORES, key=len, reverse=True))})"
_BRACKETED = re.compile(rf"\[\[\s*{_VERDICT}\s*\]\]", re.IGNORECASE)
# What may stand around a verdict: quotes, brackets, Markdown.
_AROUND = r"(?:[^\w/:<=>]|_)*"
_CLOSING = re.compile(
    rf"(?:[^:]*:)?{_AROUND}(?:(?:summary|response|answer|assistant|option)[ _])?"
    rf"{_AROUND}{_VERDICT}{_AROUND}",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\W*([AB])\W*", re.IGNORECASE)


class Verdict(NamedTuple):
    """A verdict, and where it stands.

    Attributes:
      score: of the response that came first.
      place: of the verdict's first character in the text.
    """

    score: float
    place: int


def find_verdict(text: str) -> Verdict | None:
    """The verdict of an answer; None if it has none, or several that differ.

    It is what stands in double brackets anywhere, as in `[[A]]`, `[[C]]` or `[[A>>B]]`; else what
    the last line says, as in `Preferred: A`, or in a letter alone. `C`, `tie` and `A=B` are ties,
    `A>>B` is 1, `A>B` 3/4, `B>A` 1/4 and `B>>A` 0 for the response that came first.

    >>> find_verdict("Comparison: B repeats itself.\\nPreferred: A")
    Verdict(score=1.0, place=41)
    """
    found = [
        Verdict(_SCORES[match[1].upper()], match.start(1)) for match in _BRACKETED.finditer(text)
    ]
    if found:
        return found[-1] if len({verdict.score for verdict in found}) == 1 else None
    whole = text.rstrip()
    start = whole.rfind("\n") + 1
    closing = _CLOSING.fullmatch(whole, start)
    return closing and Verdict(_SCORES[closing[1].upper()], closing.start(1))


def letter_score(text: str, tokens: Sequence[tuple[str, Mapping[str, float]]]) -> float | None:
    """The probability that a judge's letter is A rather than B, p(A) / (p(A) + p(B)).

    Args:
      text: of the answer.
      tokens: of the answer, each with the log-probs (nats) of the likeliest tokens in its place.

    Returns:
      The score of the response that came first; for a verdict that is neither, as for a tie, the
      verdict's own; None if there is none.
    """
    verdict = find_verdict(text)
    if verdict is None:
        return None
    # Some endpoints cut blanks from the ends of a text, but not from its tokens.
    joined = "".join(token for token, _ in tokens)
    place = verdict.place + max(joined.find(text), 0)
    ends = accumulate(len(token) for token, _ in tokens)
    likeliest = next(
        (each for (_, each), stop in zip(tokens, ends, strict=True) if stop > place), {}
    )
    chances = {"A": 0.0, "B": 0.0}
    for name, logp in likeliest.items():
        if letter := _LETTER.fullmatch(name):
            chances[letter[1].upper()] += math.exp(logp)
    total = sum(chances.values())
    return chances["A"] / total if total > 0 else verdict.score
