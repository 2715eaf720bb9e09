"""Conversations to token ids, through the tokenizer's chat template.

The template alone decides how a conversation reads, BOS included. This is guaranteed here for
every template:

- the ids of a turn continue the ids before it, so that the model is trained on what it will see
  when it generates;
- a turn ends in one end-of-turn token: the template's own or, if it has none, EOS;
- the name of a special token inside a message is text, not a token;
- where several turns of one conversation are trained, each has the ids that it would have as
  the last turn.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxpref.errors import UserError
from jaxpref.tokenizer import TEMPLATES, special_names, special_tokens

Message = Mapping[str, Any]
# A message of the assistant, or several messages from the assistant's first to its last.
Turns = Message | tuple[Message, ...]

# While the template is rendered, a character from here on (for private use in Unicode) stands for
# the name of a special token inside a message.
_FIRST_MARK = 0xF0000
_MARKS = re.compile("([\U000f0000-\U000ffffd])")
_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that a response continues.

    Attributes:
      messages: each with a `role`, a `content`, and what else the template reads. If the last
        message is the assistant's, a response continues it.
      tools: JSON schemas of the functions that may be called.
      options: further variables for the template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)


def messages_of(response: str | Turns) -> tuple[Message, ...]:
    """A response as messages; a text is what the assistant says."""
    if isinstance(response, str):
        return ({"role": "assistant", "content": response},)
    return (response,) if isinstance(response, Mapping) else response


class EncodedTurns(NamedTuple):
    """The ids of the messages that continue a conversation.

    Attributes:
      ids: up to the end of the assistant's last turn.
      context: which ids are not the assistant's: they are seen but not scored.
    """

    ids: list[int]
    context: Bool[np.ndarray, " tokens"]

    def without_end(self) -> "EncodedTurns":
        """The same turns, with the last one cut before the token that ends it."""
        return EncodedTurns(self.ids[:-1], self.context[:-1])


class _Opened(NamedTuple):
    """A conversation as it is when the model begins to write."""

    text: str
    ids: list[int]


class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Attributes:
      special_names: names of special tokens met in messages.
    """

    def __init__(self, tokenizer: Any, *, eos: int, parse_special_tokens: bool = False):
        """Prepares to encode.

        Args:
          tokenizer: a `transformers` tokenizer.
          eos: the id that ends responses if the template has no end-of-turn token.
          parse_special_tokens: whether the name of a special token in a message becomes that
            token; else it stays text.
        """
        self.special_names = 0
        self._tokenizer = tokenizer
        self._eos = eos
        self._parse = parse_special_tokens
        self._special_ids = special_tokens(tokenizer)
        self._special = set(self._special_ids.values())
        self._known: dict[str, list[int]] = {}
        self._special_names = special_names(tokenizer)
        self._names = re.compile(f"{self._special_names.pattern}|{_MARKS.pattern}")

    def encode(
        self, chat: Chat, responses: Sequence[str | Turns], where: str
    ) -> tuple[list[int], list[EncodedTurns]]:
        """The ids of the prompt and of each response, which ends its turn.

        Args:
          chat: the conversation before the assistant's turn.
          responses: each is a message of the assistant that continues the conversation, or
            several messages from the assistant's first to its last.
          where: place of the record, for messages.

        Raises:
          UserError: the tokenizer has no chat template, the template fails, a turn does not
            continue what is before it, or reads otherwise once the conversation goes on.
        """
        names: list[str] = []
        chat = _map_text(chat, lambda text: self._mask(text, names))
        opened = self._open(chat, names, where)
        encoded = []
        for response in responses:
            masked = _map_text(messages_of(response), lambda text: self._mask(text, names))
            encoded.append(self._continue(chat, opened, _joined(masked, where), names, where))
        return opened.ids, encoded

    def _continue(
        self,
        chat: Chat,
        opened: _Opened,
        messages: tuple[Message, ...],
        names: list[str],
        where: str,
    ) -> EncodedTurns:
        """The ids of messages that continue a conversation.

        Args:
          chat: the conversation.
          opened: the conversation, opened for the first of the messages.
          messages: from the assistant's first message to its last.
          names: the names of special tokens that marks stand for.
          where: place of the record, for messages.
        """
        spans, wholes = [], []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _extended(chat, messages[:place], where)
            start = self._open(before, names, where) if place else opened
            wholes.append(start.ids + self._turn(before, start, message, names, where))
            spans.append(slice(len(start.ids), len(wholes[-1])))
        whole = wholes[-1]
        for number, until in enumerate(wholes[:-1], start=1):
            if whole[: len(until)] != until:
                raise self._changed_error(number, until, whole, where)
        context = np.ones(len(whole), bool)
        for span in spans:
            context[span] = False
        return EncodedTurns(whole[len(opened.ids) :], context[len(opened.ids) :])

    def _open(self, chat: Chat, names: list[str], where: str) -> _Opened:
        """A conversation up to where the model goes on, in a new turn or in its own last one."""
        goes_on = bool(chat.messages) and chat.messages[-1]["role"] == "assistant"
        how = "continue_final_message" if goes_on else "add_generation_prompt"
        text = self._render(chat, where, **{how: True})
        return _Opened(text, self._tokenize(text, names))

    def _turn(
        self, chat: Chat, opened: _Opened, message: Message, names: list[str], where: str
    ) -> list[int]:
        """The ids of one turn of the assistant, through the token that ends it."""
        whole = self._render(_extended(chat, (message,), where), where)
        if not whole.startswith(opened.text):
            raise self._boundary_error(opened.text, whole, "text", where)
        said = whole[len(opened.text) :]
        silent = message == {"role": "assistant", "content": ""}
        if not (silent or self._parse or self._special_names.sub("", said).strip()):
            raise UserError(
                f"{where}: the chat template shows nothing of the response (it has "
                f"{', '.join(sorted(message))}); use a template that does."
            )
        ids = self._tokenize(whole, names)
        if ids[: len(opened.ids)] != opened.ids:
            raise self._boundary_error(opened.ids, ids, "tokens", where)
        return self._end_turn(ids[len(opened.ids) :])

    def _mask(self, text: str, names: list[str]) -> str:
        def mark(match: re.Match) -> str:
            self.special_names += not _MARKS.match(match[0])
            if self._parse:
                return match[0]
            names.append(match[0])
            return chr(_FIRST_MARK + len(names) - 1)

        return self._names.sub(mark, text)

    def _render(self, chat: Chat, where: str, **how: bool) -> str:
        import jinja2

        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where}: is a conversation, but the tokenizer has no chat template; name one "
                f"with --config.tokenizer.chat_template={'|'.join(TEMPLATES)} or a Jinja file "
                "(generate and score: --chat_template)."
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) or None,
                tokenize=False,
                **how,
                **chat.options,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: the chat template fails on this conversation (roles: "
                f"{', '.join(message['role'] for message in chat.messages)}): {error}"
            ) from error

    def _tokenize(self, text: str, names: list[str]) -> list[int]:
        """Token ids, with the marked names as text."""
        ids: list[int] = []
        for i, piece in enumerate(_MARKS.split(text) if names else [text]):
            is_name = i % 2 == 1
            if is_name:
                piece = names[ord(piece) - _FIRST_MARK]
                ids += self._ids([piece], split_special_tokens=True)[0]
            elif piece:
                ids += self._ids_of_pieces(piece)
        return ids

    def _ids_of_pieces(self, text: str) -> list[int]:
        """The token ids of a text, of which each piece between two special tokens is remembered.

        A tokenizer first cuts a text at its special tokens, so the pieces can be tokenised one by
        one. A turn is read again with every turn after it and with every response, so most
        pieces are known already.
        """
        cuts = [match.span() for match in self._special_names.finditer(text)]
        starts, ends = [0, *(start for start, _ in cuts)], [*(end for _, end in cuts), len(text)]
        # A piece includes the special tokens around it, because some of them remove the blanks
        # beside them.
        pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._known]
        if new:
            self._known.update(zip(new, self._ids(new), strict=True))
        names = [self._special_ids[text[start:end]] for start, end in cuts]
        ids = [self._known[piece] for piece in pieces]
        seams = zip(names, ids[:-1], ids[1:], strict=True)
        if not all(before[-1:] == [name] == after[:1] for name, before, after in seams):
            return self._ids([text])[0]
        return [*ids[0], *(id for piece in ids[1:] for id in piece[1:])]

    def _ids(self, texts: list[str], *, split_special_tokens: bool = False) -> list[list[int]]:
        return self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=split_special_tokens
        ).input_ids

    def _end_turn(self, ids: list[int]) -> list[int]:
        """Cuts what follows the template's end-of-turn token; adds EOS if there is none."""
        last = next((i for i in reversed(range(len(ids))) if ids[i] in self._special), None)
        if last is not None and not self._tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return [*ids, self._eos]

    def _boundary_error(self, prompt: Any, whole: Any, unit: str, where: str) -> UserError:
        show = str if unit == "text" else self._tokenizer.convert_ids_to_tokens
        parted, first, second = _where_they_part(prompt, whole, show)
        return UserError(
            f"{where}: the response does not continue the prompt. From place {parted} of the "
            f"{unit}, the prompt with the template's opening of a turn reads\n  {first}\n"
            f"but with the response after it\n  {second}\n"
            "The model would be trained on other tokens than it continues when it generates. "
            "Change the template (tokenizer.chat_template) so that a turn opens in the same way "
            "and, if tokens merge, so that a special token or the response's own whitespace "
            "stands at the boundary."
        )

    def _changed_error(
        self, number: int, until: list[int], whole: list[int], where: str
    ) -> UserError:
        parted, first, second = _where_they_part(until, whole, self._tokenizer.decode)
        return UserError(
            f"{where}: the chat template writes turn {number} of the assistant otherwise once the "
            f"conversation goes on. From token {parted}, when the model says it, it reads\n"
            f"  {first}\nbut inside the whole conversation\n  {second}\n"
            "(some templates take away an earlier turn's reasoning, some do not mark its end). The "
            "model would be trained on what it never says, so train the last turn of each "
            "conversation alone with --config.data.turns=last, or name a template that leaves "
            "earlier turns as they were (tokenizer.chat_template)."
        )


