"""Orbax checkpoints of the train state and of the frozen reference, and the run's identity.

A workdir holds

    run.json        the config and the data's fingerprints
    checkpoints/N/  after update N: items `params` (what is trained) and `rest` (optimizer
                    state, step)
    frozen/         the parameters that are not trained, if any
    reference/      the frozen reference's parameters, where they are not those of `frozen`, or
    reference_logps.npz  its log-probs, if they are precomputed (see jaxpref.reference)

Orbax writes a checkpoint beside its place and renames it when complete, so a process
that is killed leaves the last complete one.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.errors import UserError
from jaxpref.trainable import as_abstract, merge, partition, store_frozen

_RUN, _CHECKPOINTS = "run.json", "checkpoints"
_REFERENCE, _FROZEN = "reference", "frozen"
_ABSENT = "(no such key)"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: Path, keep: int):
        """Opens the folder; removes what an interrupted save left behind."""
        self._manager = ocp.CheckpointManager(
            (workdir / _CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    @property
    def latest(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, rest: Any) -> None:
        """Starts to save; the arrays may be donated once this returns."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest)
            ),
        )

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """Reads the state of `step` into the shapes and shardings of abstract arrays."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)
            ),
        )
        return restored["params"], restored["rest"]

    def wait(self) -> None:
        """Returns when every save that was started is complete."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is being saved, also when the run ends in an error."""
        self._manager.close()


def restore_params(workdir: Path, params: Any) -> tuple[Any, int]:
    """The parameters of a workdir's last checkpoint, into `params`' shapes and shardings.

    What `params` lacks is not read.

    Returns:
      All parameters, trained and frozen, these as the run keeps them, and the step.

    Raises:
      UserError: there is no checkpoint.
    """
    folder = (workdir / _CHECKPOINTS).absolute()
    step, run = latest_step(workdir), read_run(workdir)
    if step is None or run is None:
        raise UserError(f"{workdir}: holds no complete checkpoint ({folder}).")
    config = config_lib.from_flat(run)
    trained, frozen = partition(params, config_lib.trainable(config))
    frozen = store_frozen(frozen, config.model.frozen_dtype, convert=as_abstract)
    wanted = ocp.args.PyTreeRestore(
        item=trained,
        restore_args=ocp.checkpoint_utils.construct_restore_args(trained),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        trained = checkpointer.restore(folder / str(step) / "params", args=wanted)
    return merge(trained, restore_frozen(workdir, frozen)), step


def save_frozen(workdir: Path, params: Any) -> None:
    """Keeps the parameters that are not trained with the run."""
    _save(workdir / _FROZEN, params)


def restore_frozen(workdir: Path, params: Any) -> Any:
    """Reads the parameters that are not trained, if there are any.

    Raises:
      UserError: the workdir has none.
    """
    return _restore(workdir / _FROZEN, params, "parameters that are not trained")


def latest_step(workdir: Path) -> int | None:
    """The step of a workdir's last complete checkpoint, without opening it."""
    folder = workdir / _CHECKPOINTS
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def save_reference(workdir: Path, params: Any) -> None:
    """Keeps the frozen reference with the run, so that resuming needs nothing else."""
    _save(workdir / _REFERENCE, params)


def restore_reference(workdir: Path, params: Any) -> Any:
    """Reads the frozen reference into the shapes and shardings of abstract arrays.

    Raises:
      UserError: the workdir has none.
    """
    return _restore(workdir / _REFERENCE, params, "frozen reference")


def _save(folder: Path, params: Any) -> None:
    if jax.tree.leaves(params):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), params, force=True)


def _restore(folder: Path, params: Any, what: str) -> Any:
    if not jax.tree.leaves(params):
        return params
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the {what} of this run cannot be found, so it cannot be resumed; put the "
            "folder back, or start again in another --workdir."
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), params)


def describe_run(config: ConfigDict, **fingerprints: str) -> dict[str, Any]:
    """What makes a run this run, as flat JSON: the config, and fingerprints by name."""
    # As JSON gives it back, where a tuple is a list.
    return json.loads(json.dumps({**dict(config_lib.flatten(config)), **fingerprints}))


def read_run(workdir: Path) -> dict[str, Any] | None:
    """The description that `write_run` left, or None."""
    path = workdir / _RUN
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); not a jaxpref workdir?") from error


def write_run(workdir: Path, run: dict[str, Any]) -> None:
    """Writes the description so that it is there whole or not at all."""
    if jax.process_index() == 0:
        temporary = workdir / f"{_RUN}.tmp"
        temporary.write_text(json.dumps(run, indent=1))
        os.replace(temporary, workdir / _RUN)


def check_same_run(workdir: Path, run: dict[str, Any]) -> None:
    """Refuses to go on from the checkpoint of a run that was another one.

    Args:
      workdir: may be new.
      run: what `describe_run` says of this run, or a part of it.

    Raises:
      UserError: listing what differs.
    """
    there = read_run(workdir)
    if latest_step(workdir) is None:
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


def prepare_workdir(workdir: Path) -> None:
    """Makes the workdir and checks that it can be written.

    Raises:
      UserError: it cannot.
    """
    if jax.process_index():
        return
    probe = workdir / ".write-probe"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: cannot be written ({error.strerror}); give a directory that can."
        ) from error
