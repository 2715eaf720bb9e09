"""Two files of responses to the same prompts: which response is compared with which."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref.data import columns, formats
from jaxpref.data.chat import Chat, messages_of
from jaxpref.data.examples import Response
from jaxpref.data.records import read_records
from jaxpref.errors import UserError
from jaxpref.evaluation.judges.base import Comparison

_SHOWN = 80
# Columns that say which file a response is from, or how it was sampled.
_OF_RESPONSES = ("where", "prompt", "responses", "finish", "logps", "scores", "output", "generator")


class Compared(NamedTuple):
    """What is compared.

    Attributes:
      comparisons: those of one prompt follow each other.
      prompts: how many there are.
      counts: of what is worth to be known, by name.
    """

    comparisons: list[Comparison]
    prompts: int
    counts: dict[str, int]


class _Said(NamedTuple):
    """The responses to a prompt in a record, and whether each of them came to its end."""

    where: str
    prompt: str | Chat
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    record: Mapping[str, Any]


def compare_files(a: str | Path, b: str | Path) -> Compared:
    """Reads two files, and compares their responses to each prompt.

    A file is JSON lines as `evaluation.generate_file` writes them (`prompt`, `responses`), or a
    JSON array as AlpacaEval has it (`instruction`, `output`). Prompts are matched by their text,
    in whatever order they are. Response number i of one file meets number i of the other, or a
    single response meets all of the other file's. A prompt that occurs several times counts as
    several samples of one prompt.

    Args:
      a: path of file A, whose order of prompts is kept.
      b: path of file B.

    Raises:
      UserError: a file cannot be read or has no responses, the prompts of the two are not the
        same, or the numbers of their responses do not fit.
    """
    said = {str(path): _by_prompt(_read(str(path))) for path in (a, b)}
    of_a, of_b = said[str(a)], said[str(b)]
    _check_same_prompts(str(a), of_a, str(b), of_b)
    if len(of_a) < 2:
        raise UserError(
            f"{a}: has one prompt; a win rate with its interval needs at least 2 different prompts."
        )
    comparisons = [
        comparison
        for number, text in enumerate(of_a)
        for one, other in zip(of_a[text], _as_often(a, of_a[text], b, of_b[text]), strict=True)
        for comparison in _pairs(number, text, one, other)
    ]
    every = [(x.a, x.b) for x in comparisons]
    counts = {
        "prompts_that_occur_several_times": sum(len(some) > 1 for some in of_a.values()),
        "comparisons_with_an_empty_response_of_A": sum(not a.strip() for a, _ in every),
        "comparisons_with_an_empty_response_of_B": sum(not b.strip() for _, b in every),
        "comparisons_of_equal_responses": sum(a == b for a, b in every),
    }
    return Compared(comparisons, len(of_a), counts)


def prompt_text(prompt: str | Chat) -> str:
    """A prompt as a text to read; a conversation of one question is that question.

    So the same question is the same prompt, whether a file has it as a text or as a message.
    """
    if isinstance(prompt, str):
        return prompt
    messages = prompt.messages
    if [message["role"] for message in messages] == ["user"] and not prompt.tools:
        return _content(messages[0])
    turns = [f"{message['role'].capitalize()}: {_content(message)}" for message in messages]
    tools = [f"Tools: {json.dumps(list(prompt.tools), default=str)}"] if prompt.tools else []
    return "\n\n".join([*tools, *turns])


def response_text(response: Response) -> str:
    """A response of one message, or a text, as a text to read."""
    return _content(messages_of(response)[0])


def _content(message: Mapping[str, Any]) -> str:
    """What a message says; parts that are no text, and calls of tools, as JSON."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else list(content or [])
    further = {k: v for k, v in message.items() if k not in ("role", "content")}
    texts = [
        part if isinstance(part, str) else part.get("text") or json.dumps(part, default=str)
        for part in [*parts, *([further] if further else [])]
    ]
    return "\n".join(texts)


def _read(path: str) -> list[_Said]:
    """The records of a file with their prompts and responses, which may be empty."""
    found = [_said(record, where) for record, where in read_records(path)]
    if not found:
        raise UserError(f"{path}: is empty; it should have prompts with responses.")
    return found


