"""The config's data, tokenised: what to train on and what to hold out."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref.data import synthetic
from jaxpref.data.convert import adapt
from jaxpref.data.examples import Example, hold_out, read_examples
from jaxpref.data.records import check_source
from jaxpref.data.tokenize import Limits, TokenizedDataset, begins_with_bos, tokenize
from jaxpref.errors import UserError


class Data(NamedTuple):
    """Tokenised data and what became of the records.

    Attributes:
      train: to train on.
      held_out: to evaluate on; None if there is nothing.
      counts: examples on each side, and how many were dropped or cut, by reason.
    """

    train: TokenizedDataset
    held_out: TokenizedDataset | None
    counts: dict[str, int]


def check(config: ConfigDict) -> None:
    """Refuses missing files before anything is computed."""
    for key in ("path", "eval_path"):
        if config.data[key]:
            check_source(config.data[key], f"data.{key}")


def load(
    config: ConfigDict,
    tokenizer: Any,
    kind: str,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Data:
    """Reads, splits and tokenises.

    Args:
      config: a checked config.
      tokenizer: a `transformers` tokenizer.
      kind: what the algorithm needs of an example, a name in `convert.KINDS`.
      progress: called with the number of training examples tokenised so far.

    Raises:
      UserError: see `read_examples`, `adapt` and `tokenize`.
    """
    train, held_out, dropped = _examples(config)
    if not train:
        raise UserError(
            f"all {len(held_out)} examples fell on the held-out side; lower data.eval_fraction "
            f"({config.data.eval_fraction}) or name a held-out file in data.eval_path."
        )
    if config.eval.max_examples:
        held_out = held_out[: config.eval.max_examples]
    limits = Limits(
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        eos=tokenizer.eos_token_id,
        bos=begins_with_bos(tokenizer, config.tokenizer.bos),
        may_cut_prompts=config.data.on_long_prompt == "truncate",
    )

    def tokenized(examples: list[Example], progress: Callable[[int], None]) -> TokenizedDataset:
        adapted, converted = adapt(examples, kind, found=config.data.format)
        counts.update(converted)
        return tokenize(
            adapted,
            tokenizer,
            limits,
            parse_special_tokens=config.tokenizer.parse_special_tokens,
            progress=progress,
        )

    counts: Counter[str] = Counter()
    train_set = tokenized(train, progress)
    held_out_set = tokenized(held_out, lambda done: None) if held_out else None
    cut = train_set.counts + (held_out_set.counts if held_out_set else Counter())
    return Data(
        train_set,
        held_out_set,
        {
            "train_examples": len(train_set),
            "held_out_examples": len(held_out_set) if held_out_set else 0,
            **{f"dropped/{reason}": count for reason, count in dropped.items()},
            **counts,
            **{reason: cut[reason] for reason in train_set.counts},
        },
    )


def _examples(config: ConfigDict) -> tuple[list[Example], list[Example], Counter[str]]:
    data = config.data
    if data.format == "synthetic":
        examples = synthetic.generate(data.synthetic_pairs, config.seed)
        return *hold_out(examples, data.eval_fraction), Counter()

    def read(path: str, split: str) -> tuple[list[Example], Counter[str]]:
        return read_examples(
            path,
            data.format,
            subset=data.subset,
            split=split,
            on_divergent=data.on_divergent,
            on_empty=data.on_empty,
        )

    examples, dropped = read(data.path, data.split)
    if not (data.eval_path or data.eval_split):
        return *hold_out(examples, data.eval_fraction), dropped
    held_out, dropped_held_out = read(data.eval_path or data.path, data.eval_split or data.split)
    return examples, held_out, dropped + dropped_held_out
