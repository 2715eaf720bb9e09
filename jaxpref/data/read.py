"""A source to examples: the format, named or detected, and what is left out, counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

from jaxpref.data import formats, sources
from jaxpref.data.chat import Chat, messages_of
from jaxpref.data.examples import (
    AssistantPromptError,
    Example,
    Excluded,
    SkippableError,
    last_turn,
)
from jaxpref.data.records import Record, read_records
from jaxpref.errors import UserError
from jaxpref.knobs import one_of

Parser = Callable[[Mapping, str], Example]

# UltraFeedback's pairs have these columns beside those of the format implicit.
_RATED = {"score_chosen", "score_rejected"}
# The columns of responses that `evaluation.generate_file` has sampled.
_SAMPLED = {"prompt", "responses", "finish"}
# How many records are looked at to find out which columns a source has.
_LOOKED_AT = 100

# The types that a column's values may have.
_TEXT: type = str
_TALK: tuple[type, ...] = (str, list)
_TURN: tuple[type, ...] = (str, list, dict)
_ANY: type = object


class Format(NamedTuple):
    """A format of records.

    Attributes:
      parse: reads a record.
      columns: the columns by which the format is detected, with the types of their values;
        empty if the format has to be named.
    """

    parse: Parser
    columns: Mapping[str, type | tuple[type, ...]] = {}


_PAIR = {"chosen": _TURN, "rejected": _TURN}
# The first format in this order whose columns a record has, with values of these types, is the
# one that is detected.
FORMATS: dict[str, Format] = {
    "ranked": Format(formats.ranked, {"prompt": _TALK, "responses": list, "scores": list}),
    "explicit": Format(formats.explicit, {"prompt": _TALK, **_PAIR}),
    "shp": Format(
        sources.shp,
        {"history": _TEXT, "human_ref_A": _TEXT, "human_ref_B": _TEXT, "labels": _ANY},
    ),
    "stack_exchange": Format(sources.stack_exchange, {"question": _TEXT, "answers": list}),
    "tldr": Format(sources.tldr, {"info": dict, "summaries": list, "choice": _ANY}),
    "tldr_sft": Format(
        sources.tldr_sft, {"subreddit": _TEXT, "title": _TEXT, "post": _TEXT, "summary": _TEXT}
    ),
    "cnn_dailymail": Format(sources.cnn_dailymail, {"article": _TEXT, "highlights": _TEXT}),
    # It has to be named, because many other data sets have its columns `text` and `label` too.
    "imdb": Format(sources.imdb),
    # Its columns are those of pairs, but what is in them is a benchmark's.
    "reward_bench": Format(sources.reward_bench),
    "alpaca": Format(formats.alpaca, {"instruction": _TEXT, "output": _TEXT}),
    # A label of any type is taken for a label, so that a wrong one is refused, not ignored.
    "unpaired": Format(formats.unpaired, {"prompt": _TALK, "completion": _TURN, "label": _ANY}),
    "hh": Format(sources.hh),
    "ultrafeedback": Format(sources.ultrafeedback),
    "implicit": Format(formats.implicit, _PAIR),
    "sft": Format(formats.sft, {"prompt": _TALK, "completion": _TURN}),
    "messages": Format(formats.conversation, {"messages": list}),
    "responses": Format(formats.responses, {"prompt": _TALK, "responses": list}),
    "prompts": Format(formats.prompts, {"prompt": _TALK}),
    "text": Format(formats.text, {"text": _TEXT}),
}


def read_examples(
    path: str, format: str = "auto", *, subset: str = "", split: str = "train", **options: Any
) -> tuple[list[Example], Counter[str]]:
    """Reads all examples of a source.

    Args:
      path: see `read_records`.
      format: a name in `FORMATS`, or "auto".
      subset: folder of a hub data set.
      split: split of a hub data set.
      **options: see `parse`.

    Returns:
      The examples in order, and what was dropped, by reason.

    Raises:
      UserError: naming the file, the line and what is wrong.
    """
    found, records = open_source(path, format, subset=subset, split=split)
    return parse(records, found, path, detected=format == "auto", **options)


def open_source(path: str, format: str, *, subset: str, split: str) -> tuple[str, Iterator[Record]]:
    """The format of a source, detected from its first records if it is "auto", and its records.

    Raises:
      UserError: the source is empty or cannot be read, or no format has its columns.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(one_of("the format", format, ("auto", *FORMATS)))
    records = read_records(path, subset=subset, split=split)
    first = list(islice(records, _LOOKED_AT))
    if not first:
        raise UserError(f"{path}: holds no usable record (it is empty).")
    if format != "auto":
        return format, chain(first, records)
    # A column may be null or absent in the first records. A column of nothing but nulls counts as
    # absent.
    seen = {name: value for record, _ in reversed(first) for name, value in _given(record).items()}
    return detect(seen, first[0][1]), chain(first, records)


