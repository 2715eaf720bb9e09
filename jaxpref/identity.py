"""What makes a run this run: the config and the data's fingerprints, in `run.json`."""

import hashlib
import json
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxpref import config as config_lib, workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.workdir import AnyPath

_RUN = "run.json"
_ABSENT = "(no such key)"
_DIGEST = "sha256"
# The layout of a workdir, as `run.json` says it; another one cannot be read.
_LAYOUT, _THIS_LAYOUT = "layout", 2


def describe(config: ConfigDict, **fingerprints: str) -> dict[str, Any]:
    """What makes a run this run, as flat JSON: the config, and fingerprints by name."""
    # The values are those that JSON gives back: a tuple becomes a list.
    return json.loads(json.dumps({**dict(config_lib.flatten(config)), **fingerprints}))


def read(workdir: AnyPath) -> dict[str, Any] | None:
    """The description that `write` left, or None.

    Raises:
      UserError: it is damaged, or of a workdir with another layout.
    """
    path = workdir / _RUN
    try:
        content = workdir_lib.read(path)
        run = None if content is None else json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); not a jaxpref workdir?") from error
    if run is not None and run.pop(_DIGEST, None) != _digest(run):
        raise UserError(f"{path}: is not what jaxpref wrote; put a copy of the file back.")
    if run is not None and (layout := run.pop(_LAYOUT, 1)) != _THIS_LAYOUT:
        raise UserError(
            f"{path}: another version of jaxpref wrote this workdir (layout {layout}; this version "
            f"reads {_THIS_LAYOUT}). Export its model with that version and begin with the export, "
            "or give another --workdir."
        )
    return run


def write(workdir: AnyPath, run: dict[str, Any]) -> None:
    """Writes the description so that it is there whole or not at all."""
    if jax.process_index() == 0:
        run = {**run, _LAYOUT: _THIS_LAYOUT}
        text = json.dumps({**run, _DIGEST: _digest(run)}, indent=1)
        workdir_lib.write(workdir / _RUN, text)


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def check_same(workdir: AnyPath, run: dict[str, Any], *, begun: bool) -> None:
    """Refuses to go on from the checkpoint of a run that was another one.

    Args:
      workdir: may be new.
      run: what `describe` says of this run, or a part of it.
      begun: whether it holds a checkpoint.

    Raises:
      UserError: listing what differs.
    """
    there = read(workdir)
    if not begun:
        return
    if there is None:
        raise UserError(f"{workdir}: has checkpoints but no {_RUN}; give another --workdir.")
    different = config_lib.differences(run, {key: there.get(key, _ABSENT) for key in run})
    if different:
        raise UserError(
            f"{workdir}: holds the checkpoint of another run. What differs:\n  "
            + "\n  ".join(different)
            + "\nGive another --workdir, or the same settings to resume that run."
        )
