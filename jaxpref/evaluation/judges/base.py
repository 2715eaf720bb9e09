"""What a judge is: what it looks at, and what it says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpref.data.chat import Chat


class Comparison(NamedTuple):
    """Two responses to one prompt.

    Attributes:
      number: of the prompt; several comparisons may be of one prompt.
      where: the prompt's place in file A, for messages.
      prompt: a text, or a conversation.
      text: the prompt as a text to read, see `compare.prompt_text`.
      a: the response of file A.
      b: the response of file B.
      finished: whether each of the two came to its end; False where it was cut by length.
      columns: further columns of the prompt's records.
    """

    number: int
    where: str
    prompt: str | Chat
    text: str
    a: str
    b: str
    finished: tuple[bool, bool] = (True, True)
    columns: Mapping[str, Any] = {}


class Verdicts(NamedTuple):
    """What a judge says of comparisons: 1 where A's response is better, 0 where B's is.

    Attributes:
      first: A's scores when its response came first; NaN where the judge said nothing that can be
        read. Of a judge who was asked only once, or to whom the order is nothing, these are all.
      second: A's scores when its response came second; None where this was not asked.
      told: what else there is to say, for the summary: what was asked, cut, or spent.
    """

    first: Float[np.ndarray, " comparisons"]
    second: Float[np.ndarray, " comparisons"] | None = None
    told: Mapping[str, Any] = {}

    @property
    def scores(self) -> Float[np.ndarray, " comparisons"]:
        """A's scores; a judge who contradicts himself calls a tie.

        A verdict in one order alone would have the judge's bias for a place, so it is none.
        """
        return self.first if self.second is None else (self.first + self.second) / 2


# Given comparisons whose two responses differ. May raise a `UserError`, or a `KeyboardInterrupt`
# that says how to go on.
Judge = Callable[[Sequence[Comparison]], Verdicts]
