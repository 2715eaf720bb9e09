"""The values of a record's columns, checked."""

import dataclasses
import json
import math
from collections.abc import Mapping
from itertools import permutations
from typing import Any

from jaxpref.data.chat import Chat, Message, Turns, messages_of
from jaxpref.data.examples import DivergentPromptError, EmptyResponseError, Example
from jaxpref.errors import UserError

# A message that has only these keys says what its content says, and nothing else.
_BARE = {"role", "content"}


def column(record: Mapping, name: str, where: str) -> Any:
    """The value of a column that the record must have."""
    if name not in record:
        raise UserError(
            f"{where}: no column {name!r}; the record has {', '.join(map(repr, record))}. "
            "Set data.format to match the file."
        )
    return record[name]


def text(record: Mapping, name: str, where: str) -> str:
    """A column that holds text."""
    return as_text(column(record, name, where), f"{where}: column {name!r}")


def as_text(value: Any, name: str) -> str:
    """The value, which `name` describes, if it is text that can be encoded."""
    if not isinstance(value, str):
        raise UserError(
            f"{name} should be text; got {type(value).__name__}. Set data.format to match the file."
        )
    _check_encodable(value, name)
    return value


def number(record: Mapping, name: str, where: str) -> float:
    """A column that holds a finite number."""
    return as_number(column(record, name, where), f"{where}: column {name!r}")


def as_number(value: Any, name: str) -> float:
    """The value, which `name` describes, if it is a finite number."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} should be a finite number; got {repr(value)[:80]}.")
    return number


def boolean(record: Mapping, name: str, where: str) -> bool:
    """A column that holds true or false, or 1 or 0."""
    value = column(record, name, where)
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(
            f"{where}: column {name!r} should be true or false (or 1 or 0); got {value!r}."
        )
    return bool(value)


def listed(record: Mapping, name: str, where: str) -> list:
    """A column that holds a list."""
    values = column(record, name, where)
    if not isinstance(values, list):
        raise UserError(f"{where}: column {name!r} should be a list; got {type(values).__name__}.")
    return values


def objects(record: Mapping, name: str, where: str) -> list[Mapping]:
    """A column that holds a list of objects."""
    values = column(record, name, where)
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise UserError(
            f"{where}: column {name!r} should be a list of objects; got {_kind(values)}."
        )
    return values


def messages(record: Mapping, name: str, where: str) -> list[Message]:
    """A column that holds a list of messages, without its nulls."""
    return as_messages(column(record, name, where), f"{where}: column {name!r}")


def as_messages(value: Any, name: str) -> list[Message]:
    """The value, which `name` describes, if it is a list of messages; without its nulls."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} should be a list of messages; got {_kind(value)}.")
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
    _check_encodable(value, name)
    # In tables the absent fields of a message are null, and a template would take null for a
    # value.
    return [{"content": "", **_without_nulls(message)} for message in value]


def chat(record: Mapping, before: list[Message], where: str) -> Chat:
    """A conversation to continue, with the record's tools and template variables."""
    values: dict[str, Any] = {}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = record.get(name)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: column {name!r} is not valid JSON: {error}.") from error
        if value and not isinstance(value, kind):
            raise UserError(
                f"{where}: column {name!r} should be {'a list' if kind is list else 'an object'}"
                f"; got {type(value).__name__}."
            )
        values[name] = _without_nulls(value or kind())
    return Chat(tuple(before), tuple(values["tools"]), values["chat_template_kwargs"])