def _said(record: Mapping[str, Any], where: str) -> _Said:
    if "responses" in record:
        given = columns.listed(record, "responses", where)
        # To say nothing is a response, too, and one that is judged.
        finish = record.get("finish") or ["stop"] * len(given)
        example = formats.responses({**record, "finish": finish}, where)
        several = next((r for r in example.responses if len(messages_of(r)) > 1), None)
        if several is not None:
            raise UserError(
                f"{where}: a response has {len(messages_of(several))} messages; a judge reads "
                "responses of one message each."
            )
        texts = tuple(map(response_text, example.responses))
        prompt, finished = example.prompt, example.finished
        if prompt == _wrapped(record, where):
            prompt = _instruction(record, where)
        assert prompt is not None
        assert finished is not None
        return _Said(where, prompt, texts, finished, record)
    if "instruction" in record and "output" in record:
        output = columns.text(record, "output", where)
        return _Said(where, _instruction(record, where), (output,), (True,), record)
    raise UserError(
        f"{where}: has the columns {', '.join(sorted(map(repr, record)))}. A judge reads files "
        "that python -m jaxpref.generate writes ('prompt', 'responses'), and AlpacaEval's "
        "('instruction', 'output')."
    )


def _instruction(record: Mapping[str, Any], where: str) -> str:
    """The prompt of one of AlpacaEval's records."""
    further = columns.text(record, "input", where) if record.get("input") else ""
    return "\n\n".join(filter(None, [columns.text(record, "instruction", where), further]))


def _wrapped(record: Mapping[str, Any], where: str) -> str | Chat | None:
    """The prompt that `generate` makes of one of AlpacaEval's records; None for other records."""
    texts = (record.get("instruction"), record.get("input") or "")
    if not all(isinstance(text, str) for text in texts):
        return None
    return formats.alpaca({**record, "output": "any"}, where).prompt


def _by_prompt(read: Sequence[_Said]) -> dict[str, list[_Said]]:
    found: dict[str, list[_Said]] = {}
    for said in read:
        found.setdefault(prompt_text(said.prompt), []).append(said)
    return found


def _check_same_prompts(
    a: str, of_a: Mapping[str, list[_Said]], b: str, of_b: Mapping[str, list[_Said]]
) -> None:
    lacking = [
        f"{len(missing):,} of the {len(here):,} prompts of {name} are not in {other}, the first at "
        f"{here[missing[0]][0].where}: {missing[0][:_SHOWN]!r}."
        for name, here, other, there in ((a, of_a, b, of_b), (b, of_b, a, of_a))
        if (missing := [text for text in here if text not in there])
    ]
    if lacking:
        raise UserError(
            f"{' '.join(lacking)} Both files should answer the same prompts: leave the others out, "
            "or sample for them."
        )


def _as_often(a: str | Path, of_a: list[_Said], b: str | Path, of_b: list[_Said]) -> list[_Said]:
    if len(of_a) != len(of_b):
        raise UserError(
            f"{of_a[0].where}: the prompt occurs {len(of_a)} times in {a} and {len(of_b)} times in "
            f"{b} (first at {of_b[0].where}). It should occur equally often: remove duplicates."
        )
    return of_b


def _pairs(number: int, text: str, one: _Said, other: _Said) -> list[Comparison]:
    """The comparisons of a record of file A with one of file B."""
    counts = len(one.responses), len(other.responses)
    if counts[0] != counts[1] and 1 not in counts:
        raise UserError(
            f"{one.where}: the prompt has {counts[0]} responses here and {counts[1]} at "
            f"{other.where}. There should be equally many, or one to be compared with all."
        )
    return [
        Comparison(
            number,
            one.where,
            one.prompt,
            text,
            one.responses[i % counts[0]],
            other.responses[i % counts[1]],
            (one.finished[i % counts[0]], other.finished[i % counts[1]]),
            _columns(one.record, other.record),
        )
        for i in range(max(counts))
    ]


def _columns(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a prompt: what its two records do not say differently."""
    return {
        name: value
        for name, value in {**a, **b}.items()
        if name not in _OF_RESPONSES and a.get(name, value) == value
    }