def _given(record: Mapping) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def detect(record: Mapping, where: str) -> str:
    """The format of a record, by its columns.

    Raises:
      UserError: no format has these columns.
    """
    given = _given(record)
    known = {name: format.columns for name, format in FORMATS.items() if format.columns}
    present = [name for name, columns in known.items() if given.keys() >= columns.keys()]
    first = next(iter(present), None)

    def fits(name: str) -> bool:
        # If the first format's columns are present but have values of other types, a format with
        # only some of these columns would ignore the others. The first format refuses them.
        part = first is not None and known[name].keys() < known[first].keys()
        return not part and all(isinstance(given[c], kind) for c, kind in known[name].items())

    found = next(filter(fits, present), first)
    # A text with a label is no plain text, and nothing says what the label means.
    if found is None or (found == "text" and "label" in given):
        columns = "\n".join(f"  {name}: {', '.join(needed)}" for name, needed in known.items())
        raise UserError(
            f"{where}: no format has the columns {', '.join(sorted(map(repr, given)))}. Known "
            f"are\n{columns}\nRename the columns, or name a format with --config.data.format."
        )
    # What was sampled may have the columns of the data that its prompts came from.
    if found != "ranked" and given.keys() >= _SAMPLED:
        return "responses"
    chosen = record.get("chosen")
    # Some data sets have whole conversations, and beside them their first message as `prompt`.
    if found == "explicit" and isinstance(record["prompt"], str) and isinstance(chosen, list):
        found = "implicit"
    if found == "implicit" and isinstance(chosen, list) and given.keys() >= _RATED:
        return "ultrafeedback"
    if found == "implicit" and isinstance(chosen, str) and sources.ASSISTANT_TURN in chosen:
        return "hh"
    return found


def parse(
    records: Iterable[Record],
    format: str,
    path: str = "",
    *,
    on_divergent: str = "error",
    on_empty: str = "error",
    on_assistant_prompt: str = "error",
    turns: str = "all",
    min_score_ratio: float = 2.0,
    limit: int = 0,
    detected: bool = False,
    keep_records: bool = False,
) -> tuple[list[Example], Counter[str]]:
    """Reads examples from records.

    Args:
      records: with their places.
      format: a name in `FORMATS`.
      path: of the source, for messages.
      on_divergent: "error", or "skip" to drop and count records whose dialogues have no
        common prompt.
      on_empty: "error", or "skip" to drop and count records with an empty response.
      on_assistant_prompt: what becomes of a record in which a message of the assistant follows
        another one. "error" refuses it, "continue" takes the message for the rest of the same
        turn, "skip" drops the record and counts it.
      turns: "all" for all turns of the assistant that follow the prompt; "last" for the last
        one alone, with the others as a part of the prompt.
      min_score_ratio: SHP's pairs whose scores have a lower ratio are left out.
      limit: how many examples are kept, the first ones; the records after them are counted. 0
        keeps all.
      detected: whether the format was detected by the columns; error messages then say so.
      keep_records: whether each example keeps all columns of its record.

    Returns:
      The examples in order, and what was dropped, by reason.

    Raises:
      UserError: naming the file, the line and what is wrong.
    """
    parse_record = FORMATS[format].parse
    if format == "shp":
        parse_record = partial(sources.shp, min_score_ratio=min_score_ratio)
    policies = {
        "divergent_prompt": on_divergent,
        "empty_response": on_empty,
        "assistant_prompt": on_assistant_prompt,
    }
    dropped: Counter[str] = Counter()
    examples: list[Example] = []
    for record, where in records:
        if limit and len(examples) == limit:
            dropped["over_limit"] += 1
            continue
        try:
            example = parse_record(record, where)
            example = last_turn(example) if turns == "last" else example
            if on_assistant_prompt != "continue":
                _check_turns(example)
            examples.append(replace(example, record=record) if keep_records else example)
        except SkippableError as error:
            if policies[error.reason] != "skip":
                raise
            dropped[error.reason] += 1
        except RecursionError as error:
            raise UserError(f"{where}: is nested too deeply to be read.") from error
        except Excluded as excluded:
            dropped[excluded.reason] += 1
        except UserError as error:
            if not detected:
                raise
            kinds = (f"{name!r} ({type(value).__name__})" for name, value in record.items())
            raise UserError(
                f"{error} The record has {', '.join(kinds)}. It is read as format {format!r}, "
                "which the columns of the first records tell; name another one with "
                "--config.data.format if it is not."
            ) from error
    if not examples:
        raise UserError(f"{path}: holds no usable record ({dict(dropped) or 'it is empty'}).")
    return examples, dropped


def _check_turns(example: Example) -> None:
    """Refuses a message of the assistant that follows another one."""
    if not isinstance(example.prompt, Chat):
        return
    before = [message["role"] for message in example.prompt.messages[-1:]]
    # Where responses are still to be sampled, the assistant's message is still to come.
    for response in example.responses or ({"role": "assistant"},):
        roles = [*before, *(message["role"] for message in messages_of(response))]
        if any(one == other == "assistant" for one, other in pairwise(roles)):
            raise AssistantPromptError(
                f"{example.where}: a response follows a message of the assistant, which a chat "
                "template would end, and give it a second turn. Let it continue that message with "
                "--config.data.on_assistant_prompt=continue, or skip such rows with =skip."
            )
