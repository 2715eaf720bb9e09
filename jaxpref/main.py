"""Runs a recipe: `python -m jaxpref.main --config=configs/dpo_hh.py --workdir=DIR`.

Any value of the recipe can be set after it: `--config.algorithm.beta=0.2`.
"""

import ast
import os
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from jaxpref import config as config_lib
from jaxpref.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the recipe, see configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and measurements go; the same workdir resumes."
)


def main(argv: list[str]) -> None:
    """Hands the config to the train loop."""
    if len(argv) > 1:
        _fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --workdir=DIR.")
    if _CONFIG.value is None:
        print(_recipes())
        sys.exit(2)
    workdir = _WORKDIR.value
    if not workdir:
        _fail("--workdir is missing: the directory for checkpoints and measurements.")
    # Orbax tells every step of every save at the level of information.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # Only tokenizers are used of transformers, which would else say that it misses torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        config_lib.check(_CONFIG.value)
        # JAX loads here, so that everything above answers at once.
        from jaxpref import train

        train.run(_CONFIG.value, workdir)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(interrupt or "interrupted", file=sys.stderr)
        sys.exit(130)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them takes one line, not a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except UserError as error:
        _fail(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _fail(_explain(argv, error))


def _explain(argv: list[str], error: Exception) -> str:
    recipe = [arg for arg in argv if arg.startswith("--config=")][-1:]
    keys = [
        arg.removeprefix("--config.").partition("=")[0]
        for arg in argv
        if arg.startswith("--config.")
    ]
    flag_values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=flag_values)
    try:
        flag_values([argv[0], *recipe])
        config = holder.value
        messages = [config_lib.unknown_key(config, key) for key in keys]
    except Exception:  # The recipe itself does not load; its own error says why.
        return f"{recipe[0] if recipe else 'flags'}: {error}"
    return next((message for message in messages if message), str(error))


def _recipes() -> str:
    lines = [
        "No recipe given. Run one with",
        "",
        "  python -m jaxpref.main --config=configs/RECIPE.py --workdir=DIR",
        "",
        "Recipes here:",
    ]
    for path in sorted(Path("configs").glob("*.py")):
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"  {path!s:28} {summary}")
    if len(lines) == 5:
        lines.append("  (none: there is no configs/ directory here)")
    return "\n".join(lines)


def _fail(message: str) -> NoReturn:
    print(f"jaxpref: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
