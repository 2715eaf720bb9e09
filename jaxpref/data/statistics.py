"""Figures that describe a tokenised data set: lengths, repetitions, how full the rows are."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpref.data.dataset import TokenizedDataset
from jaxpref.packing import PackedBatch

PERCENTILES = (5, 25, 50, 75, 95, 100)


class Statistics(NamedTuple):
    """Figures of a data set.

    Attributes:
      lengths: percentiles (`PERCENTILES`) of the numbers of tokens by part: prompt, response
        (or chosen and rejected), prompt plus response; and the scored tokens of a response, if
        not all are scored.
      shared: the share of all tokens that is saved by computing each prompt once.
      longer: the share of pairs whose chosen response is the longer one before truncation,
        equal lengths counting one half; None without pairs.
      same_prompt: how many examples have a prompt that another example has too.
      repeated: how many examples are exactly like an earlier one.
    """

    lengths: dict[str, Int[np.ndarray, " percentiles"]]
    shared: float
    longer: float | None
    same_prompt: int
    repeated: int


def describe(dataset: TokenizedDataset, *, borrowed: bool = False) -> Statistics:
    """The figures of a data set, after truncation.

    Args:
      dataset: the examples.
      borrowed: whether each example's second response is another example's
        (`dataset.mismatch`), and is left out.
    """
    prompts, responses = dataset.prompt_lengths, _own_lengths(dataset, borrowed)
    present = responses > 0
    parts = {"prompt": prompts}
    pairs = responses.shape[1] == 2 and bool(present.all()) and "labels" not in dataset.extras
    if pairs:
        parts |= {"chosen": responses[:, 0], "rejected": responses[:, 1]}
    else:
        parts["response"] = responses[present]
    parts["prompt + response"] = (prompts[:, None] + responses)[present]
    if dataset.context is not None:
        parts["scored"] = dataset.scored_lengths[:, : present.shape[1]][present]
    together = int(prompts.sum() + responses.sum())
    apart = int((prompts * present.sum(1)).sum() + responses.sum())
    own = 1 if borrowed else None
    seen = {dataset.whole(index, own) for index in range(len(dataset))}
    _, by_prompt = np.unique(dataset.prompts, return_counts=True)
    uncut = dataset.of_responses(dataset.uncut) if pairs else None
    margin = None if uncut is None else np.sign(uncut[:, 0] - uncut[:, 1])
    return Statistics(
        {
            name: np.percentile(values, PERCENTILES).astype(int) if len(values) else values
            for name, values in parts.items()
        },
        1 - together / max(apart, 1),
        None if margin is None else float(((1 + margin) / 2).mean()),
        int(by_prompt[by_prompt > 1].sum()),
        len(dataset) - len(seen),
    )


class Fill(NamedTuple):
    """How full the batches are.

    Attributes:
      rows: from a number of rows to how many batches have so many rows.
      tokens: the share of the rows' places that hold a token.
      scored: the share of the scored table that is used.
    """

    rows: dict[int, int]
    tokens: float
    scored: float


def fill(batches: Iterable[PackedBatch]) -> Fill:
    """How full some batches are; micro-batches without any response are not computed."""
    rows: dict[int, int] = {}
    used, places, scored, table = 0, 0, 0, 0
    for batch in batches:
        held = (np.asarray(batch.lengths) > 0).any(axis=(1, 2))
        group, target = np.asarray(batch.group)[held], np.asarray(batch.target)[held]
        number = len(group) * group.shape[1]
        rows[number] = rows.get(number, 0) + 1
        used, places = used + int((group > 0).sum()), places + group.size
        scored, table = scored + int(np.sum(batch.lengths)), table + target.size
    return Fill(rows, used / max(places, 1), scored / max(table, 1))


def _own_lengths(
    dataset: TokenizedDataset, borrowed: bool
) -> Int[np.ndarray, "examples responses"]:
    """Tokens of each response of each example, without borrowed ones."""
    lengths = dataset.response_lengths
    return lengths[:, :1] if borrowed else lengths


def plot_lengths(
    dataset: TokenizedDataset, path: Path, title: str, *, borrowed: bool = False
) -> None:
    """Draws a histogram of the tokens of prompts and of responses.

    Args:
      dataset: after truncation.
      path: the PNG to write.
      title: of the figure.
      borrowed: see `describe`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    prompts, responses = dataset.prompt_lengths, _own_lengths(dataset, borrowed)
    whole = (prompts[:, None] + responses)[responses > 0]
    parts = {"prompt": prompts, "response": responses[responses > 0], "prompt + response": whole}
    longest = max(int(values.max(initial=1)) for values in parts.values())
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, values in parts.items():
        axis.hist(values, 40, range=(0, longest), histtype="step", linewidth=1.4, label=name)
    axis.set_xlabel("tokens")
    axis.set_ylabel("how many")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
