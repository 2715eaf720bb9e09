"""What the model will see of a recipe's data: `python -m jaxpref.data.inspect --config=RECIPE`.

The command prints a few examples with their special tokens: what truncation takes away, what is
seen but not scored, and what else the method reads (labels, margins, scores). Then it prints
lengths, how many tokens sharing prompts saves, how full rows are, and what was dropped and why;
and it draws a histogram of lengths. It reads what a run of the recipe would read, and trains
nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.commands import OUTPUT, fail, quiet
from jaxpref.errors import UserError
from jaxpref.recipes import CONFIG, parse_flags
from jaxpref.workdir import as_folder

# --help shows these two as well.
flags.declare_key_flag("config")
flags.declare_key_flag("output")
_EXAMPLES = flags.DEFINE_integer("examples", 3, "How many are shown whole.", lower_bound=0)
# How many batches are packed to see how full the rows are.
_BATCHES = 20


def main(argv: list[str]) -> None:
    """Hands the config to `run`."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --config=RECIPE.")
    if CONFIG.value is None:
        fail("--config is missing: a recipe, see configs/.")
    quiet()
    try:
        run(CONFIG.value, OUTPUT.value or "lengths.png", _EXAMPLES.value)
    except UserError as error:
        fail(str(error))


def run(config: ConfigDict, output: str | Path, examples: int = 3) -> None:
    """Prints what the model will see, and draws the lengths.

    Args:
      config: from a recipe.
      output: the PNG to write.
      examples: how many are shown whole.

    Raises:
      UserError: as for a run of the recipe.
    """
    config_lib.check(config)
    # JAX loads here, so that a mistake above is told at once.
    from jaxpref import data as data_lib, sharding, weights
    from jaxpref.data import statistics
    from jaxpref.terminal import console, progress

    drawn = as_folder(output, "--output")
    if not drawn.absolute().parent.is_dir():
        raise UserError(f"--output={output}: the directory {drawn.parent} does not exist.")
    data_lib.check(config)
    tokenizer = weights.open_run(config, Path(".")).tokenizer
    method = config_lib.method_of(config.algorithm.name)
    kind = config_lib.data_kind(config)
    with progress("tokenising", "examples") as tell:
        data = data_lib.load(config, tokenizer, kind, progress=tell)
    data_lib.check_batch_size(config, data)
    read = {name: data.train.extras[name] for name in method.reads if name in data.train.extras}
    for index in range(min(examples, len(data.train))):
        console.rule(f"example {index + 1}", align="left")
        group, (prompt, *uncut) = data.train.group(index), data.train.uncut_lengths(index)
        console.print(_marked("prompt", group.prompt, prompt, tokenizer, at_end=False))
        context = group.context or [np.zeros(len(ids), bool) for ids in group.responses]
        for k, ids in enumerate(group.responses):
            label = _label(k, kind)
            console.print(_marked(label, ids, uncut[k], tokenizer, at_end=True, context=context[k]))
        for name, values in read.items():
            console.print(f"{name}: {_shown(name, values[index], len(group.responses))}")
    console.rule("all", align="left")
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in data.counts.items())
    console.print("\n".join([*data.notes, f"data: {counts}"]))
    borrowed = kind == "mismatched"
    found = statistics.describe(data.train, borrowed=borrowed)
    heads = "".join(f"{'max' if p == 100 else f'{p}%':>8}" for p in statistics.PERCENTILES)
    console.print(f"{'tokens':<20}{heads}")
    for part, values in found.lengths.items():
        console.print(f"{part:<20}" + "".join(f"{value:>8,}" for value in values))
    for name, values in read.items():
        console.print(_summary(name, values, data.train.response_lengths > 0))
    unread = sorted(set(data.train.extras) - set(read))
    if unread:
        console.print(f"in the data, but not read by {config.algorithm.name}: {', '.join(unread)}")
    mesh = sharding.make_mesh(**config.mesh)
    stream = data_lib.stream_of(config, data, "train", mesh, training=True)
    batches = (stream.batch(step) for step in range(_BATCHES))
    rows = statistics.fill(batches)
    console.print(f"sharing prompts saves {found.shared:.1%} of the tokens")
    console.print(
        f"rows of {stream.budget.row_length} tokens: {rows.tokens:.1%} full, their scored places "
        f"{rows.scored:.1%}; {min(rows.rows)} to {max(rows.rows)} rows a step of "
        f"{config.data.batch_size}"
    )
    if found.longer is not None:
        console.print(
            f"the chosen response is the longer one in {found.longer:.1%} of the pairs, before "
            "any is cut"
        )
    console.print(
        f"{found.same_prompt:,} examples share their prompt with another; {found.repeated:,} are "
        "exactly like an earlier one"
    )
    title = f"{len(data.train):,} examples"
    statistics.plot_lengths(data.train, drawn, title, borrowed=borrowed)
    console.print(f"lengths drawn in {output}")


def _marked(
    label: str,
    kept: Int[np.ndarray, " tokens"],
    uncut: int,
    tokenizer: Any,
    *,
    at_end: bool,
    context: Bool[np.ndarray, " tokens"] | None = None,
) -> str:
    """A piece's text with its special tokens, marked where it is not scored or was cut.

    Args:
      label: what to call the piece.
      kept: its token ids.
      uncut: how many tokens it had before it was cut.
      tokenizer: a `transformers` tokenizer.
      at_end: whether a cut takes the end of the piece; else it takes the beginning.
      context: which tokens are seen but not scored; None if all are scored.
    """
    seen = np.zeros(len(kept), bool) if context is None else context
    runs = np.split(np.arange(len(kept)), np.flatnonzero(np.diff(seen)) + 1)
    texts = [
        f"[seen, not scored: {text!r}]" if seen[run[0]] else repr(text)
        for run in runs
        if len(run)
        for text in [tokenizer.decode(kept[run], skip_special_tokens=False)]
    ]
    missing = uncut - len(kept)
    note = [f"[... {missing} tokens cut ...]"] if missing else []
    scored = f", {int((~seen).sum())} scored" if seen.any() else ""
    pieces = [*texts, *note] if at_end else [*note, *texts]
    return f"{label} ({len(kept)} tokens{scored}): {' '.join(pieces)}"


def _shown(name: str, value: Any, responses: int) -> str:
    """The value, in words, of one thing that the method reads of an example."""
    if name == "labels":
        return "good" if value else "not good"
    return ", ".join(f"{one:g}" for one in np.ravel(value)[:responses])


def _summary(
    name: str,
    values: Float[np.ndarray, "examples ..."],
    present: Bool[np.ndarray, "examples responses"],
) -> str:
    """The values, in words, of one thing that the method reads of all examples."""
    if name == "labels":
        return f"labels: {int(values.sum()):,} good, {int((1 - values).sum()):,} not good"
    low, middle, high = np.percentile(values[present] if values.ndim > 1 else values, (0, 50, 100))
    return f"{name}: {low:g} to {high:g}, half of them up to {middle:g}"


def _label(k: int, kind: str) -> str:
    names = {
        "pairs": ("chosen", "rejected"),
        "mismatched": ("response", "of another prompt"),
    }.get(kind, ("response",))
    return names[k] if k < len(names) else f"response {k + 1}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
