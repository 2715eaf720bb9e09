"""What the model will see of a recipe's data: `python -m jaxpref.data.inspect --config=RECIPE`.

Prints a few examples with their special tokens and with what truncation takes away, then
lengths, what sharing prompts saves, how full rows are, and what was dropped and why; draws a
histogram of lengths. It reads what a run of the recipe would read, and trains nothing.
"""

from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.commands import OUTPUT, fail, quiet
from jaxpref.errors import UserError
from jaxpref.main import CONFIG, parse_flags

_EXAMPLES = flags.DEFINE_integer("examples", 3, "How many are shown whole.", lower_bound=0)
# Batches whose rows are looked at.
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
    from jaxpref import algorithms, data as data_lib, train, weights
    from jaxpref.data import statistics
    from jaxpref.metrics import console, progress

    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output={output}: the directory {Path(output).parent} does not exist.")
    data_lib.check(config)
    source = weights.find(config, Path("."))
    name = config.tokenizer.name
    tokenizer = data_lib.load_tokenizer(
        source.tokenizer if name == "auto" else name, config.tokenizer.chat_template
    )
    kind = algorithms.build(config, weights.build_model(config, source, len(tokenizer))).kind
    with progress("tokenising", "examples") as tell:
        data = data_lib.load(config, tokenizer, kind, progress=tell)
    data_lib.check_batch_size(config, data)
    for index in range(min(examples, len(data.train))):
        console.rule(f"example {index + 1}", align="left")
        group, (prompt, *responses) = data.train.group(index), data.train.uncut_lengths(index)
        console.print(_marked("prompt", group.prompt, prompt, tokenizer, at_end=False))
        for k, (response, length) in enumerate(zip(group.responses, responses, strict=True)):
            console.print(_marked(_label(k, kind), response, length, tokenizer, at_end=True))
    console.rule("all", align="left")
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in data.counts.items())
    console.print("\n".join([*data.notes, f"data: {counts}"]))
    borrowed = kind == "mismatched"
    found = statistics.describe(data.train, borrowed=borrowed)
    heads = "".join(f"{'max' if p == 100 else f'{p}%':>8}" for p in statistics.PERCENTILES)
    console.print(f"{'tokens':<20}{heads}")
    for part, values in found.lengths.items():
        console.print(f"{part:<20}" + "".join(f"{value:>8,}" for value in values))
    stream = train.train_stream(config, data)
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
    statistics.plot_lengths(data.train, Path(output), title, borrowed=borrowed)
    console.print(f"lengths drawn in {output}")


def _marked(label: str, kept: Any, uncut: int, tokenizer: Any, *, at_end: bool) -> str:
    """A piece's text with its special tokens, and how much of it is cut."""
    missing = uncut - len(kept)
    note = f" [... {missing} tokens cut ...] " if missing else ""
    text = tokenizer.decode(kept, skip_special_tokens=False)
    text = text + note if at_end else note + text
    return f"{label} ({len(kept)} tokens): {text!r}"


def _label(k: int, kind: str) -> str:
    names = {
        "pairs": ("chosen", "rejected"),
        "mismatched": ("response", "of another prompt"),
    }.get(kind, ("response",))
    return names[k] if k < len(names) else f"response {k + 1}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
