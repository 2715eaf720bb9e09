"""A person at the terminal as a judge, who does not know which response is whose."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxpref.evaluation.judges.answers import Answers, key_of
from jaxpref.evaluation.judges.base import Comparison, Judge, Verdicts
from jaxpref.terminal import console

_SCORES = {"1": 1.0, "2": 0.0, "t": 0.5}
_STOP = "q"
_QUESTION = "Which response is better? 1, 2, t for a tie, q to stop: "


def from_person(path: Path, *, seed: int = 0, ask: Callable[[str], str] = input) -> Judge:
    """A judge who reads each prompt with its responses, in an order that is drawn for each pair.

    Every answer is kept on disk at once, so that the same command goes on where it was stopped.

    Source: the human study of Rafailov et al. 2023 (arXiv 2305.18290), section 6.4.

    Args:
      path: of the answers.
      seed: of the orders.
      ask: shows a line, and gives what was typed; at the end of the input it raises `EOFError`.
    """

    def judge(comparisons: Sequence[Comparison]) -> Verdicts:
        orders = [_order(comparison, seed) for comparison in comparisons]
        keys = [
            key_of(prompt=comparison.text, responses=order)
            for comparison, order in zip(comparisons, orders, strict=True)
        ]
        scores = []
        with Answers(path) as kept:
            done = sum(kept.get(key) is not None for key in keys)
            if done:
                console.print(f"{path}: has {done:,} of {len(keys):,} comparisons already")
            for key, comparison, order in zip(keys, comparisons, orders, strict=True):
                if kept.get(key) is None:
                    done = sum(kept.get(key) is not None for key in keys)
                    _show(comparison.text, order, f"{done + 1:,} of {len(keys):,}")
                    answer = _asked(ask)
                    if answer == _STOP:
                        raise KeyboardInterrupt(
                            f"stopped: {len(keys) - done:,} of {len(keys):,} comparisons remain, "
                            f"so there is no rate yet. The others are kept in {path}; the same "
                            "command goes on."
                        )
                    kept.keep(key, {"answer": answer})
                found = kept.get(key)
                assert found is not None
                score = _SCORES[found["answer"]]
                scores.append(score if order[0] == comparison.a else 1 - score)
        return Verdicts(np.array(scores))

    return judge


def _order(comparison: Comparison, seed: int) -> tuple[str, str]:
    """The two responses as they are shown, which does not hang on which of them is A's."""
    one, other = sorted((comparison.a, comparison.b))
    drawn = key_of(prompt=comparison.text, responses=(one, other), seed=seed)
    return (one, other) if int(drawn, 16) % 2 else (other, one)


def _show(prompt: str, order: tuple[str, str], place: str) -> None:
    texts = {f"Prompt {place}": prompt, "Response 1": order[0], "Response 2": order[1]}
    for title, text in texts.items():
        console.rule(title, align="left")
        console.print(text if text.strip() else "(empty)")
    console.rule()


def _asked(ask: Callable[[str], str]) -> str:
    """One of the answers, or that no more will come."""
    while True:
        try:
            answer = ask(_QUESTION).strip().lower()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return _STOP
        if answer in (*_SCORES, _STOP):
            return answer
