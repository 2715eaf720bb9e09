"""An example, and the split of examples by prompt."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from jaxpref.data.chat import Chat, Turns, messages_of
from jaxpref.errors import UserError

Response = str | Turns


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with K responses.

    Attributes:
      prompt: the text before the responses, or the conversation; None for a plain text, which
        is the only response.
      responses: the texts, or the assistant's messages, that continue the prompt; none if they
        are still to be sampled. Several turns are a tuple of messages, from the assistant's
        first to its last; what others say between them is context.
      scores: how good each response is, by the record; None if it does not say.
      where: the place in the source, for messages.
      label: whether a single response is a good one; None if the record does not say.
      margin: by how much the first of two responses is the better one; None if the record
        does not say.
      source: the name of the source, where several are mixed.
      ordered: whether the responses are ordered, best first; else they are in the record's order.
      true_rewards: the reward of each response from which the order was drawn, where that is
        known. The draw may have put the response with the lower reward first.
      finished: whether each response came to its end, where it was sampled; one that did not was
        cut by length, so no end token follows it. None where responses were not sampled: all did.
      record: all columns that the example was read from, where they are asked for.
    """

    prompt: str | Chat | None
    responses: tuple[Response, ...]
    scores: tuple[float, ...] | None = None
    where: str = ""
    label: bool | None = None
    margin: float | None = None
    source: str = ""
    ordered: bool = True
    true_rewards: tuple[float, ...] | None = None
    finished: tuple[bool, ...] | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def last_turn(example: Example) -> Example:
    """The example with a conversation's last turn as its response, and all before it as prompt.

    An example whose responses are one turn each stays as it is.

    Raises:
      DivergentPromptError: there are several responses, of several turns.
    """
    several = any(isinstance(response, tuple) for response in example.responses)
    if not several or not isinstance(example.prompt, Chat):
        return example
    if len(example.responses) > 1:
        raise DivergentPromptError(
            f"{example.where}: the conversations part before their last message, so their last "
            "turns have no common prompt. Train all turns from where they part with "
            "--config.data.turns=all, or skip such rows with --config.data.on_divergent=skip."
        )
    *before, last = messages_of(example.responses[0])
    prompt = dataclasses.replace(example.prompt, messages=(*example.prompt.messages, *before))
    return dataclasses.replace(example, prompt=prompt, responses=(last,))


class SkippableError(UserError):
    """A record that can be left out and counted under `reason`, if a knob says so."""

    reason: ClassVar[str]


class DivergentPromptError(SkippableError):
    """The responses of one record do not continue the same prompt."""

    reason = "divergent_prompt"


class AssistantPromptError(SkippableError):
    """A message of the assistant follows another one of its own."""

    reason = "assistant_prompt"


class EmptyResponseError(SkippableError):
    """A response holds no text."""

    reason = "empty_response"


class Excluded(Exception):
    """A record that the published rule of its data set leaves out, counted under `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def hold_out(examples: Iterable[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Splits by prompt: all examples of a prompt fall on the same side.

    The side depends on nothing but the prompt (for plain text, on the text itself), so it stays
    the same when the data grows, is reordered, or is mixed with other data.

    Returns:
      The examples to train on, and those held out (about `fraction` of the prompts).
    """
    kept: list[Example] = []
    held: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(_said(example).encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (held if share < fraction else kept).append(example)
    return kept, held


def _said(example: Example) -> str:
    """The texts of a prompt, from which its side follows.

    Of a conversation these are roles and contents, without tools and template variables.
    """
    if isinstance(example.prompt, Chat):
        said = [(message["role"], message["content"]) for message in example.prompt.messages]
        return json.dumps(said, default=str)
    return str(example.responses[0]) if example.prompt is None else example.prompt
