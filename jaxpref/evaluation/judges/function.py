"""A Python function as a judge, who is asked in both orders."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref.data.chat import Chat
from jaxpref.errors import UserError
from jaxpref.evaluation.judges.base import Comparison, Judge, Verdicts
from jaxpref.rewards import call, columns_of, shown

# What a function is given by these names is not a column of the records.
_OWN = ("prompts", "firsts", "seconds")


def from_function(name: str, function: Callable[..., Any]) -> Judge:
    """A judge who is a function of keyword arguments, which gives one score a pair of responses.

    It is called twice, with the responses in both orders, as `function(prompts=, firsts=,
    seconds=, **columns)`, all lists with one entry a pair:

    - `prompts`: texts, or lists of messages;
    - `firsts`, `seconds`: texts, the responses;
    - `columns`: every further column of the prompts' records, None where a record has none, or
      where the two files do not agree. One that does not read them takes `**columns`.

    A score is from 0 to 1: 1 where the first response is better, 0 where the second is.

    Args:
      name: for messages.
      function: may raise, or give what is no score: the error then says for which prompt.
    """

    def judge(comparisons: Sequence[Comparison]) -> Verdicts:
        prompts = [
            list(x.prompt.messages) if isinstance(x.prompt, Chat) else x.prompt for x in comparisons
        ]
        columns = columns_of([x.columns for x in comparisons], _OWN)
        a, b = [x.a for x in comparisons], [x.b for x in comparisons]

        def scores(firsts: list[str], seconds: list[str]) -> Float[np.ndarray, " comparisons"]:
            asked: dict[str, list] = {"prompts": prompts, "firsts": firsts, "seconds": seconds}
            return _checked(name, call(name, function, {**asked, **columns}), prompts)

        return Verdicts(scores(a, b), 1 - scores(b, a))

    return judge


def _checked(name: str, values: Any, prompts: Sequence[Any]) -> Float[np.ndarray, " comparisons"]:
    try:
        scores = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        scores = np.full(np.shape(np.asarray(values, object)), np.nan)
    if scores.shape != (len(prompts),):
        raise UserError(
            f"{name} should give one score for each of {len(prompts)} pairs of responses; it gave "
            f"an array of shape {scores.shape} (the first prompt: {shown(prompts[0])})."
        )
    wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{name} should give scores from 0 to 1; it gave {list(values)[first]!r} for responses "
            f"to the prompt {shown(prompts[first])} ({len(wrong)} of {len(prompts)} are wrong)."
        )
    return scores
