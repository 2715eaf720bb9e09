"""Records to examples: a prompt with its responses, best first."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from jaxpref.data.records import Record, read_records
from jaxpref.errors import UserError

_ASSISTANT_TURN = "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with K responses.

    Attributes:
      prompt: the text before the responses.
      responses: the texts that continue it, the preferred one first.
      scores: the true reward of each response, where it is known.
      where: the place in the source, for messages.
    """

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    where: str = ""


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
      format: "explicit" (columns `prompt, chosen, rejected`) or "hh" (columns
        `chosen, rejected`, each a whole dialogue).
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

    The side depends on the prompt's text alone, so it stays the same when the data
    grows, is reordered, or is mixed with other data.

    Returns:
      The examples to train on, and those held out (about `fraction` of the prompts).
    """
    kept: list[Example] = []
    held: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(example.prompt.encode()).digest()
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


def _text(record: Mapping, column: str, where: str) -> str:
    if column not in record:
        raise UserError(
            f"{where}: no column {column!r}; the record has {', '.join(map(repr, record))}. "
            "Set data.format to match the file."
        )
    value = record[column]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} should be text; got {type(value).__name__}. "
            "Lists of messages are not supported yet."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: column {column!r} holds half of a character at {error.start} (a lone "
            "surrogate, as a cut emoji leaves it); mend or remove the row."
        ) from error
    return value


def _checked(example: Example) -> Example:
    for name, response in zip(("chosen", "rejected"), example.responses, strict=True):
        if not response:
            raise EmptyResponseError(
                f"{example.where}: the {name} response is empty. Skip such rows with "
                "--config.data.on_empty=skip."
            )
    return example


def _explicit(record: Mapping, where: str) -> Example:
    """`prompt`, `chosen` and `rejected` columns."""
    prompt, chosen, rejected = (_text(record, c, where) for c in ("prompt", "chosen", "rejected"))
    return _checked(Example(prompt, (chosen, rejected), where=where))


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


FORMATS: dict[str, Callable[[Mapping, str], Example]] = {"explicit": _explicit, "hh": _hh}
