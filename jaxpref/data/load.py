"""The config's data, tokenised: what to train on and what to hold out."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.data import cache, synthetic
from jaxpref.data.convert import adapt, deduplicate
from jaxpref.data.dataset import TokenizedDataset
from jaxpref.data.examples import Example, hold_out
from jaxpref.data.read import open_source, parse, read_examples
from jaxpref.data.records import check_source
from jaxpref.data.tokenize import Limits, begins_with_bos, tokenize
from jaxpref.errors import UserError


class Data(NamedTuple):
    """Tokenised data and what became of the records.

    Attributes:
      train: to train on.
      held_out: to evaluate on; None if there is nothing.
      counts: examples on each side, and how many were dropped or cut, by reason.
      weights: shares of the sources in training, by name; empty unless several are mixed.
      notes: what the log should say of the reading.
    """

    train: TokenizedDataset
    held_out: TokenizedDataset | None
    counts: dict[str, int]
    weights: Mapping[str, float] = {}
    notes: Sequence[str] = ()


def check(config: ConfigDict) -> None:
    """Refuses missing files before anything is computed."""
    for source in config_lib.sources(config):
        key = "data.mixture" if config.data.mixture else "data.path"
        check_source(source["path"], key, subset=source["subset"], split=source["split"])
    if config.data.eval_path:
        split = config.data.eval_split or config.data.split
        check_source(
            config.data.eval_path, "data.eval_path", subset=config.data.subset, split=split
        )


def load(
    config: ConfigDict,
    tokenizer: Any,
    kind: str,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Data:
    """Reads, converts, splits and tokenises; or takes what an earlier run left in data.cache.

    Args:
      config: a checked config.
      tokenizer: a `transformers` tokenizer.
      kind: what the algorithm needs of an example, a name in `convert.KINDS`.
      progress: called with the number of training examples tokenised so far.

    Raises:
      UserError: see `open_source`, `parse`, `adapt` and `tokenize`.
    """
    sources = config_lib.sources(config)
    weights = {s["name"]: float(s["weight"]) for s in sources} if len(sources) > 1 else {}
    folder = cache.folder(config, tokenizer, kind) if config.data.cache else None
    if folder is not None and (kept := cache.read(folder)) is not None:
        train_set, held_out_set, counts = kept
        notes = [f"tokenised data reused from {folder}"]
        return Data(train_set, held_out_set, counts, weights, notes)

    reading = _Reading(config, kind)
    train, held_out = reading.sides()
    if not train:
        raise UserError(
            f"all {len(held_out)} examples fell on the held-out side; lower data.eval_fraction "
            f"({config.data.eval_fraction}) or name a held-out file in data.eval_path."
        )
    if config.eval.max_examples:
        held_out = held_out[: config.eval.max_examples]
    limits = _limits(config, tokenizer)

    def tokenized(examples: list[Example], progress: Callable[[int], None]) -> TokenizedDataset:
        return tokenize(
            examples,
            tokenizer,
            limits,
            parse_special_tokens=config.tokenizer.parse_special_tokens,
            processes=config.data.num_proc,
            progress=progress,
        )

    train_set = tokenized(train, progress)
    held_out_set = tokenized(held_out, lambda done: None) if held_out else None
    cut = train_set.counts + (held_out_set.counts if held_out_set else Counter())
    missing = [name for name in weights if name not in train_set.sources]
    if not len(train_set) or missing:
        raise UserError(
            f"no example is left to train on{f' of the source {missing[0]!r}' if missing else ''}: "
            f"{dict(reading.counts + cut)}."
        )
    counts = {
        "train_examples": len(train_set),
        "held_out_examples": len(held_out_set) if held_out_set else 0,
        **reading.counts,
        **{reason: cut[reason] for reason in [*train_set.counts, *cut]},
    }
    if held_out_set is not None and not len(held_out_set):
        held_out_set = None
    if folder is not None:
        cache.write(folder, train_set, held_out_set, counts)
        reading.notes.append(f"tokenised data kept in {folder}")
    return Data(train_set, held_out_set, counts, weights, reading.notes)


def load_file(
    config: ConfigDict, tokenizer: Any, path: str, format: str = "auto"
) -> tuple[list[Example], TokenizedDataset, dict[str, int]]:
    """All examples of a file as they are, and tokenised as a config says.

    Those with an empty response or without a common prompt are left out.

    Args:
      config: a checked config.
      tokenizer: a `transformers` tokenizer.
      path: see `data.path`.
      format: see `data.format`.

    Returns:
      The examples in the file's order; tokenised; and what was left out or cut, by reason.

    Raises:
      UserError: the file cannot be read, or a prompt has no response.
    """
    examples, dropped = read_examples(
        path, format, on_divergent="skip", on_empty="skip", min_score_ratio=1.0
    )
    bare = next((example for example in examples if not example.responses), None)
    if bare is not None:
        raise UserError(f"{bare.where}: has a prompt, but no response.")
    parse_special_tokens = config.tokenizer.parse_special_tokens
    limits = _limits(config, tokenizer)
    dataset = tokenize(examples, tokenizer, limits, parse_special_tokens=parse_special_tokens)
    counts = {f"dropped/{reason}": count for reason, count in dropped.items()}
    return examples, dataset, {**counts, **dataset.counts}


def _limits(config: ConfigDict, tokenizer: Any) -> Limits:
    return Limits(
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        eos=tokenizer.eos_token_id,
        bos=begins_with_bos(tokenizer, config.tokenizer.bos),
        on_long_prompt=config.data.on_long_prompt,
    )


class _Reading:
    """The examples of a config's sources, and what became of the others."""

    def __init__(self, config: ConfigDict, kind: str):
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self._config, self._kind = config, kind

    def sides(self) -> tuple[list[Example], list[Example]]:
        """The examples to train on, and those held out."""
        data = self._config.data
        if data.format == "synthetic":
            examples = synthetic.generate(data.synthetic_pairs, self._config.seed)
            examples = self._adapted(examples, "synthetic")
            return hold_out(self._distinct(examples), data.eval_fraction)
        sources = config_lib.sources(self._config)
        examples = [example for source in sources for example in self._read(source)]
        examples = self._distinct(examples)
        if data.eval_path or data.eval_split:
            held_out = self._read(
                {
                    "path": data.eval_path or data.path,
                    "format": data.format,
                    "subset": data.subset,
                    "split": data.eval_split or data.split,
                    "limit": 0,
                    "name": "",
                }
            )
            held_out = self._distinct(held_out)
            trained_on = {str(example.prompt) for example in examples}
            both = sum(str(example.prompt) in trained_on for example in held_out)
            self.counts["held_out_prompts_trained_on"] = both
            return examples, held_out
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
            min_score_ratio=data.min_score_ratio,
            limit=source["limit"],
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
            on_identical=data.on_identical,
        )
        self.counts.update(counts)
        return examples

    def _distinct(self, examples: list[Example]) -> list[Example]:
        if self._config.data.deduplicate:
            examples, repeated = deduplicate(examples)
            self.counts["dropped/duplicate"] += repeated
        return examples


def _in_turn(examples: list[Example]) -> list[Example]:
    """One example of each source after the other, so that the first ones are of all."""
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    rounds = chain.from_iterable(zip_longest(*by_source.values()))
    return [example for example in rounds if example is not None]