def _where_they_part(one: Any, other: Any, show: Callable[[Any], Any]) -> tuple[int, str, str]:
    """The first place where two texts or two lists of ids differ, and what both have around it."""
    parted = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    near = slice(max(parted - _SHOWN // 2, 0), parted + _SHOWN // 2)
    return parted, repr(show(one[near])), repr(show(other[near]))


def _extended(chat: Chat, messages: Sequence[Message], where: str) -> Chat:
    """The conversation with further messages, the first of which may continue its last one."""
    *before, last = chat.messages or (None,)
    seam = messages if last is None else (last, *messages)
    return dataclasses.replace(chat, messages=(*before, *_joined(seam, where)))


def _joined(messages: Sequence[Message], where: str) -> tuple[Message, ...]:
    """The messages, with those of the assistant that follow each other joined to one.

    Raises:
      UserError: such a message is not text alone, or the first one calls tools.
    """
    joined: list[Message] = []
    for message in messages:
        if not (joined and joined[-1]["role"] == message["role"] == "assistant"):
            joined.append(message)
            continue
        before = joined[-1]
        texts = (before["content"], message["content"])
        if before.get("tool_calls") or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: a message of the assistant that calls tools, or is not text alone, "
                "cannot be continued by the one after it."
            )
        joined[-1] = {**before, **message, "content": "".join(texts)}
    return tuple(joined)


def stop_ids(tokenizer: Any) -> list[int]:
    """The ids at which generation stops: EOS, and the chat template's end-of-turn token if any."""
    eos = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return [eos]
    turn = Chat(({"role": "user", "content": "a"},))
    try:
        encoder = ChatEncoder(tokenizer, eos=eos)
        _, (response,) = encoder.encode(turn, ["b"], "a conversation of two words")
    except UserError:
        # The template cannot write so simple a conversation, so its end-of-turn token is not
        # known.
        return [eos]
    return list(dict.fromkeys([eos, int(response.ids[-1])]))


def _map_text(value: Any, function: Callable[[str], str]) -> Any:
    """The value with the function applied to every text in it, except keys and roles."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Chat):
        return Chat(
            *(_map_text(getattr(value, f.name), function) for f in dataclasses.fields(Chat))
        )
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _map_text(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_text(item, function) for item in value)
    return value
