"""Records to examples, by the columns that they have.

If a prompt is a text, its responses are texts. If it is a list of messages, a response is a
message of the assistant, or a list of messages that ends in one, which may repeat the prompt.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpref.data import columns
from jaxpref.data.chat import Message
from jaxpref.data.examples import Example
from jaxpref.data.sources import ASSISTANT_TURN, hh
from jaxpref.errors import UserError

# These prompts are Stanford Alpaca's own; the response follows without a space or line break.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def explicit(record: Mapping, where: str) -> Example:
    """`prompt`, `chosen`, `rejected`; and the columns of `columns.with_preference`, if present."""
    pair = _continued(record, ("chosen", "rejected"), where)
    return columns.with_preference(pair, record)


def implicit(record: Mapping, where: str) -> Example:
    """`chosen`, `rejected`: conversations that begin alike, up to a turn of the assistant.

    The columns of `columns.with_preference` are read if they are present. If the two are texts,
    they have to be dialogues in the form of Anthropic's HH, so that the prompt's end is known.
    """
    names = ("chosen", "rejected")
    chosen = columns.column(record, "chosen", where)
    if isinstance(chosen, str):
        if ASSISTANT_TURN not in chosen:
            raise UserError(
                f"{where}: chosen and rejected are texts, and where their prompt ends is not said. "
                "Give it in a column 'prompt' (format explicit), mark turns as in "
                f"{ASSISTANT_TURN!r} (format hh), or give conversations as lists of messages."
            )
        return hh(record, where)
    dialogues = [columns.messages(record, name, where) for name in names]
    return columns.with_preference(columns.conversations(record, dialogues, names, where), record)


def unpaired(record: Mapping, where: str) -> Example:
    """`prompt`, `completion` and `label`, whether the completion is a good one."""
    label = columns.boolean(record, "label", where)
    return dataclasses.replace(_continued(record, ("completion",), where), label=label)


def ranked(record: Mapping, where: str) -> Example:
    """`prompt`, `responses` and `scores`, higher for better ones."""
    scores = columns.listed(record, "scores", where)
    example = responses(record, where)
    if len(example.responses) != len(scores):
        raise UserError(
            f"{where}: there are {len(example.responses)} responses and {len(scores)} scores; each "
            "response should have one."
        )
    values = [
        columns.as_number(score, f"{where}: column 'scores', place {i}")
        for i, score in enumerate(scores)
    ]
    return dataclasses.replace(example, scores=tuple(values))


def responses(record: Mapping, where: str) -> Example:
    """`prompt` and `responses`, of which none is known to be better than another.

    A column `finish`, if it is there, says of each response why a model that said it ended:
    "stop", or "length" where it was cut. A response that was sampled may be empty. In a
    conversation, too, a response may be a text: what the assistant says.
    """
    given = columns.listed(record, "responses", where)
    said = [_message(one) if isinstance(record.get("prompt"), list) else one for one in given]
    named = {f"responses[{i}]": response for i, response in enumerate(said)}
    if not named:
        raise UserError(f"{where}: column 'responses' should not be empty.")
    finished = _finished(record, len(given), where)
    example = _continued({**record, **named}, tuple(named), where, sampled=finished is not None)
    return dataclasses.replace(example, ordered=False, finished=finished)


def sft(record: Mapping, where: str) -> Example:
    """`prompt`, `completion`."""
    return _continued(record, ("completion",), where)


def conversation(record: Mapping, where: str) -> Example:
    """`messages`: a conversation; the response is what follows the first question."""
    dialogue = columns.messages(record, "messages", where)
    return columns.conversations(record, [dialogue], ("messages",), where)


def alpaca(record: Mapping, where: str) -> Example:
    """`instruction`, `output`, and `input` where there is one, in Stanford Alpaca's prompt."""
    instruction, output = (columns.text(record, name, where) for name in ("instruction", "output"))
    if record.get("input"):
        context = columns.text(record, "input", where)
        prompt = _ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    else:
        prompt = _ALPACA.format(instruction=instruction)
    return columns.not_empty(Example(prompt, (output,), where=where), ("output",))


def prompts(record: Mapping, where: str) -> Example:
    """`prompt` alone, for methods that sample the responses."""
    if isinstance(record.get("prompt"), list):
        before = columns.messages(record, "prompt", where)
        return Example(columns.chat(record, before, where), (), where=where)
    return Example(columns.text(record, "prompt", where), (), where=where)


def text(record: Mapping, where: str) -> Example:
    """`text`: plain text, of which every token is scored."""
    return columns.not_empty(
        Example(None, (columns.text(record, "text", where),), where=where), ("text",)
    )


def _finished(record: Mapping, responses: int, where: str) -> tuple[bool, ...] | None:
    """Which responses came to their end, by the column `finish`; None without it."""
    if record.get("finish") is None:
        return None
    reasons = columns.listed(record, "finish", where)
    if len(reasons) != responses or not all(reason in ("stop", "length") for reason in reasons):
        raise UserError(
            f"{where}: column 'finish' should say 'stop' or 'length' of each of the {responses} "
            f"responses; got {repr(reasons)[:80]}."
        )
    return tuple(reason == "stop" for reason in reasons)


def _continued(
    record: Mapping, names: tuple[str, ...], where: str, *, sampled: bool = False
) -> Example:
    """`prompt` with the responses in the named columns.

    Args:
      record: the record.
      names: of the columns.
      where: place of the record, for messages.
      sampled: whether a model said the responses; it may say nothing.
    """
    if isinstance(record.get("prompt"), list):
        before = columns.messages(record, "prompt", where)
        after = [_response(record, name, where) for name in names]
        # In some data sets every response repeats the prompt.
        whole = all(len(r) > len(before) and r[: len(before)] == before for r in after)
        dialogues = after if whole else [[*before, *response] for response in after]
        return columns.conversations(
            record, dialogues, names, where, given=len(before), sampled=sampled
        )
    prompt = columns.text(record, "prompt", where)
    responses = tuple(columns.text(record, name, where) for name in names)
    example = Example(prompt, responses, where=where)
    return example if sampled else columns.not_empty(example, names)


def _message(response: Any) -> Any:
    """A text as a message of the assistant; what is no text stays as it is."""
    return {"role": "assistant", "content": response} if isinstance(response, str) else response


def _response(record: Mapping, name: str, where: str) -> list[Message]:
    value: Any = columns.column(record, name, where)
    value = [value] if isinstance(value, Mapping) else value
    return columns.as_messages(value, f"{where}: column {name!r}")
