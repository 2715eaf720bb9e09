"""What is declared of knobs and methods, for readers.

In the terminal, of a recipe: `python -m jaxpref.main --config=RECIPE --explain`. In `docs/`, of
all: `make docs` writes those pages. Nothing heavy is imported here.
"""

import textwrap
from collections.abc import Mapping

from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.knobs import EVALUATION_KNOBS, GROUPS, KNOBS, Knob
from jaxpref.methods import METHODS, Method

_WIDTH = 96
_REFERENCE = {"none": "none", "optional": "any", "needed": "any but free"}


def explain(config: ConfigDict) -> str:
    """Every knob of a recipe: its value, what it does, and what it may be."""
    name = config.algorithm.name
    method, defaults = config_lib.method_of(name), config_lib.default(name)
    lines = [
        f"{name}: {method.summary}",
        f"It trains on data of kind {config_lib.data_kind(config)!r}; reference: "
        f"{_REFERENCE[method.reference]}.",
    ]
    group = ""
    for key, knob in config_lib.knobs_of(name).items():
        if key.partition(".")[0] != group:
            group = key.partition(".")[0]
            lines.append("")
        value, usual = config_lib.get(config, key), config_lib.get(defaults, key)
        default = "" if value == usual else f"   (default {usual!r})"
        lines.append(f"--config.{key}={_shown(value)}{default}")
        lines += textwrap.wrap(
            _sentence(knob), _WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The pages of `docs/` that say what is declared, by file name, in Markdown."""
    return {"methods.md": _methods_page(), "knobs.md": _knobs_page()}


def _methods_page() -> str:
    rows = [
        [f"[`{name}`](#{name})", method.summary, _data(method), _REFERENCE[method.reference]]
        for name, method in METHODS.items()
    ]
    table = _table(["`algorithm.name`", "what it is", "data", "reference"], rows)
    parts = [
        "# Methods",
        "Each method is one value of `algorithm.name`. The data are a kind of examples, which "
        "formats are [converted](data.md) to; the reference is one that `reference.mode` may "
        "name. The equation of each is in the docstring of its loss, in `jaxpref/losses/`. Where "
        "the defaults differ from TRL's is [a page of its own](trl.md).",
        table,
    ]
    for name, method in METHODS.items():
        parts += [f"## {name}", f"{method.summary[0].upper()}{method.summary[1:]}."]
        if method.knobs:
            knobs = {f"algorithm.{key}": knob for key, knob in method.knobs.items()}
            parts.append(_knobs_table(knobs))
        else:
            parts.append("It has no knobs of its own.")
    return "\n\n".join(parts) + "\n"


def _data(method: Method) -> str:
    others = (f"{kind} where {where.condition}" for kind, where in method.data_where.items())
    return "; ".join([method.data, *others])


def _knobs_page() -> str:
    parts = [
        "# Knobs",
        "Every value of a recipe, but for those of the [methods](methods.md). A recipe changes "
        "some of them, a command line any: `--config.optimizer.learning_rate=1e-6`. "
        "`python -m jaxpref.main --config=RECIPE --explain` prints them with the values of a "
        "recipe.",
    ]
    for group in dict.fromkeys(key.partition(".")[0] for key in KNOBS):
        knobs = {key: knob for key, knob in KNOBS.items() if key.partition(".")[0] == group}
        parts += [f"## {group}", _knobs_table(knobs)]
    for group, knobs in GROUPS.items():
        having = ", ".join(f"`{name}`" for name, m in METHODS.items() if group in m.groups)
        parts += [f"## {group}", f"Methods that have these: {having}.", _knobs_table(knobs)]
    parts += [
        "## sampling and reward, of methods on data",
        "What the other methods have of these two groups, for what they sample at evaluations; "
        "`reward` has none of them.",
        _knobs_table(EVALUATION_KNOBS),
    ]
    return "\n\n".join(parts) + "\n"


def _knobs_table(knobs: Mapping[str, Knob]) -> str:
    rows = [[f"`{key}`", f"`{knob.default!r}`", _sentence(knob)] for key, knob in knobs.items()]
    return _table(["knob", "default", "what it does, and what it may be"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sentence(knob: Knob) -> str:
    allowed = f"one of {', '.join(map(str, knob.choices))}" if knob.choices else knob.bounds
    parts = [part[:1].upper() + part[1:] for part in (knob.meaning.rstrip("."), allowed)]
    if knob.effect:
        parts.append(f"It has an effect only where {knob.effect.condition}")
    if knob.resumable:
        parts.append("It may change when a run is resumed")
    return ". ".join(part for part in parts if part) + "."


def _shown(value: object) -> str:
    return "''" if value == "" else str(value)
