"""Records to examples: a prompt with its responses, best first."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxpref.data.chat import Chat, Message
from jaxpref.data.records import Record, read_records
from jaxpref.errors import UserError

_ASSISTANT_TURN = "\n\nAssistant:"
Response = str | Message

# What a message with nothing to say has.
_BARE = {"role", "content"}


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with K responses.

    Attributes:
      prompt: the text before the responses, or the conversation.
      responses: the texts, or the messages, that continue it, best first; none if they are
        still to be sampled.
      scores: of each response, where there are any.
      where: the place in the source, for messages.
      label: whether a single response is a good one; None if it is not said.
      margin: by how much the first of two responses is the better one.
      source: the name of the source, where several are mixed.
      scores_are_true: the scores are the reward that the order was drawn from, which may
        have drawn the other way; else the order is that of the scores.
    """

    prompt: str | Chat
    responses: tuple[Response, ...]
    scores: tuple[float, ...] | None = None
    where: str = ""
    label: bool | None = None
    margin: float | None = None
    source: str = ""
    scores_are_true: bool = False


class DivergentPromptError(UserError):
    """The responses of one record do not continue the same prompt."""


class EmptyResponseError(UserError):
    """A response holds no text."""


def read_examples(
    path: str,
    format: str,
    *,
    subset: str = "",
    split: str = "train",
    on_divergent: str = "error",
    on_empty: str = "error",
) -> tuple[list[Example], Counter[str]]:
    """Reads all examples of a source.

    Args:
      path: see `read_records`.
      format: a name in `FORMATS`.
      subset: folder of a hub data set.
      split: split of a hub data set.
      on_divergent: "error", or "skip" to drop and count records whose dialogues part
        before the last assistant turn.
      on_empty: "error", or "skip" to drop and count records with an empty response.

    Returns:
      The examples in order, and what was dropped, by reason.

    Raises:
      UserError: naming the file, the line and what is wrong.
    """
    parse = FORMATS[format]
    records = read_records(path, subset=subset, split=split)
    dropped: Counter[str] = Counter()
    skipped = {
        DivergentPromptError: ("divergent_prompt", on_divergent),
        EmptyResponseError: ("empty_response", on_empty),
    }
    examples = list(_parse_all(records, parse, skipped, dropped))
    if not examples:
        raise UserError(f"{path}: holds no usable record ({dict(dropped) or 'it is empty'}).")
    return examples, dropped


def hold_out(examples: Iterable[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Splits by prompt: all examples of a prompt fall on the same side.

    The side depends on the prompt alone, so it stays the same when the data
    grows, is reordered, or is mixed with other data.

    Returns:
      The examples to train on, and those held out (about `fraction` of the prompts).
    """
    kept: list[Example] = []
    held: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(str(example.prompt).encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (held if share < fraction else kept).append(example)
    return kept, held


def _parse_all(
    records: Iterable[Record],
    parse: Callable[[Mapping, str], Example],
    skipped: Mapping[type[UserError], tuple[str, str]],
    dropped: Counter[str],
) -> Iterator[Example]:
    for record, where in records:
        try:
            yield parse(record, where)
        except (DivergentPromptError, EmptyResponseError) as error:
            reason, policy = skipped[type(error)]
            if policy != "skip":
                raise
            dropped[reason] += 1


def _column(record: Mapping, column: str, where: str) -> Any:
    if column not in record:
        raise UserError(
            f"{where}: no column {column!r}; the record has {', '.join(map(repr, record))}. "
            "Set data.format to match the file."
        )
    return record[column]


def _text(record: Mapping, column: str, where: str) -> str:
    value = _column(record, column, where)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} should be text; got {type(value).__name__}. "
            "Set data.format to match the file."
        )
    _check_text(value, f"{where}: column {column!r}")
    return value


def _check_text(value: Any, name: str) -> None:
    """Refuses half characters in any text of a value, which no tokenizer can encode."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name} holds half of a character at {error.start} (a lone surrogate, as a cut "
                "emoji leaves it); mend or remove the row."
            ) from error
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_text(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_text(item, name)


def _messages(record: Mapping, column: str, where: str) -> list[Message]:
    value = _column(record, column, where)
    name = f"{where}: column {column!r}"
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{name} should be a list of messages; got "
            f"{'an empty list' if isinstance(value, list) else type(value).__name__}."
        )
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{name}: a message should be an object with 'role' and 'content'; got "
                f"{sorted(message) if isinstance(message, Mapping) else type(message).__name__}."
            )
        if not isinstance(message.get("content"), str | list | None):
            raise UserError(
                f"{name}: a message's content should be text or a list of parts; got "
                f"{type(message['content']).__name__}."
            )
    _check_text(value, name)
    # Tables fill absent fields with null, which templates take for a value.
    return [{"content": "", **_without_nulls(message)} for message in value]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _chat(record: Mapping, messages: list[Message], where: str) -> Chat:
    """The conversation before the last message, with the record's tools and template variables."""
    values: dict[str, Any] = {}
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = record.get(column)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: column {column!r} is not valid JSON: {error}."
                ) from error
        if value and not isinstance(value, kind):
            raise UserError(
                f"{where}: column {column!r} should be {'a list' if kind is list else 'an object'}"
                f"; got {type(value).__name__}."
            )
        values[column] = _without_nulls(value or kind())
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: a response should be a message of the assistant; the last one here is of "
            f"role {messages[-1]['role']!r}."
        )
    return Chat(tuple(messages[:-1]), tuple(values["tools"]), values["chat_template_kwargs"])


