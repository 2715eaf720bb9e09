"""Runs a recipe: `python -m jaxpref.main --config=configs/dpo_hh.py --workdir=DIR`.

Any value of the recipe can be set after it: `--config.algorithm.beta=0.2`.
"""

import ast
import runpy
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jaxpref import config as config_lib, explain
from jaxpref.commands import WORKDIR, fail, no_room, quiet
from jaxpref.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the recipe, see configs/.")
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Print every knob of the recipe, what it does and may be; run nothing."
)
# Of a run in several processes. On a cluster that JAX knows they need not be given.
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0 of a run in several processes."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes run together; 1: this one alone.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Which of the processes this one is, from 0.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Hands the config to the train loop."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --workdir=DIR.")
    if CONFIG.value is None:
        print(_recipes())
        sys.exit(2)
    if _EXPLAIN.value:
        print(explain.explain(CONFIG.value))
        return
    workdir = WORKDIR.value
    if not workdir:
        fail("--workdir is missing: the directory for checkpoints and measurements.")
    _check_processes()
    quiet()
    try:
        config_lib.check(CONFIG.value)
        # JAX loads here, so that everything above answers at once.
        from jaxpref import sharding, train

        sharding.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train.run(CONFIG.value, workdir)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if (message := no_room(error)) is None:
            raise
        fail(message)
    except KeyboardInterrupt as interrupt:
        print(interrupt or "interrupted", file=sys.stderr)
        sys.exit(130)


def _check_processes() -> None:
    """Refuses flags that name no group of processes with this one in it."""
    coordinator, count, number = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    if coordinator is None and number is None and count in (None, 1):
        return
    if coordinator is None or count is None or number is None:
        fail("--coordinator, --num_processes and --process_id go together; give all three.")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        fail(f"--coordinator should be HOST:PORT; got {coordinator!r}.")
    if number >= count:
        fail(f"--process_id should be below --num_processes ({count}); got {number}.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them takes one line, not a traceback."""
    recipe, keys = None, []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            recipe = value if given else following
        elif name.startswith("config.") and argument.startswith("-"):
            keys.append(name.removeprefix("config."))
    if recipe:
        config = _load_recipe(recipe)
        for key in keys:
            if message := config_lib.unknown_key(config, key):
                fail(message)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(str(error).strip().splitlines()[-1])


def _load_recipe(recipe: str) -> ConfigDict:
    """The config of `path` or `path:argument`, with errors a user can act on."""
    path, _, argument = recipe.partition(":")
    if not Path(path).is_file():
        fail(f"--config={path}: no such recipe.\n{_recipes()}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            fail(f"--config={path}: a recipe needs a function get_config.")
        return get_config(argument) if argument else get_config()
    except Exception as error:  # A recipe is the user's code and may raise anything.
        fail(f"--config={recipe}: {error}")


def _recipes() -> str:
    lines = [
        "Run a recipe with",
        "",
        "  python -m jaxpref.main --config=configs/RECIPE.py --workdir=DIR",
        "",
        "Recipes here:",
    ]
    here = Path("configs")
    configs = here if here.is_dir() else Path(__file__).parent.parent / "configs"
    for path in sorted(configs.glob("*.py")):
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"  {path!s:28} {summary}")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