def conversations(
    record: Mapping,
    dialogues: list[list[Message]],
    names: tuple[str, ...],
    where: str,
    *,
    given: int = 0,
    sampled: bool = False,
) -> Example:
    """An example of one or several dialogues.

    The prompt of several dialogues is what they share. The prompt of one dialogue ends before the
    assistant's first answer.

    Args:
      record: has the tools, and the template's variables.
      dialogues: each ends with a turn of the assistant.
      names: what the dialogues are called, for messages.
      where: place of the record, for messages.
      given: how many messages of one dialogue belong to the prompt in any case.
      sampled: whether a model said the responses; it may say nothing.

    Raises:
      DivergentPromptError: the dialogues part in a turn that is not the assistant's.
      EmptyResponseError: a turn of a response says nothing.
      UserError: a response is not the assistant's.
    """
    for dialogue in dialogues:
        if dialogue[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: a response should be a message of the assistant; the last one here is "
                f"of role {dialogue[-1]['role']!r}."
            )
    cut = _shared(dialogues) if len(dialogues) > 1 else _first_answer(dialogues[0], given)
    asked = any(dialogue[cut]["role"] != "assistant" for dialogue in dialogues)
    begun = any(len(a) < len(b) and b[: len(a)] == a for a, b in permutations(dialogues, 2))
    if asked or begun:
        how = (
            "part in a message that is not the assistant's"
            if asked
            else "are one the beginning of the other"
        )
        raise DivergentPromptError(
            f"{where}: {' and '.join(names)} {how}, so they are no responses to the same prompt. "
            "Skip such rows with --config.data.on_divergent=skip."
        )
    prompt = chat(record, dialogues[0][:cut], where)
    responses = tuple(d[-1] if cut == len(d) - 1 else tuple(d[cut:]) for d in dialogues)
    example = Example(prompt, responses, where=where)
    return example if sampled else not_empty(example, names)


def _shared(dialogues: list[list[Message]]) -> int:
    """How many messages all dialogues begin with; at least one of each is not counted."""
    first = dialogues[0]
    most = min(map(len, dialogues)) - 1
    parted = (i for i in range(most) if any(d[i] != first[i] for d in dialogues))
    return next(parted, most)


def _first_answer(dialogue: list[Message], given: int) -> int:
    """The place of the assistant's first turn after the prompt.

    If no messages are given as the prompt (0), it is the first turn after the first question.
    """
    unasked = ("system", "developer", "assistant")
    asked = (i for i, message in enumerate(dialogue) if message["role"] not in unasked)
    start = given or next(asked, len(dialogue) - 2) + 1
    return next(i for i in range(start, len(dialogue)) if dialogue[i]["role"] == "assistant")


def not_empty(example: Example, names: tuple[str, ...]) -> Example:
    """The example itself, if every response says something.

    Args:
      example: the example.
      names: what the responses are called, for messages.

    Raises:
      EmptyResponseError: a response is empty.
    """
    for name, response in zip(names, example.responses, strict=True):
        if not response.strip() if isinstance(response, str) else _says_nothing(response):
            raise EmptyResponseError(
                f"{example.where}: the {name} response is empty. Skip such rows with "
                "--config.data.on_empty=skip."
            )
    return example


def _says_nothing(response: Turns) -> bool:
    """Whether one of the assistant's turns in a response is empty."""

    def said(message: Message) -> Any:
        content = message["content"]
        return content.strip() if isinstance(content, str) else content

    turns = [m for m in messages_of(response) if m["role"] == "assistant"]
    return any(not said(turn) and set(turn) <= _BARE for turn in turns)


def with_preference(pair: Example, record: Mapping) -> Example:
    """The pair with its margin and its scores, if the record has them.

    Reads `margin`, how much better the chosen response is; and the scores of both responses,
    `score_chosen` and `score_rejected`.
    """
    names = [f"score_{side}" for side in ("chosen", "rejected")]
    if record.get("margin") is not None:
        pair = dataclasses.replace(pair, margin=number(record, "margin", pair.where))
    if all(record.get(name) is not None for name in names):
        chosen, rejected = (number(record, name, pair.where) for name in names)
        pair = dataclasses.replace(pair, scores=(chosen, rejected))
    return pair


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _check_encodable(value: Any, name: str) -> None:
    """Refuses a value with half of a character in a text, because no tokenizer can encode it."""
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
            _check_encodable(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_encodable(item, name)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
