"""Many examples as arrays."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxpref.data.examples import Example
from jaxpref.errors import UserError
from jaxpref.packing import Group


@dataclasses.dataclass(frozen=True)
class TokenizedDataset:
    """Token ids of many examples in one flat array.

    Attributes:
      tokens: all pieces end to end: each example's prompt, then its responses.
      pieces: where each piece starts, and the end.
      examples: the first piece of each example, and the end.
      scores: true rewards of pairs, or None.
      counts: what truncation did, and names of special tokens that stood in the texts.
      extras: further values `[examples, ...]`, for `PackedBatch.extras`: where all examples
        have them, `labels` (1 or 0), `margins`, and `scores` of each response, 0 where there
        is none.
      sources: the examples of each source by name, where several are mixed.
    """

    tokens: Int[np.ndarray, " tokens"]
    pieces: Int[np.ndarray, " pieces"]
    examples: Int[np.ndarray, " examples"]
    scores: Float[np.ndarray, "_ responses"] | None
    counts: Counter[str]
    extras: Mapping[str, Float[np.ndarray, "_ ..."]] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Int[np.ndarray, " _"]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples) - 1

    def group(self, index: int) -> Group:
        """The prompt and responses of one example."""
        bounds = self.pieces[self.examples[index] : self.examples[index + 1] + 1]
        prompt, *responses = (
            self.tokens[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)
        )
        return Group(prompt, responses)

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each prompt."""
        first = self.examples[:-1]
        return self.pieces[first + 1] - self.pieces[first]

    @property
    def response_lengths(self) -> Int[np.ndarray, "examples responses"]:
        """Tokens of each response of each example; 0 where there is none."""
        is_response = np.arange(self.responses) < np.diff(self.examples)[:, None] - 1
        is_prompt = np.zeros(len(self.pieces) - 1, bool)
        is_prompt[self.examples[:-1]] = True
        lengths = np.zeros(is_response.shape, self.pieces.dtype)
        lengths[is_response] = np.diff(self.pieces)[~is_prompt]
        return lengths

    @property
    def responses(self) -> int:
        """K, the largest number of responses of an example."""
        return int(np.diff(self.examples).max(initial=2)) - 1

    def fingerprint(self) -> str:
        """A digest of every token id, their division into examples and sources, and all values."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.pieces, self.examples, self.scores):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        for named in (self.extras, self.sources):
            for name, array in sorted(named.items()):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def true_scores(examples: Sequence[Example]) -> Float[np.ndarray, "examples responses"] | None:
    """The true rewards of pairs, if all examples are pairs that have them."""
    known = (e.scores_are_true and e.scores is not None and len(e.scores) == 2 for e in examples)
    if not examples or not all(known):
        return None
    return np.asarray([example.scores for example in examples], np.float32)


def extras_of(examples: Sequence[Example]) -> dict[str, Float[np.ndarray, "examples ..."]]:
    """What `TokenizedDataset.extras` has of these examples.

    Raises:
      UserError: some examples of a source have a margin and others do not.
    """
    extras: dict[str, np.ndarray] = {}
    if not examples:
        return extras
    if all(example.label is not None for example in examples):
        extras["labels"] = np.asarray([example.label for example in examples], np.float32)
    margins = [example.margin for example in examples]
    if None not in margins:
        extras["margins"] = np.asarray(margins, np.float32)
    else:
        # A source may have none at all.
        having = {example.source for example in examples if example.margin is not None}
        for example in examples:
            if example.margin is None and example.source in having:
                raise UserError(
                    f"{example.where}: has no margin, but other examples do; give every example "
                    "of a source one, or none."
                )
    scores = [example.scores for example in examples]
    if None not in scores:
        table = np.zeros((len(examples), max(len(e.responses) for e in examples)), np.float32)
        for row, values in zip(table, scores, strict=True):
            row[: len(values or ())] = values
        extras["scores"] = table
    return extras


def sources_of(examples: Sequence[Example]) -> dict[str, Int[np.ndarray, " _"]]:
    """The examples of each named source."""
    names = np.asarray([example.source for example in examples])
    return {name: np.flatnonzero(names == name) for name in sorted(set(names.tolist())) if name}
