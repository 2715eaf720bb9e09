"""Examples to token ids: apart at the prompt/response boundary, truncated by a stated policy."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxpref.data.chat import Chat, ChatEncoder, read_template, special_names
from jaxpref.data.examples import Example
from jaxpref.errors import UserError
from jaxpref.packing import Group

_TEXTS_AT_A_TIME = 1024


@dataclasses.dataclass(frozen=True)
class TokenizedDataset:
    """Token ids of many examples in one flat array.

    Attributes:
      tokens: all pieces end to end: each example's prompt, then its responses.
      pieces: where each piece starts, and the end.
      examples: the first piece of each example, and the end.
      scores: true rewards `[examples, responses]`, or None.
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


def load_tokenizer(name: str, chat_template: str = "") -> Any:
    """A `transformers` tokenizer.

    Args:
      name: "bytes" for ByT5's, which needs no files; a directory; or a hub name.
      chat_template: see `read_template`; empty for the tokenizer's own.

    Raises:
      UserError: it cannot be loaded, or has no EOS token.
    """
    tokenizer = _load_tokenizer(name)
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def _load_tokenizer(name: str) -> Any:
    # Only tokenizers are used of transformers, which would else say that it misses torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    if name == "bytes":
        return transformers.ByT5Tokenizer()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # The hub's client raises many kinds, none of them ours.
        where = "in that directory" if Path(name).is_dir() else "of that name on the hub"
        raise UserError(
            f"tokenizer.name is {name!r}, and no tokenizer {where} could be loaded: {error}\n"
            "Without a network, give a local directory, or 'bytes', which needs no files."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no EOS token, which every response ends in.")
    return tokenizer


def begins_with_bos(tokenizer: Any, policy: str) -> int | None:
    """The id that prompts begin with, or None.

    Args:
      tokenizer: a `transformers` tokenizer.
      policy: "auto" (where the tokenizer itself puts BOS before a text), "always" or "never".

    Raises:
      UserError: "always", and the tokenizer has no BOS.
    """
    if policy == "never":
        return None
    bos = tokenizer.bos_token_id
    if policy == "always" and bos is None:
        raise UserError("tokenizer.bos is 'always', but the tokenizer has no BOS token.")
    return bos if policy == "always" or tokenizer("a").input_ids[:1] == [bos] else None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and the special tokens at the ends.

    Attributes:
      max_length: of prompt plus response.
      max_prompt_length: of a prompt that has to be cut, BOS included.
      eos: ends every response.
      bos: begins every prompt, if not None.
      may_cut_prompts: whether a prompt that has to be cut is cut or refused.
    """

    max_length: int
    max_prompt_length: int
    eos: int
    bos: int | None = None
    may_cut_prompts: bool = True


def encode(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    limits: Limits,
    counts: Counter[str],
    where: str = "",
    *,
    turns_end: bool = False,
) -> list[Sequence[int]]:
    """Adds special tokens and truncates.

    BOS and EOS are added once: not where the ids already have them. If the prompt with
    its longest response exceeds `max_length`, the prompt keeps its last
    `max_prompt_length` tokens (BOS counts and stays); a response that is still too long
    keeps its start and so loses EOS, which keeps the model from learning to stop there.

    Args:
      prompt: ids without special tokens.
      responses: ids without special tokens.
      limits: the lengths and special tokens.
      counts: receives how many prompts and responses were cut.
      where: place of the example, for messages.
      turns_end: the responses have their end-of-turn token and need no EOS.

    Returns:
      The prompt, then the responses; none is empty.

    Raises:
      UserError: the prompt is empty and there is no BOS, or it may not be cut.
    """
    bos = [] if limits.bos is None or list(prompt[:1]) == [limits.bos] else [limits.bos]
    prompt = [*bos, *prompt]
    if not prompt:
        raise UserError(
            f"{where}: the prompt is empty, and the tokenizer has no BOS to predict the first "
            "token of the response from. Put something before the response."
        )
    if not turns_end:
        responses = [
            response if response and response[-1] == limits.eos else [*response, limits.eos]
            for response in responses
        ]
    # A response that is still to be sampled may take all the room that it is given.
    longest = max(map(len, responses), default=limits.max_length)
    if len(prompt) + longest > limits.max_length and len(prompt) > limits.max_prompt_length:
        if not limits.may_cut_prompts:
            raise UserError(
                f"{where}: the prompt has {len(prompt)} tokens and with its longest response "
                f"{len(prompt) + longest}, over data.max_length ({limits.max_length}). Raise it, "
                f"or keep the last {limits.max_prompt_length} tokens of such prompts with "
                "--config.data.on_long_prompt=truncate."
            )
        counts["prompts_cut"] += 1
        has_bos = limits.bos is not None
        kept = prompt[len(prompt) - limits.max_prompt_length + has_bos :]
        prompt = [*prompt[:has_bos], *kept]
    room = limits.max_length - len(prompt)
    counts["responses_cut"] += sum(len(response) > room for response in responses)
    return [prompt, *(response[:room] for response in responses)]


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    limits: Limits,
    *,
    parse_special_tokens: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> TokenizedDataset:
    """Tokenises examples: texts apart at the boundary, conversations through the chat template.

    Args:
      examples: at least one response each.
      tokenizer: a `transformers` tokenizer.
      limits: lengths and special tokens.
      parse_special_tokens: read the names of special tokens inside the texts as such.
      progress: called with the number of examples done so far.

    Raises:
      UserError: see `encode` and `ChatEncoder.encode`.
    """
    counts: Counter[str] = Counter(prompts_cut=0, responses_cut=0, special_tokens_in_text=0)
    pieces: list[np.ndarray] = []
    piece_counts = [0]
    chats = ChatEncoder(tokenizer, eos=limits.eos, parse_special_tokens=parse_special_tokens)
    names = special_names(tokenizer)
    for chunk in _chunks(examples):
        texts = [
            text
            for example in chunk
            if isinstance(example.prompt, str)
            for text in (example.prompt, *example.responses)
        ]
        counts["special_tokens_in_text"] += sum(len(names.findall(text)) for text in texts)
        # An empty list of texts is not a batch to every tokenizer.
        ids = iter(
            tokenizer(
                texts, add_special_tokens=False, split_special_tokens=not parse_special_tokens
            ).input_ids
            if texts
            else ()
        )
        for example in chunk:
            if isinstance(example.prompt, Chat):
                turns_end = True
                prompt, responses = chats.encode(example.prompt, example.responses, example.where)
            else:
                turns_end = False
                prompt, *responses = (next(ids) for _ in range(1 + len(example.responses)))
            encoded = encode(prompt, responses, limits, counts, example.where, turns_end=turns_end)
            pieces += [np.asarray(piece, np.int32) for piece in encoded]
            piece_counts.append(len(pieces))
        progress(len(piece_counts) - 1)
    counts["special_tokens_in_text"] += chats.special_names
    return TokenizedDataset(
        tokens=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        pieces=np.cumsum([0, *map(len, pieces)]),
        examples=np.asarray(piece_counts),
        scores=_true_scores(examples),
        counts=counts,
        extras=_extras(examples),
        sources=_sources(examples),
    )


def _true_scores(examples: Sequence[Example]) -> np.ndarray | None:
    if not examples or not all(e.scores is not None and e.scores_are_true for e in examples):
        return None
    return np.asarray([example.scores for example in examples], np.float32)


def _extras(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    extras: dict[str, np.ndarray] = {}
    if not examples:
        return extras
    if all(example.label is not None for example in examples):
        extras["labels"] = np.asarray([example.label for example in examples], np.float32)
    without = next((example for example in examples if example.margin is None), None)
    if without is None:
        extras["margins"] = np.asarray([example.margin for example in examples], np.float32)
    elif any(example.margin is not None for example in examples):
        raise UserError(
            f"{without.where}: has no margin, but other examples do; give every example of the "
            "data one, or none."
        )
    scores = [example.scores for example in examples]
    if None not in scores:
        table = np.zeros((len(examples), max(len(e.responses) for e in examples)), np.float32)
        for row, values in zip(table, scores, strict=True):
            row[: len(values or ())] = values
        extras["scores"] = table
    return extras


def _sources(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    names = np.asarray([example.source for example in examples])
    sources = {str(name): np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}
    return sources if len(sources) > 1 else {}


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), _TEXTS_AT_A_TIME):
        yield examples[start : start + _TEXTS_AT_A_TIME]