def _conversations(
    record: Mapping, before: list[Message], columns: tuple[str, ...], where: str
) -> Example:
    """The last message of each column is a response; all before it must be the same."""
    dialogues = [[*before, *_messages(record, column, where)] for column in columns]
    chats = [_chat(record, messages, where) for messages in dialogues]
    if any(chat != chats[0] for chat in chats):
        raise DivergentPromptError(
            f"{where}: {' and '.join(columns)} part before their last message, so they have no "
            "common prompt (a response is one message of the assistant). Skip such rows with "
            "--config.data.on_divergent=skip."
        )
    return _checked(Example(chats[0], tuple(m[-1] for m in dialogues), where=where), columns)


def _checked(example: Example, names: tuple[str, ...] = ("chosen", "rejected")) -> Example:
    for name, response in zip(names, example.responses, strict=True):
        if isinstance(response, str):
            empty = not response
        else:
            empty = not response["content"] and set(response) <= _BARE
        if empty:
            raise EmptyResponseError(
                f"{example.where}: the {name} response is empty. Skip such rows with "
                "--config.data.on_empty=skip."
            )
    return example


def _explicit(record: Mapping, where: str) -> Example:
    """`prompt`, `chosen` and `rejected`, each a text, or each a list of messages."""
    columns = ("chosen", "rejected")
    if isinstance(record.get("prompt"), list):
        return _conversations(record, _messages(record, "prompt", where), columns, where)
    prompt, chosen, rejected = (_text(record, c, where) for c in ("prompt", *columns))
    return _checked(Example(prompt, (chosen, rejected), where=where))


def _implicit(record: Mapping, where: str) -> Example:
    """`chosen` and `rejected` conversations that begin in the same way."""
    return _conversations(record, [], ("chosen", "rejected"), where)


def _sft(record: Mapping, where: str) -> Example:
    """A conversation in `messages`, whose last message is the response."""
    return _conversations(record, [], ("messages",), where)


def _hh(record: Mapping, where: str) -> Example:
    """Two whole dialogues; the prompt is everything through the last assistant mark."""
    chosen, rejected = (_text(record, column, where) for column in ("chosen", "rejected"))
    cut = chosen.rfind(_ASSISTANT_TURN)
    if cut < 0:
        raise UserError(f"{where}: no {_ASSISTANT_TURN!r} in the chosen dialogue.")
    cut += len(_ASSISTANT_TURN)
    # The rejected dialogue may have more turns; its last mark must be the same one.
    if rejected[:cut] != chosen[:cut] or _ASSISTANT_TURN in rejected[cut:]:
        raise DivergentPromptError(
            f"{where}: the chosen and the rejected dialogue part before the last assistant turn, "
            "so they have no common prompt. Skip such rows with --config.data.on_divergent=skip."
        )
    return _checked(Example(chosen[:cut], (chosen[cut:], rejected[cut:]), where=where))


FORMATS: dict[str, Callable[[Mapping, str], Example]] = {
    "explicit": _explicit,
    "implicit": _implicit,
    "messages": _sft,
    "hh": _hh,
}
