"""Examples to token ids: prompt and responses tokenised apart, and truncated by a stated policy."""

import dataclasses
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxpref.data.chat import Chat, ChatEncoder
from jaxpref.data.dataset import TokenizedDataset, digest, extras_of, sources_of, true_rewards
from jaxpref.data.examples import Example
from jaxpref.errors import UserError
from jaxpref.tokenizer import special_names

_TEXTS_AT_A_TIME = 1024


@dataclasses.dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and the special tokens at the ends.

    Attributes:
      max_length: the most tokens of a prompt plus a response.
      max_prompt_length: the tokens that a prompt is cut to if it has to be cut, BOS included.
      eos: the id that ends every response.
      bos: the id that begins every prompt that is a text; None for none.
      on_long_prompt: what becomes of an example whose prompt would have to be cut. "truncate"
        cuts the prompt, "error" refuses the data, "skip" drops the example and counts it.
    """

    max_length: int
    max_prompt_length: int
    eos: int
    bos: int | None = None
    on_long_prompt: str = "truncate"


class LongPromptError(UserError):
    """A prompt leaves too little room for its responses."""


def complete(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    limits: Limits,
    where: str = "",
    *,
    finished: Sequence[bool] | None = None,
) -> list[Sequence[int]]:
    """Adds BOS to a prompt and EOS to its responses, unless they have them already.

    Args:
      prompt: ids as the tokenizer gives them for the text alone.
      responses: the same of each response.
      limits: has the special tokens.
      where: place of the example, for messages.
      finished: which responses end; one that was cut by length gets no EOS. None: all end.

    Returns:
      The prompt, then the responses; none is empty.

    Raises:
      UserError: the prompt is empty and there is no BOS.
    """
    bos = [] if limits.bos is None or list(prompt[:1]) == [limits.bos] else [limits.bos]
    prompt = [*bos, *prompt]
    if not prompt:
        raise UserError(
            f"{where}: the prompt is empty, and the tokenizer has no BOS to predict the first "
            "token of the response from. Put something before the response."
        )
    ended = [
        # What is empty gets EOS in any case, since a response has a token to score.
        response
        if response and (response[-1] == limits.eos or not ends)
        else [*response, limits.eos]
        for response, ends in zip(responses, finished or [True] * len(responses), strict=True)
    ]
    return [prompt, *ended]


def truncate(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    limits: Limits,
    counts: Counter[str],
    where: str = "",
    *,
    bos: int | None = None,
) -> list[Sequence[int]]:
    """Cuts a prompt and its responses to the limits.

    If the prompt with its longest response exceeds `max_length`, the prompt keeps its last
    `max_prompt_length` tokens. A BOS at its beginning stays and counts as one of them. A response
    that is still too long keeps its start. It loses EOS, so that the model does not learn to
    stop there.

    Args:
      prompt: ids with special tokens.
      responses: ids with special tokens.
      limits: has the lengths.
      counts: receives how many prompts and responses were cut.
      where: place of the example, for messages.
      bos: another id, beside `limits.bos`, that counts as BOS at the beginning of a prompt.

    Returns:
      The prompt, then the responses; none is empty.

    Raises:
      LongPromptError: the prompt may not be cut.
    """
    # Where responses are still to be sampled, they may take all the room there is.
    longest = max(map(len, responses), default=limits.max_length)
    if len(prompt) + longest > limits.max_length and len(prompt) > limits.max_prompt_length:
        if limits.on_long_prompt != "truncate":
            over = (
                f" and with its longest response {len(prompt) + longest}, over data.max_length "
                f"({limits.max_length})"
                if responses
                else f", over data.max_prompt_length ({limits.max_prompt_length})"
            )
            raise LongPromptError(
                f"{where}: the prompt has {len(prompt)} tokens{over}. Raise it, or keep the last "
                f"{limits.max_prompt_length} tokens of such prompts with "
                "--config.data.on_long_prompt=truncate, or leave them out with =skip."
            )
        counts["prompts_cut"] += 1
        has_bos = prompt[0] in (limits.bos, bos)
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
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> TokenizedDataset:
    """Tokenises examples.

    The texts of a prompt and of its responses are tokenised apart; conversations go through the
    chat template. A plain text becomes as many examples as it needs to fit into `max_length`, and
    nothing of it is lost.

    Args:
      examples: in the order that the data set shall have.
      tokenizer: a `transformers` tokenizer.
      limits: lengths and special tokens.
      parse_special_tokens: whether the name of a special token inside a text becomes that
        token; else it stays text.
      processes: how many processes share the work; the result does not depend on it.
      progress: called with the number of examples done so far.

    Raises:
      UserError: see `complete`, `truncate` and `ChatEncoder.encode`; or some examples of a
        source have a margin and others do not.
    """
    counts: Counter[str] = Counter(prompts_cut=0, responses_cut=0, special_tokens_in_text=0)
    encoder = _Encoder(tokenizer, limits, parse_special_tokens)
    done, parts = 0, []
    chunks = list(_chunks(examples))
    with _mapper(encoder, min(processes, len(chunks))) as encoded:
        for chunk, part in zip(chunks, encoded(chunks), strict=True):
            parts.append(part)
            counts.update(part.counts)
            done += len(chunk)
            progress(done)
    times = chain.from_iterable(part.kept for part in parts)
    kept = [e for e, count in zip(examples, times, strict=True) for _ in range(count)]
    context = _joined([part.context for part in parts]).astype(bool, copy=False)
    return TokenizedDataset(
        tokens=_joined([part.tokens for part in parts]).astype(np.int32, copy=False),
        piece_offsets=np.cumsum(_joined([[0], *(part.lengths for part in parts)])),
        example_offsets=np.cumsum([0, *(1 + len(example.responses) for example in kept)]),
        context=context if context.any() else None,
        true_rewards=true_rewards(kept),
        counts=counts,
        extras=extras_of(kept),
        sources=sources_of(kept),
        uncut=_joined([part.uncut for part in parts]),
        prompts=_joined([part.prompts for part in parts]),
        examples=() if any(example.responses for example in kept) else kept,
    )


class _Encoded(NamedTuple):
    """A chunk of examples, tokenised.

    Attributes:
      tokens: see `TokenizedDataset`.
      context: which tokens are seen but not scored.
      lengths: tokens of each piece.
      uncut: see `TokenizedDataset`.
      prompts: see `TokenizedDataset`.
      kept: how many examples each of the given examples became: 0 if it was dropped, more than
        one for a plain text in parts.
      counts: see `TokenizedDataset`.
    """

    tokens: Int[np.ndarray, " tokens"]
    context: Bool[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " pieces"]
    uncut: Int[np.ndarray, " pieces"]
    prompts: Int[np.ndarray, " _"]
    kept: list[int]
    counts: Counter[str]


class _Part(NamedTuple):
    """An example, or a part of a plain text, before anything is cut.

    Attributes:
      pieces: the prompt, then the responses.
      context: which tokens of each response are seen but not scored.
      prompt: a digest of the prompt.
      bos: see `truncate`.
    """

    pieces: Sequence[Sequence[int]]
    context: Sequence[Bool[np.ndarray, " tokens"]]
    prompt: int
    bos: int | None = None


class _Encoder:
    """Encodes chunks of examples."""

    def __init__(self, tokenizer: Any, limits: Limits, parse_special_tokens: bool):
        self._tokenizer, self._limits, self._parse = tokenizer, limits, parse_special_tokens
        self._names = special_names(tokenizer)

    def __call__(self, chunk: Sequence[Example]) -> _Encoded:
        counts: Counter[str] = Counter()
        chats = ChatEncoder(self._tokenizer, eos=self._limits.eos, parse_special_tokens=self._parse)
        texts = [
            text
            for example in chunk
            if not isinstance(example.prompt, Chat)
            for text in (example.prompt or "", *example.responses)
        ]
        counts["special_tokens_in_text"] += sum(len(self._names.findall(text)) for text in texts)
        # Not every tokenizer takes an empty list of texts.
        ids = iter(
            self._tokenizer(
                texts, add_special_tokens=False, split_special_tokens=not self._parse
            ).input_ids
            if texts
            else ()
        )
        pieces: list[np.ndarray] = []
        context: list[np.ndarray] = []
        uncut: list[int] = []
        prompts: list[int] = []
        kept: list[int] = []
        for example in chunk:
            parts = self._read(example, ids, chats)
            kept.append(0)
            for part in parts:
                try:
                    encoded = truncate(
                        part.pieces[0],
                        part.pieces[1:],
                        self._limits,
                        counts,
                        example.where,
                        bos=part.bos,
                    )
                except LongPromptError:
                    if self._limits.on_long_prompt != "skip":
                        raise
                    counts["dropped/long_prompt"] += 1
                    continue
                pieces.append(np.asarray(encoded[0], np.int32))
                context.append(np.zeros(len(encoded[0]), bool))
                for response, unscored in zip(encoded[1:], part.context, strict=True):
                    # A cut may leave tokens at the end that are not scored. They are taken away
                    # too, because no scored token comes after them to see them.
                    end = int(np.flatnonzero(~unscored[: len(response)])[-1]) + 1
                    pieces.append(np.asarray(response[:end], np.int32))
                    context.append(unscored[:end])
                uncut += map(len, part.pieces)
                prompts.append(part.prompt)
                kept[-1] += 1
            if len(parts) > 1:
                counts["further_parts_of_texts"] += len(parts) - 1
        counts["special_tokens_in_text"] += chats.special_names
        return _Encoded(
            _joined(pieces).astype(np.int32, copy=False),
            _joined(context).astype(bool, copy=False),
            np.asarray([len(piece) for piece in pieces], np.int64),
            np.asarray(uncut, np.int64),
            np.asarray(prompts, np.int64),
            kept,
            counts,
        )

    def _read(self, example: Example, ids: Iterator[list[int]], chats: ChatEncoder) -> list[_Part]:
        """An example with its special tokens.

        Args:
          example: the example.
          ids: those of the coming texts of the chunk, from which an example of texts takes its
            own.
          chats: encodes an example that is a conversation.
        """
        finished = example.finished or [True] * len(example.responses)
        if isinstance(example.prompt, Chat):
            prompt, turns = chats.encode(example.prompt, example.responses, example.where)
            turns = [
                turn if ends or len(turn.ids) == 1 else turn.without_end()
                for turn, ends in zip(turns, finished, strict=True)
            ]
            if not prompt:
                raise UserError(f"{example.where}: the chat template writes an empty prompt.")
            whole: list[Sequence[int]] = [prompt, *(turn.ids for turn in turns)]
            context = [turn.context for turn in turns]
            return [_Part(whole, context, digest(prompt), self._tokenizer.bos_token_id)]
        prompt, *responses = (next(ids) for _ in range(1 + len(example.responses)))
        if example.prompt is None:
            return self._parts_of_text(responses[0], example.where)
        whole = complete(prompt, responses, self._limits, example.where, finished=finished)
        context = [np.zeros(len(response), bool) for response in whole[1:]]
        return [_Part(whole, context, digest(whole[0]))]

    def _parts_of_text(self, text: list[int], where: str) -> list[_Part]:
        """A plain text in parts that fit.

        Every token is predicted from those before it, but for the very first one, which is BOS if
        there is a BOS. A part begins with the last token of the part before it.
        """
        cut = 0 if self._limits.bos is not None else 1
        first, rest = complete(text[:cut], [text[cut:]], self._limits, where)
        whole, room = [*first, *rest], self._limits.max_length - 1
        # The prompt may be the same BOS for all texts, so the digest is one of the whole text.
        prompt = digest(whole)
        return [
            _Part([whole[i - 1 : i], part], [np.zeros(len(part), bool)], prompt)
            for i in range(1, len(whole), room)
            for part in [whole[i : i + room]]
        ]


_encoder_of_process: _Encoder


def _start_process(encoder: _Encoder) -> None:
    global _encoder_of_process
    _encoder_of_process = encoder


def _encode_in_process(chunk: Sequence[Example]) -> _Encoded:
    return _encoder_of_process(chunk)


@contextmanager
def _mapper(
    encoder: _Encoder, processes: int
) -> Iterator[Callable[[Iterable[Sequence[Example]]], Iterable[_Encoded]]]:
    """A function that encodes chunks, in order, here or in several processes."""
    if processes <= 1:
        yield lambda chunks: map(encoder, chunks)
        return
    # A forked process would inherit locks held by JAX's threads, which nothing in it would
    # ever release.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (encoder,)) as pool:
        yield lambda chunks: pool.map(_encode_in_process, chunks)


def _joined(arrays: Sequence[Any]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), _TEXTS_AT_A_TIME):
        yield examples[start : start + _TEXTS_AT_A_TIME]
