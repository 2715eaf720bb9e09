"""Recipes on the command line: the flag `--config`, and what can be wrong with it."""

import ast
import difflib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxpref import config as config_lib
from jaxpref.commands import fail

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the recipe, see configs/.")


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
        folder = "configs/experiments" if Path(path).parent.name == "experiments" else "configs"
        command = "main" if folder == "configs" else "experiments"
        fail(f"--config={path}: no such recipe.{_nearest(path)}\n{listed(command, folder)}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            fail(f"--config={path}: a recipe needs a function get_config.")
        return get_config(argument) if argument else get_config()
    except Exception as error:  # A recipe is the user's code and may raise anything.
        fail(f"--config={recipe}: {error}")


def _nearest(path: str) -> str:
    """The recipe in its folder whose name is nearly that of a path."""
    others = [str(other) for other in Path(path).parent.glob("*.py")]
    found = difflib.get_close_matches(path, others, n=1)
    return f" Did you mean {found[0]}?" if found else ""


def stages(config: ConfigDict, workdir: str) -> list[tuple[ConfigDict, str]]:
    """The runs that a recipe needs before its own: those that its `get_stages` gives.

    Args:
      config: of the recipe; the function may set what was left open, such as `model.init_from`.
      workdir: of the recipe's own run.

    Returns:
      The config and the workdir of each, in order.
    """
    get_stages = defined("get_stages")
    return get_stages(config, workdir) if get_stages else []


def defined(name: str) -> Callable[..., Any] | None:
    """A function of the file that `--config` names; None if it has none of this name."""
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    return runpy.run_path(path).get(name)


def listed(command: str = "main", folder: str = "configs") -> str:
    """How to run a recipe of a folder with a command, and which there are."""
    lines = [
        "Run a recipe with",
        "",
        f"  python -m jaxpref.{command} --config={folder}/RECIPE.py --workdir=DIR",
        "",
        "Recipes here:",
    ]
    here = Path(folder)
    configs = here if here.is_dir() else Path(__file__).parent.parent / folder
    paths = sorted(configs.glob("*.py"))
    width = max((len(str(path)) for path in paths), default=0)
    for path in paths:
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"  {path!s:{width}} {summary}")
    return "\n".join(lines)
