"""What the commands share."""

import ast
import errno
import logging as python_logging
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jaxpref import config as config_lib

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the recipe, see configs/.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Of a run: its checkpoints and measurements; the same workdir resumes."
)
OUTPUT = flags.DEFINE_string("output", None, "What to write: a new directory, or a file.")


def fail(message: str) -> NoReturn:
    """Ends a command with a message and the exit status of wrong usage."""
    print(f"jaxpref: {message}", file=sys.stderr)
    sys.exit(2)


def show(text: str) -> None:
    """Prints a long text, of which the reader of a pipe may not want to see the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would otherwise try to write the rest as it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet() -> None:
    """Leaves warnings and errors in the log, unless `--verbosity` asks for more."""
    if flags.FLAGS["verbosity"].present:
        return
    # Orbax tells every step of every save at the level of information.
    logging.set_verbosity(logging.WARNING)
    # Orbax also raises what fails in its threads, and a sentence tells of it then.
    python_logging.getLogger("absl").addFilter(
        lambda record: "orbax" not in record.pathname or record.exc_info is None
    )


def no_room(error: OSError) -> str | None:
    """The message for an error that comes of a full disk; None for any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}the disk is full ({error.strerror}). Make room, then give the same command."


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
        fail(f"--config={path}: no such recipe.\n{recipes()}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            fail(f"--config={path}: a recipe needs a function get_config.")
        return get_config(argument) if argument else get_config()
    except Exception as error:  # A recipe is the user's code and may raise anything.
        fail(f"--config={recipe}: {error}")


def recipes() -> str:
    """How to run a recipe, and which there are."""
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
