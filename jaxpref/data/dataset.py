"""Many examples as arrays."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.data.examples import Example
from jaxpref.errors import UserError
from jaxpref.packing import Group


@dataclasses.dataclass(frozen=True)
class TokenizedDataset:
    """Token ids of many examples in one flat array.

    Attributes:
      tokens: all pieces end to end: each example's prompt, then its responses.
      context: which tokens of responses are seen but not scored, as what a user says between
        two turns; False for those of prompts. None where no token is.
      pieces: where each piece starts, and the end.
      examples: the first piece of each example, and the end.
      scores: true rewards of pairs, or None.
      counts: what truncation did, and names of special tokens that stood in the texts.
      extras: further values `[examples, ...]`, for `PackedBatch.extras`: where all examples
        have them, `labels` (1 or 0) and `scores` of each response, 0 where there is none; and
        `margins`, 0 in sources without any.
      sources: the examples of each source by name, where several are mixed.
      uncut: tokens of each piece before any was cut.
      prompts: a digest of each prompt before any was cut.
    """

    tokens: Int[np.ndarray, " tokens"]
    pieces: Int[np.ndarray, " pieces"]
    examples: Int[np.ndarray, " examples"]
    scores: Float[np.ndarray, "_ responses"] | None
    counts: Counter[str]
    uncut: Int[np.ndarray, " _"]
    prompts: Int[np.ndarray, " _"]
    context: Bool[np.ndarray, " tokens"] | None = None
    extras: Mapping[str, Float[np.ndarray, "_ ..."]] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Int[np.ndarray, " _"]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples) - 1

    def take(self, chosen: Int[np.ndarray, " _"]) -> "TokenizedDataset":
        """The data set of some examples, by index and in that order."""
        first, pieces = self.examples[chosen], np.diff(self.examples)[chosen]
        kept = _ranges(first, pieces)
        starts, lengths = self.pieces[kept], np.diff(self.pieces)[kept]
        tokens = _ranges(starts, lengths)
        places = np.full(len(self), -1)
        places[chosen] = np.arange(len(chosen))
        moved = {name: np.sort(places[there]) for name, there in self.sources.items()}
        extras = {name: values[chosen] for name, values in self.extras.items()}
        if "scores" in extras:
            # As wide as the responses that are left.
            extras["scores"] = extras["scores"][:, : max(int(pieces.max(initial=2)) - 1, 1)]
        return dataclasses.replace(
            self,
            tokens=self.tokens[tokens],
            context=None if self.context is None else self.context[tokens],
            pieces=_ends(lengths),
            examples=_ends(pieces),
            scores=None if self.scores is None else self.scores[chosen],
            uncut=self.uncut[kept],
            prompts=self.prompts[chosen],
            extras=extras,
            sources={name: there[there >= 0] for name, there in moved.items() if there.max() >= 0},
        )

    def whole(self, index: int, responses: int | None = None) -> bytes:
        """What tells one example, its label and its first `responses` (None: all), from others."""
        first, last = self.examples[index], self.examples[index + 1]
        bounds = self.pieces[first : last + 1 if responses is None else first + 2 + responses]
        label = self.extras["labels"][index].tobytes() if "labels" in self.extras else b""
        there = slice(bounds[0], bounds[-1])
        context = b"" if self.context is None else self.context[there].tobytes()
        return b"".join((self.tokens[there].tobytes(), np.diff(bounds).tobytes(), label, context))

    def group(self, index: int) -> Group:
        """The prompt and responses of one example."""
        bounds = self.pieces[self.examples[index] : self.examples[index + 1] + 1]
        prompt, *responses = [slice(start, end) for start, end in pairwise(bounds)]
        return Group(
            self.tokens[prompt],
            [self.tokens[there] for there in responses],
            None if self.context is None else [self.context[there] for there in responses],
        )

    def uncut_lengths(self, index: int) -> list[int]:
        """Tokens of the prompt and of each response of one example before any was cut."""
        return self.uncut[self.examples[index] : self.examples[index + 1]].tolist()

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each prompt."""
        first = self.examples[:-1]
        return self.pieces[first + 1] - self.pieces[first]

    @property
    def response_lengths(self) -> Int[np.ndarray, "examples responses"]:
        """Tokens of each response of each example; 0 where there is none."""
        return self.of_responses(np.diff(self.pieces))

    @property
    def scored_lengths(self) -> Int[np.ndarray, "examples responses"]:
        """Scored tokens of each response of each example; 0 where there is none."""
        if self.context is None:
            return self.response_lengths
        seen = np.concatenate([[0], np.cumsum(self.context)])[self.pieces]
        return self.of_responses(np.diff(self.pieces) - np.diff(seen))

    def of_responses(self, values: Int[np.ndarray, " _"]) -> Int[np.ndarray, "examples responses"]:
        """A value of each piece, for each response of each example; 0 where there is none."""
        is_response = np.arange(self.responses) < np.diff(self.examples)[:, None] - 1
        is_prompt = np.zeros(len(self.pieces) - 1, bool)
        is_prompt[self.examples[:-1]] = True
        table = np.zeros(is_response.shape, values.dtype)
        table[is_response] = values[~is_prompt]
        return table

    @property
    def responses(self) -> int:
        """K, the largest number of responses of an example."""
        return int(np.diff(self.examples).max(initial=2)) - 1

    def fingerprint(self) -> str:
        """A digest of every token id, their division into examples and sources, and all values."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.pieces, self.examples, self.scores):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        if self.context is not None:
            digest.update(np.packbits(self.context).tobytes())
        for named in (self.extras, self.sources):
            for name, array in sorted(named.items()):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def deduplicate(dataset: TokenizedDataset) -> TokenizedDataset:
    """The first of all examples that are the same to the model; counts `dropped/duplicate`."""
    first: dict[bytes, int] = {}
    for index in range(len(dataset)):
        first.setdefault(dataset.whole(index), index)
    counts = Counter({**dataset.counts, "dropped/duplicate": len(dataset) - len(first)})
    kept = np.asarray(list(first.values()), np.int64)
    return dataclasses.replace(dataset.take(kept), counts=counts)


def mismatch(dataset: TokenizedDataset, max_length: int) -> TokenizedDataset:
    """Gives each single response a second one, that of an example with another prompt.

    KTO estimates a KL divergence from such pairs (arXiv 2402.01306, section 4.1). Nearly every
    response is borrowed once. It is cut to the room that the prompt leaves; it takes nothing from
    its new example.

    Args:
      dataset: examples with one response each.
      max_length: tokens of prompt plus response.

    Raises:
      UserError: there is no other prompt.
    """
    if len(np.unique(dataset.prompts)) < 2:
        raise UserError(
            f"all {len(dataset)} examples that are trained on, or all that are held out, have the "
            "same prompt; the algorithm needs responses to other prompts too, for its KL estimate. "
            "Hold out more with data.eval_fraction or data.eval_path, or none with "
            "data.eval_fraction=0."
        )
    partner = _partners(dataset.prompts)
    own = (dataset.pieces[:-1], np.diff(dataset.pieces), dataset.uncut)
    starts, lengths, uncut = (
        np.column_stack([pieces.reshape(-1, 2), pieces[1::2][partner]]) for pieces in own
    )
    lengths[:, 2] = np.minimum(lengths[:, 2], max_length - lengths[:, 0])
    tokens = _ranges(starts.ravel(), lengths.ravel())
    return dataclasses.replace(
        dataset,
        tokens=dataset.tokens[tokens],
        context=None if dataset.context is None else dataset.context[tokens],
        pieces=_ends(lengths.ravel()),
        examples=3 * np.arange(len(dataset) + 1),
        uncut=uncut.ravel(),
        scores=None,
        extras={name: values for name, values in dataset.extras.items() if name != "scores"},
    )


def _partners(prompts: Int[np.ndarray, " examples"]) -> Int[np.ndarray, " examples"]:
    """For each example one with another prompt, half the data away where that is one."""
    count = len(prompts)
    # All examples shifted alike: what is borrowed has the same mix of labels as the data.
    partner = (np.arange(count) + count // 2) % count
    # Else the first one after it with another prompt, twice around at most.
    changes = np.flatnonzero(prompts != np.roll(prompts, -1)) + 1
    following = np.concatenate([changes, changes + count])
    following = following[np.searchsorted(following, partner, side="right")] % count
    return np.where(prompts[partner] == prompts, following, partner)


def _ends(lengths: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: Int[np.ndarray, " _"], lengths: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """`starts[0]`, `starts[0] + 1`, ... `lengths[0]` of them, then those of the next."""
    ends = _ends(lengths)
    return np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])


def digest(ids: Sequence[int]) -> int:
    """What tells some token ids from others."""
    code = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8)
    return int.from_bytes(code.digest(), "little", signed=True)


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
    having = {example.source for example in examples if example.margin is not None}
    if having:
        for example in examples:
            if example.margin is None and example.source in having:
                raise UserError(
                    f"{example.where}: has no margin, but other examples do; give every example "
                    "of a source one, or none."
                )
        # A source may have none at all, and then asks for none.
        extras["margins"] = np.asarray([example.margin or 0 for example in examples], np.float32)
    # A true reward is to evaluate with; the labels are what was observed.
    scores = [None if example.scores_are_true else example.scores for example in examples]
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
