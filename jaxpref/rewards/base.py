"""What a reward looks at, what it gives, and what it may not give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.data.chat import Message
from jaxpref.errors import UserError

_SHOWN = 80


class Sampled(NamedTuple):
    """Responses that were sampled, one entry each; those to one prompt follow each other.

    Attributes:
      prompts: texts, or lists of messages.
      responses: texts, without the token that ended them.
      prompt_ids: token ids of the prompts, as the policy has seen them.
      response_ids: token ids of the responses, with the token that ended them.
      finished: whether each response came to its end; False where it was cut by length.
      records: all columns of each prompt's record; empty where there are none.
    """

    prompts: Sequence[str | Sequence[Message]]
    responses: Sequence[str]
    prompt_ids: Sequence[Int[np.ndarray, " _"]]
    response_ids: Sequence[Int[np.ndarray, " _"]]
    finished: Bool[np.ndarray, " responses"]
    records: Sequence[Mapping[str, Any]] = ()

    @property
    def lengths(self) -> Int[np.ndarray, " responses"]:
        """Tokens of each response, with the one that ended it."""
        return np.asarray([len(ids) for ids in self.response_ids])

    def take(self, places: Sequence[int]) -> "Sampled":
        """Some of the responses, in this order."""

        def taken(entries: Sequence[Any]) -> list[Any]:
            return [entries[place] for place in places]

        return Sampled(
            taken(self.prompts),
            taken(self.responses),
            taken(self.prompt_ids),
            taken(self.response_ids),
            self.finished[np.asarray(places, int)],
            taken(self.records) if self.records else (),
        )

    @property
    def conversations(self) -> bool:
        """Whether any prompt is a list of messages."""
        return any(not isinstance(prompt, str) for prompt in self.prompts)


Reward = Callable[[Sampled], Float[np.ndarray, " responses"]]


def shown(prompt: str | Sequence[Message]) -> str:
    """The beginning of a prompt, for messages."""
    return repr(prompt if isinstance(prompt, str) else list(prompt))[:_SHOWN]


def checked(name: str, values: Any, sampled: Sampled) -> Float[np.ndarray, " responses"]:
    """The values in float32, if there is one finite number for each response.

    Args:
      name: of the reward that gave them, for messages.
      values: what it gave.
      sampled: what it was given.

    Raises:
      UserError: there are more or fewer, or one of them is no finite number.
    """
    count = len(sampled.responses)
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        numbers = np.full(np.shape(np.asarray(values, object)), np.nan)
    if numbers.shape != (count,):
        raise UserError(
            f"{name} should give one number for each of {count} responses; it gave an array of "
            f"shape {numbers.shape} (the first prompt: {shown(sampled.prompts[0])})."
        )
    bad = np.flatnonzero(~(np.abs(numbers) <= np.finfo(np.float32).max))
    if len(bad):
        first = int(bad[0])
        raise UserError(
            f"{name} should give finite numbers; it gave {list(values)[first]!r} for a response to "
            f"the prompt {shown(sampled.prompts[first])} ({len(bad)} of {count} are not finite)."
        )
    return numbers.astype(np.float32)
