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

    An example is several pieces: its prompt, then its responses. Piece i is
    `tokens[piece_offsets[i] : piece_offsets[i + 1]]`, and the pieces of example j are those from
    `example_offsets[j]` to `example_offsets[j + 1] - 1`.

    Attributes:
      tokens: the ids of all pieces end to end.
      context: which tokens of responses are seen but not scored, such as what a user says
        between two turns; False for the tokens of prompts. None if it would be False for all.
      piece_offsets: where each piece starts in `tokens`; then where the last piece ends.
      example_offsets: the number of each example's first piece; then the number of pieces.
      true_rewards: the rewards that the labels of pairs were drawn from; None if not known.
      counts: what truncation did, and how many names of special tokens stood in the texts.
      extras: further values `[examples, ...]`, for `PackedBatch.extras`. If all examples have
        them: `labels` (1 or 0), and `scores` of each response, 0 where a response is absent.
        If any source has them: `margins`, 0 in sources without margins.
      sources: the examples of each source by name, where several are mixed.
      uncut: how many tokens each piece had before it was cut.
      prompts: a digest of each prompt before it was cut.
      examples: what was tokenised, where responses are yet to be sampled; else empty.
    """

    tokens: Int[np.ndarray, " tokens"]
    piece_offsets: Int[np.ndarray, " pieces"]
    example_offsets: Int[np.ndarray, " examples"]
    true_rewards: Float[np.ndarray, "_ responses"] | None
    counts: Counter[str]
    uncut: Int[np.ndarray, " _"]
    prompts: Int[np.ndarray, " _"]
    context: Bool[np.ndarray, " tokens"] | None = None
    extras: Mapping[str, Float[np.ndarray, "_ ..."]] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Int[np.ndarray, " _"]] = dataclasses.field(default_factory=dict)
    examples: Sequence[Example] = ()

    def __len__(self) -> int:
        return len(self.example_offsets) - 1

    def take(self, chosen: Int[np.ndarray, " _"]) -> "TokenizedDataset":
        """The data set of the chosen examples, in the order in which their indices are given."""
        first, pieces = self.example_offsets[chosen], np.diff(self.example_offsets)[chosen]
        kept = _ranges(first, pieces)
        starts, lengths = self.piece_offsets[kept], np.diff(self.piece_offsets)[kept]
        tokens = _ranges(starts, lengths)
        # The new index of each old example, or -1.
        moved = np.full(len(self), -1)
        moved[chosen] = np.arange(len(chosen))
        sources = {name: np.sort(moved[members]) for name, members in self.sources.items()}
        extras = {name: values[chosen] for name, values in self.extras.items()}
        if "scores" in extras:
            # The table has as many columns as any chosen example has responses.
            extras["scores"] = extras["scores"][:, : max(int(pieces.max(initial=2)) - 1, 1)]
        return dataclasses.replace(
            self,
            tokens=self.tokens[tokens],
            context=None if self.context is None else self.context[tokens],
            piece_offsets=_offsets(lengths),
            example_offsets=_offsets(pieces),
            true_rewards=None if self.true_rewards is None else self.true_rewards[chosen],
            uncut=self.uncut[kept],
            prompts=self.prompts[chosen],
            examples=[self.examples[i] for i in chosen] if self.examples else (),
            extras=extras,
            sources={name: new[new >= 0] for name, new in sources.items() if new.max() >= 0},
        )

    def whole(self, index: int, responses: int | None = None) -> bytes:
        """All that the model sees of one example, as bytes to compare with other examples'.

        Args:
          index: of the example.
          responses: how many responses count, the first ones; None for all.
        """
        first, last = self.example_offsets[index], self.example_offsets[index + 1]
        last = last if responses is None else first + 1 + responses
        offsets = self.piece_offsets[first : last + 1]
        label = self.extras["labels"][index].tobytes() if "labels" in self.extras else b""
        span = slice(offsets[0], offsets[-1])
        context = b"" if self.context is None else self.context[span].tobytes()
        return b"".join((self.tokens[span].tobytes(), np.diff(offsets).tobytes(), label, context))

    def group(self, index: int) -> Group:
        """The prompt and responses of one example."""
        first, last = self.example_offsets[index], self.example_offsets[index + 1]
        offsets = self.piece_offsets[first : last + 1]
        prompt, *responses = [slice(start, end) for start, end in pairwise(offsets)]
        return Group(
            self.tokens[prompt],
            [self.tokens[span] for span in responses],
            None if self.context is None else [self.context[span] for span in responses],
        )

    def uncut_lengths(self, index: int) -> list[int]:
        """Tokens of the prompt and of each response of one example before they were cut."""
        return self.uncut[self.example_offsets[index] : self.example_offsets[index + 1]].tolist()

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each prompt."""
        first = self.example_offsets[:-1]
        return self.piece_offsets[first + 1] - self.piece_offsets[first]

    @property
    def response_lengths(self) -> Int[np.ndarray, "examples responses"]:
        """Tokens of each response of each example; 0 where a response is absent."""
        return self.of_responses(np.diff(self.piece_offsets))

    @property
    def scored_lengths(self) -> Int[np.ndarray, "examples responses"]:
        """Scored tokens of each response of each example; 0 where a response is absent."""
        if self.context is None:
            return self.response_lengths
        seen = np.concatenate([[0], np.cumsum(self.context)])[self.piece_offsets]
        return self.of_responses(np.diff(self.piece_offsets) - np.diff(seen))

    def of_responses(self, values: Int[np.ndarray, " _"]) -> Int[np.ndarray, "examples responses"]:
        """From one value per piece to a table of the responses' values; 0 where one is absent."""
        is_response = np.arange(self.responses) < np.diff(self.example_offsets)[:, None] - 1
        is_prompt = np.zeros(len(self.piece_offsets) - 1, bool)
        is_prompt[self.example_offsets[:-1]] = True
        table = np.zeros(is_response.shape, values.dtype)
        table[is_response] = values[~is_prompt]
        return table

    @property
    def responses(self) -> int:
        """K, the largest number of responses of an example."""
        return int(np.diff(self.example_offsets).max(initial=2)) - 1

    def fingerprint(self) -> str:
        """A digest of every token id, their division into examples and sources, and all values."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.piece_offsets, self.example_offsets, self.true_rewards):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        if self.context is not None:
            digest.update(np.packbits(self.context).tobytes())
        for named in (self.extras, self.sources):
            for name, array in sorted(named.items()):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def deduplicate(dataset: TokenizedDataset) -> TokenizedDataset:
    """Keeps the first of all examples that are the same to the model.

    The others are counted as `dropped/duplicate`.
    """
    first: dict[bytes, int] = {}
    for index in range(len(dataset)):
        first.setdefault(dataset.whole(index), index)
    counts = Counter({**dataset.counts, "dropped/duplicate": len(dataset) - len(first)})
    kept = np.asarray(list(first.values()), np.int64)
    return dataclasses.replace(dataset.take(kept), counts=counts)


def mismatch(dataset: TokenizedDataset, max_length: int) -> TokenizedDataset:
    """Gives each single response a second one, that of an example with another prompt.

    KTO estimates a KL divergence from such pairs (arXiv 2402.01306, section 4.1). Nearly every
    response is borrowed once. A borrowed response is cut to the room that the prompt leaves, so
    the example's own response stays whole.

    Args:
      dataset: examples with one response each.
      max_length: tokens of prompt plus response.

    Raises:
      UserError: all examples have the same prompt.
    """
    if len(np.unique(dataset.prompts)) < 2:
        raise UserError(
            f"all {len(dataset)} examples that are trained on, or all that are held out, have the "
            "same prompt; the algorithm needs responses to other prompts too, for its KL estimate. "
            "Hold out more with data.eval_fraction or data.eval_path, or none with "
            "data.eval_fraction=0."
        )
    partner = _partners(dataset.prompts)
    own = (dataset.piece_offsets[:-1], np.diff(dataset.piece_offsets), dataset.uncut)
    starts, lengths, uncut = (
        np.column_stack([pieces.reshape(-1, 2), pieces[1::2][partner]]) for pieces in own
    )
    lengths[:, 2] = np.minimum(lengths[:, 2], max_length - lengths[:, 0])
    tokens = _ranges(starts.ravel(), lengths.ravel())
    return dataclasses.replace(
        dataset,
        tokens=dataset.tokens[tokens],
        context=None if dataset.context is None else dataset.context[tokens],
        piece_offsets=_offsets(lengths.ravel()),
        example_offsets=3 * np.arange(len(dataset) + 1),
        uncut=uncut.ravel(),
        true_rewards=None,
        extras={name: values for name, values in dataset.extras.items() if name != "scores"},
    )


def _partners(prompts: Int[np.ndarray, " examples"]) -> Int[np.ndarray, " examples"]:
    """For each example another one with another prompt, half the data away if possible."""
    count = len(prompts)
    # All examples are shifted by the same distance, so that the borrowed responses have the same
    # mix of labels as the data.
    partner = (np.arange(count) + count // 2) % count
    # Where the partner has the same prompt, the first one after it with another prompt takes its
    # place. The search may go around the end, so the places are written down twice.
    changes = np.flatnonzero(prompts != np.roll(prompts, -1)) + 1
    following = np.concatenate([changes, changes + count])
    following = following[np.searchsorted(following, partner, side="right")] % count
    return np.where(prompts[partner] == prompts, following, partner)


def _offsets(lengths: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """Where each of several parts starts if they are laid end to end; then where they end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: Int[np.ndarray, " _"], lengths: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """The indices in several spans, one span after the other."""
    offsets = _offsets(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def digest(ids: Sequence[int]) -> int:
    """A number that differs, in all likelihood, between any two lists of token ids."""
    code = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8)
    return int.from_bytes(code.digest(), "little", signed=True)


def true_rewards(examples: Sequence[Example]) -> Float[np.ndarray, "examples responses"] | None:
    """The true rewards of pairs, if all examples are pairs that have them."""
    known = (e.true_rewards is not None and len(e.true_rewards) == 2 for e in examples)
    if not examples or not all(known):
        return None
    return np.asarray([example.true_rewards for example in examples], np.float32)


def extras_of(examples: Sequence[Example]) -> dict[str, Float[np.ndarray, "examples ..."]]:
    """The `extras` of a `TokenizedDataset` of these examples.

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
        # A source without margins asks for none: its examples have a margin of 0.
        extras["margins"] = np.asarray([example.margin or 0 for example in examples], np.float32)
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
