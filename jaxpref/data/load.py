"""The config's data, tokenised: what to train on and what to hold out."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxpref import config as config_lib, processes
from jaxpref.data import cache, synthetic
from jaxpref.data.convert import adapt, to_prompt
from jaxpref.data.dataset import TokenizedDataset, deduplicate, mismatch
from jaxpref.data.examples import Example, hold_out, last_turn
from jaxpref.data.read import open_source, parse, read_examples
from jaxpref.data.records import check_source
from jaxpref.data.tokenize import Limits, tokenize
from jaxpref.errors import UserError
from jaxpref.tokenizer import begins_with_bos


class Data(NamedTuple):
    """Tokenised data and what became of the records.

    Attributes:
      train: the examples to train on.
      held_out: the examples to evaluate on; None if there are none.
      counts: how many examples each side has, and how many were dropped or cut, by reason.
      weights: the share of each source in training, by name; empty unless several are mixed.
      notes: sentences about the reading, for the log.
      fingerprints: digests of what is trained on and of all that is held out, under the names
        that a run's identity has for them.
      prompts: the held-out prompts that a method on data answers at evaluations; None if it
        answers none.
    """

    train: TokenizedDataset
    held_out: TokenizedDataset | None
    counts: dict[str, int]
    weights: Mapping[str, float] = {}
    notes: Sequence[str] = ()
    fingerprints: Mapping[str, str] = {}
    prompts: TokenizedDataset | None = None


def check(config: ConfigDict) -> None:
    """Refuses missing files before anything is computed."""
    for source in config_lib.sources(config):
        key = "data.mixture" if config.data.mixture else "data.path"
        check_source(source["path"], key, subset=source["subset"], split=source["split"])
    held_out = config_lib.held_out_source(config)
    if held_out:
        key = "data.eval_path" if config.data.eval_path else "data.path"
        check_source(held_out["path"], key, subset=held_out["subset"], split=held_out["split"])


def check_batch_size(config: ConfigDict, data: Data) -> None:
    """Refuses a batch size with which one step would take an example more than once."""
    size, examples = config.data.batch_size, len(data.train)
    if size > examples:
        raise UserError(
            f"data.batch_size is {size}, but there are {examples} examples to train on, so that "
            "one step would take them more than once. Lower data.batch_size, or give more data."
        )


def load(
    config: ConfigDict,
    tokenizer: Any,
    kind: str,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Data:
    """Reads, converts, splits and tokenises; or reads what an earlier run kept in data.cache.

    Where several processes train, the first one keeps it there, and the others read that.

    Args:
      config: a checked config.
      tokenizer: a `transformers` tokenizer.
      kind: what the algorithm needs of an example, a name in `convert.KINDS`.
      progress: called with the number of training examples tokenised so far.

    Raises:
      UserError: see `open_source`, `parse`, `adapt` and `tokenize`.
    """
    weights = _weights(config)
    # The cache has token ids alone; rewards of what is sampled look at the texts, too.
    cached = config.data.cache and kind != "prompts"
    folder = cache.folder(config, tokenizer, kind) if cached else None

    def act() -> Data:
        return _load(config, tokenizer, kind, progress, weights, folder)

    return act() if folder is None else processes.after_first(act)


def _load(
    config: ConfigDict,
    tokenizer: Any,
    kind: str,
    progress: Callable[[int], None],
    weights: Mapping[str, float],
    folder: Path | None,
) -> Data:
    if folder is not None and (kept := cache.read(folder)) is not None:
        data = Data(*kept, weights, [f"tokenised data reused from {folder}"])
        if config.eval.win_rate_prompts and data.held_out is not None:
            # The cache has no texts, so these prompts are read again.
            _, examples = _Reading(config, kind).sides()
            data = _with_prompts(config, tokenizer, data, examples)
        return _finished(config, data)

    reading = _Reading(config, kind)
    sides = reading.sides()
    train, held_out = (
        _tokenized(config, tokenizer, kind, examples, say)
        for examples, say in zip(sides, (progress, lambda done: None), strict=True)
    )
    cut = train.counts + held_out.counts
    counts = {
        "train_examples": len(train),
        "held_out_examples": len(held_out),
        **reading.counts,
        **{reason: cut[reason] for reason in [*train.counts, *held_out.counts]},
    }
    missing = [name for name in weights if name not in train.sources]
    if not len(train) or missing:
        hint = (
            f" Lower data.eval_fraction ({config.data.eval_fraction}) or name a held-out file in "
            "data.eval_path."
            if len(held_out) and not missing
            else ""
        )
        raise UserError(
            f"no example is left to train on{f' of the source {missing[0]!r}' if missing else ''}: "
            f"{counts}.{hint}"
        )
    data = Data(train, held_out if len(held_out) else None, counts)
    if folder is not None:
        cache.write(folder, *data[:3])
        reading.notes.append(f"tokenised data kept in {folder}")
    data = data._replace(weights=weights, notes=reading.notes)
    if config.eval.win_rate_prompts and data.held_out is not None and kind != "prompts":
        data = _with_prompts(config, tokenizer, data, sides[1])
    return _finished(config, data)


def _with_prompts(
    config: ConfigDict, tokenizer: Any, data: Data, held_out: Sequence[Example]
) -> Data:
    """The data with the first `eval.win_rate_prompts` of the held-out prompts, each once.

    They are tokenised as those of a method that samples: without their responses.

    Raises:
      UserError: an example has no prompt, or see `tokenize`.
    """
    asked = f"eval.win_rate_prompts is {config.eval.win_rate_prompts}"
    bare = next((example for example in held_out if example.prompt is None), None)
    if bare is not None:
        raise UserError(
            f"{asked}, but {bare.where} is plain text, which has no prompt to answer; leave it at "
            "0, or hold out data with prompts (data.eval_path)."
        )
    first: dict[str, Example] = {}
    for example in map(to_prompt, held_out):
        first.setdefault(str(example.prompt), example)
        if len(first) == config.eval.win_rate_prompts:
            break
    try:
        prompts = _tokenized(config, tokenizer, "prompts", list(first.values()), lambda done: None)
    except UserError as error:
        raise UserError(f"{asked}, and one of these prompts cannot be used: {error}") from error
    counts = {
        "win_rate_prompts": len(prompts),
        **{f"win_rate_{name}": count for name, count in prompts.counts.items() if count},
    }
    return data._replace(prompts=prompts, counts={**data.counts, **counts})


def _finished(config: ConfigDict, data: Data) -> Data:
    """The data with its fingerprints, and with at most `eval.max_examples` held out."""
    sides = (data.train, data.held_out)
    prints = ("" if side is None else side.fingerprint() for side in sides)
    notes = list(data.notes)
    asked = config.data.eval_fraction > 0 or config_lib.held_out_source(config)
    if asked and data.held_out is None:
        notes.append(
            f"no example is held out (data.eval_fraction={config.data.eval_fraction:g}, "
            f"data.eval_path={config.data.eval_path!r}), so nothing will be evaluated"
        )
    fingerprints = dict(zip(config_lib.FINGERPRINTS, prints, strict=True))
    data = data._replace(notes=notes, fingerprints=fingerprints)
    return _limited(data, config.eval.max_examples)


def _weights(config: ConfigDict) -> dict[str, float]:
    """The shares of the sources; empty if there is only one."""
    sources = config_lib.sources(config)
    return {s["name"]: float(s["weight"]) for s in sources} if len(sources) > 1 else {}


def _limited(data: Data, examples: int) -> Data:
    """The data with only the first held-out examples (0 for all).

    How many held-out prompts are trained on too is counted.
    """
    held_out, counts = data.held_out, dict(data.counts)
    if held_out is None:
        return data
    if 0 < examples < len(held_out):
        unused = len(held_out) - examples
        counts |= {"held_out_examples": examples, "held_out_unused": unused}
        held_out = held_out.take(np.arange(examples))
    both = np.intersect1d(held_out.prompts, data.train.prompts)
    counts["held_out_prompts_trained_on"] = len(both)
    return data._replace(held_out=held_out, counts=counts)


def _tokenized(
    config: ConfigDict,
    tokenizer: Any,
    kind: str,
    examples: Sequence[Example],
    progress: Callable[[int], None],
) -> TokenizedDataset:
    """One side of the data as the algorithm needs it."""
    dataset = tokenize(
        examples,
        tokenizer,
        limits_of(config, tokenizer),
        parse_special_tokens=config.tokenizer.parse_special_tokens,
        processes=config.data.num_proc,
        progress=progress,
    )
    if config.data.deduplicate:
        dataset = deduplicate(dataset)
    if kind == "mismatched" and len(dataset):
        dataset = mismatch(dataset, config.data.max_length)
    return dataset


def load_file(
    config: ConfigDict,
    tokenizer: Any,
    path: str,
    format: str = "auto",
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Example], TokenizedDataset, dict[str, int]]:
    """All examples of a file as they are, and tokenised as a config says.

    Examples with an empty response or without a common prompt are left out.

    Args:
      config: a checked config.
      tokenizer: a `transformers` tokenizer.
      path: see `data.path`.
      format: see `data.format`.
      progress: called with the number of examples tokenised so far.

    Returns:
      The examples in the file's order, each with its record; tokenised; and what was left out or
      cut, by reason.

    Raises:
      UserError: the file cannot be read, or a prompt has no response.
    """
    examples, dropped = read_examples(
        path,
        format,
        on_divergent="skip",
        on_empty="skip",
        on_assistant_prompt=config.data.on_assistant_prompt,
        min_score_ratio=1.0,
        keep_records=True,
    )
    # A reward is given to the last turn of a conversation, so all before that turn is the prompt.
    examples = [last_turn(e) if len(e.responses) == 1 else e for e in examples]
    bare = next((e for e in examples if not e.responses or e.prompt is None), None)
    if bare is not None:
        raise UserError(
            f"{bare.where}: has {'a prompt, but no response' if bare.prompt else 'text alone'}; "
            "columns that hold responses to a prompt are prompt, responses; or prompt, completion; "
            "or prompt, chosen, rejected."
        )
    dataset = tokenize(
        # Margins and labels change no token, and a file may have them for some examples only.
        [dataclasses.replace(example, margin=None, label=None) for example in examples],
        tokenizer,
        limits_of(config, tokenizer),
        parse_special_tokens=config.tokenizer.parse_special_tokens,
        processes=config.data.num_proc,
        progress=progress,
    )
    counts = {f"dropped/{reason}": count for reason, count in dropped.items()}
    return examples, dataset, {**counts, **dataset.counts}


def limits_of(config: ConfigDict, tokenizer: Any) -> Limits:
    """The lengths and special tokens that a config asks for."""
    return Limits(
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        eos=tokenizer.eos_token_id,
        bos=begins_with_bos(tokenizer, config.tokenizer.bos),
        on_long_prompt=config.data.on_long_prompt,
    )


class _Reading:
    """Reads the examples of a config's sources, and counts those that are left out."""

    def __init__(self, config: ConfigDict, kind: str):
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self._config, self._kind = config, kind

    def sides(self) -> tuple[list[Example], list[Example]]:
        """The examples to train on, and those held out."""
        data = self._config.data
        if data.format == "synthetic":
            examples = synthetic.generate(data.synthetic_pairs, self._config.seed)
            return hold_out(self._adapted(examples, "synthetic"), data.eval_fraction)
        sources = config_lib.sources(self._config)
        examples = [example for source in sources for example in self._read(source)]
        held_out_source = config_lib.held_out_source(self._config)
        if held_out_source:
            return examples, self._read(held_out_source)
        train, held_out = hold_out(examples, data.eval_fraction)
        return train, _in_turn(held_out)

    def _read(self, source: Mapping[str, Any]) -> list[Example]:
        data, path = self._config.data, source["path"]
        format, records = open_source(
            path, source["format"], subset=source["subset"], split=source["split"]
        )
        if source["format"] == "auto":
            self.notes.append(f"{path}: read as format {format!r}, by its columns")
        examples, dropped = parse(
            records,
            format,
            path,
            on_divergent=data.on_divergent,
            on_empty=data.on_empty,
            on_assistant_prompt=data.on_assistant_prompt,
            turns=data.turns,
            min_score_ratio=data.min_score_ratio,
            limit=source["limit"],
            detected=source["format"] == "auto",
            keep_records=self._kind == "prompts" or self._config.eval.win_rate_prompts > 0,
        )
        self.counts.update({f"dropped/{reason}": count for reason, count in dropped.items()})
        examples = self._adapted(examples, format)
        if len(config_lib.sources(self._config)) > 1 and source["name"]:
            examples = [dataclasses.replace(e, source=source["name"]) for e in examples]
        return examples

    def _adapted(self, examples: list[Example], format: str) -> list[Example]:
        data = self._config.data
        examples, counts = adapt(
            examples,
            self._kind,
            found=format,
            ranked_pairs=data.ranked_pairs,
            on_tie=data.on_tie,
            on_contradiction=data.on_contradiction,
            on_identical=data.on_identical,
        )
        self.counts.update(counts)
        return examples


def _in_turn(examples: list[Example]) -> list[Example]:
    """The examples with the sources taking turns, so that the first ones are from all sources."""
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    rounds = chain.from_iterable(zip_longest(*by_source.values()))
    return [example for example in rounds if example is not None]
