"""Orbax checkpoints of the train state and of the frozen reference.

A workdir holds

    run.lock        locked by the run that is training there
    run.json        the config and the data's fingerprints
    checkpoints/N/  after update N: items `params` (what is trained, by role) and `rest`
                    (optimizer state, step)
    frozen/         the parameters that are not trained, if any
    reference/      the frozen reference's parameters, where they are not those of `frozen`, or
    reference_logps.npz  its log-probs, if they are precomputed (see jaxpref.reference)

Each of these folders is written beside its place (`N.saving`), described by a manifest of its
files, and renamed when it is complete: a process that is killed leaves the last complete one, and
what has been damaged since is found before it is read.

A bucket renames nothing, so there a folder is written in its place, and the manifest, which comes
after all that Orbax writes, says that it is complete. `checkpoints/steps.json` lists the complete
ones, which a listing of the bucket may not have yet.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxpref import config as config_lib, identity, manifest, processes, workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.joint import Failure, Joint
from jaxpref.terminal import console
from jaxpref.trainable import as_abstract, merge, partition, store_frozen
from jaxpref.workdir import AnyPath

_CHECKPOINTS, _STEPS, _BEST = "checkpoints", "steps.json", "best.json"
_REFERENCE, _FROZEN = "reference", "frozen"
_SAVING, _DAMAGED, _REMOVING = ".saving", ".damaged", ".removing"
# In a bucket, in place of the manifest of a checkpoint that is damaged.
_ASIDE = "damaged.txt"
# The role whose parameters are the model of a run.
POLICY = "policy"
# The role whose values a policy gradient subtracts.
CRITIC = "critic"
# An error that means that there is no room left on the disk has one of these in its text, whichever
# library raised it. The codes of XLA and of buckets say no more than that something is exhausted:
# the memory of a device, or a rate of requests.
_NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class Best(NamedTuple):
    """The step after which an evaluation has found the best value of a measurement."""

    step: int
    metric: str
    value: float


class Checkpoints:
    """The checkpoints of one run, which holds the workdir."""

    def __init__(
        self,
        workdir: AnyPath,
        keep: int,
        owned: Callable[[], None] = lambda: None,
        *,
        best_metric: str = "",
        best_mode: str = "min",
    ):
        """Looks for the last good one, and removes what an interrupted save left behind.

        Checkpoints that came after it are damaged; they are set aside as `N.damaged`, or as
        incomplete ones where nothing can be renamed.

        Args:
          workdir: of the run.
          keep: how many stay, of the last ones.
          owned: raises an error if the workdir is another run's by now, see `lock.hold`.
          best_metric: the measurement by which the best one stays, too; empty: none.
          best_mode: "min" or "max".

        Raises:
          UserError: there are checkpoints, but all are damaged.
        """
        self._workdir, self._keep, self._owned = workdir, keep, owned
        self._folder = workdir_lib.absolute(workdir / _CHECKPOINTS)
        self._saving: Future[None] | None = None
        self._failed: UserError | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.best_metric, self._best_mode = best_metric, best_mode
        found = processes.in_first(self._open)
        self.latest: int | None = found if found >= 0 else None
        # What is known as the best, and what is better, but may not be saved yet. The first process
        # alone says so, and removes the others.
        self._best: Best | None = None if jax.process_index() else read_best(workdir)
        self._noted: Best | None = None

    def _open(self) -> int:
        self._clear()
        good = -1
        if latest_step(self._workdir) is not None:
            good, damaged = _good_step(self._workdir)
            for step in damaged:
                _set_aside(self._place(step))
        best = read_best(self._workdir)
        if best and (best.metric != self.best_metric or best.step not in _steps(self._workdir)):
            (self._folder / _BEST).unlink(missing_ok=True)
        return good

    def note(self, step: int, measured: Mapping[str, float]) -> bool:
        """Takes note of an evaluation after this step.

        Returns:
          Whether it is the best so far, so that the state after this step should be saved.

        Raises:
          UserError: it has not measured what says which is the best.
        """
        if not self.best_metric:
            return False
        if self.best_metric not in measured:
            raise UserError(
                f"train.best_metric is {self.best_metric!r}, which the evaluations of this run do "
                f"not measure; they measure {', '.join(sorted(measured)) or 'nothing'}."
            )
        value = measured[self.best_metric]
        if step == 0 or not processes.in_first(lambda: self._is_better(value)):
            return False
        self._noted = Best(step, self.best_metric, value)
        if step == self.latest:
            self._keep_best(self._noted)
        return True

    def _is_better(self, value: float) -> bool:
        before = self._noted or self._best
        if before is None:
            return True
        return value < before.value if self._best_mode == "min" else value > before.value

    def _keep_best(self, best: Best) -> None:
        """Writes down which one is the best, in the first process; if it cannot, none is new."""
        if jax.process_index():
            return
        try:
            workdir_lib.write(self._folder / _BEST, json.dumps(best._asdict()))
        except OSError as error:
            self._forget(best.step)
            reason = error.strerror or error
            console.print(f"{self._folder / _BEST}: {reason}; step {best.step} is not kept as best")
            return
        self._best = best

    def _forget(self, step: int) -> None:
        """What was noted of a step is of no use, since it is not saved."""
        if self._noted is not None and self._noted.step == step:
            self._noted = None

    def save(self, step: int, params: Any, rest: Any) -> None:
        """Starts to save; the arrays may be donated once this returns.

        Where the disk is full that is told, and the run goes on: the next save tries again.
        """
        self._settle()
        failed_before, self._failed = self._failed is not None, None
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest)
        )
        size = sum(x.nbytes for x in jax.tree.leaves((params, rest)))
        best = self._noted if self._noted is not None and self._noted.step == step else None

        def full() -> str:
            self._owned()
            if failed_before:
                # Of several writes of a process one may go on for a while after another one failed.
                self._clear()
            # What Orbax writes is compressed, not to half.
            if _is_full(self._workdir, size / 2):
                return os.strerror(errno.ENOSPC)
            try:
                # Orbax makes it anew. If that failed, the other processes would wait for minutes.
                workdir_lib.make(_until_complete(self._place(step)))
            except OSError as error:
                if not _without_room(str(error)):
                    raise
                return str(error)
            return ""

        # A save is tried only where it may fit.
        if reason := processes.in_first(full):
            self._fail(step, Failure(0, reason, None))
            return
        # Each save has a checkpointer of its own: one that has failed is of no more use.
        joint = Joint()
        checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=joint.barrier),
        )
        # Nothing is written here, so that no disk is found full in one process alone.
        checkpointer.save(_begin(self._place(step)), args=args, force=True)
        self._saving = self._pool.submit(self._finish, step, checkpointer, joint, best)

    def _finish(
        self, step: int, checkpointer: ocp.AsyncCheckpointer, joint: Joint, best: Best | None
    ) -> None:
        """Waits until all is written, then puts it in its place; in a thread of its own."""

        def complete() -> None:
            self._owned()
            _complete(self._place(step))
            _list_step(self._folder, step)

        failure = joint.do(checkpointer.close, complete, stop=checkpointer.cancel)
        if failure is not None:
            self._fail(step, failure)
            return
        self.latest = step
        if best is not None:
            self._keep_best(best)
        if jax.process_index() == 0:
            self._remove_old()

    def _remove_old(self) -> None:
        try:
            for old in _steps(self._workdir)[: -self._keep]:
                if self._best is None or old != self._best.step:
                    _remove(self._place(old))
        except OSError as error:
            # They are removed after the next save.
            reason = error.strerror or error
            console.print(f"{self._folder}: old checkpoints cannot be removed now ({reason})")

    def _fail(self, step: int, failure: Failure) -> None:
        """Notes that a save has failed for want of room; raises any other error."""
        full = _without_room(failure.reason)
        where = f"process {failure.process}: " if jax.process_count() > 1 else ""
        if not full:
            raise failure.error or UserError(
                f"{self._folder}: the checkpoint of step {step} cannot be saved "
                f"({where}{failure.reason})."
            )
        self._forget(step)
        if jax.process_index() == 0:
            self._clear()
        last = "there is none before" if self.latest is None else f"the last is of {self.latest}"
        self._failed = UserError(
            f"{self._folder}: the disk is full ({where}{full}), so the checkpoint of step {step} "
            f"is not saved ({last}). Make room; the same command goes on from the last one."
        )
        console.print(f"{self._failed} This run tries again when it next saves.")

    def _clear(self) -> None:
        for folder in _begun(self._workdir):
            workdir_lib.remove(folder)

    def _settle(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _place(self, step: int) -> AnyPath:
        return self._folder / str(step)

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """Reads the state of `step` into the shapes and shardings of abstract arrays."""
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)
        )
        _require_seen(self._place(step))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(self._place(step), args=args)
        return restored["params"], restored["rest"]

    def wait(self) -> None:
        """Returns when the save that was started is complete.

        Raises:
          UserError: it was not, since the disk is full.
        """
        self._settle()
        if self._failed is not None:
            raise self._failed

    def kept(self) -> str:
        """What a run that has to stop leaves, in words."""
        self._settle()
        if self.latest is None:
            return "there is no checkpoint yet"
        damaged = manifest.damage(self._place(self.latest))
        if damaged:
            return f"the checkpoint of step {self.latest} is damaged ({damaged})"
        return f"the checkpoint of step {self.latest} is kept"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is being saved, also when the run ends in an error."""
        self._pool.shutdown()


def _good_step(workdir: AnyPath) -> tuple[int, list[int]]:
    """The last checkpoint that is whole, and those after it, which are damaged.

    Raises:
      UserError: none is whole.
    """
    damaged: dict[int, str] = {}
    for step in reversed(_steps(workdir)):
        reason = manifest.damage(workdir / _CHECKPOINTS / str(step))
        if reason is None:
            for bad, why in damaged.items():
                console.print(
                    f"{workdir}: the checkpoint of step {bad} is damaged ({why}); that of step "
                    f"{step} is used in its place."
                )
            return step, list(damaged)
        damaged[step] = reason
    listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    raise UserError(
        f"{workdir}: all of its checkpoints are damaged ({listed}). Put a copy of one back, or "
        "start again in another --workdir."
    )


def _until_complete(place: AnyPath) -> AnyPath:
    """Where a folder is written until it is complete."""
    if isinstance(place, Path):
        return place.with_name(place.name + _SAVING).absolute()
    return place


def _begin(place: AnyPath) -> AnyPath:
    """See `_until_complete`; what is in a bucket there is gone."""
    if not isinstance(place, Path) and jax.process_index() == 0:
        _remove(place)
    return _until_complete(place)


def _complete(place: AnyPath) -> None:
    """Describes a folder that is written whole, and puts it in its place."""
    folder = _until_complete(place)
    manifest.write(folder)
    if isinstance(place, Path):
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)


def _begun(workdir: AnyPath) -> list[AnyPath]:
    """What interrupted saves and removals have left."""
    if isinstance(workdir, Path):
        patterns = [f"{_FROZEN}{_SAVING}*", f"{_REFERENCE}{_SAVING}*"]
        patterns += [f"{_CHECKPOINTS}/*{part}*" for part in (_SAVING, _REMOVING)]
        return [path for pattern in patterns for path in workdir.glob(pattern)]
    # The frozen parameters and the reference have names that are used again.
    folder = workdir / _CHECKPOINTS
    places = [folder / name for name in workdir_lib.names(folder) if name.isdigit()]
    return [p for p in places if not manifest.exists(p) and not (p / _ASIDE).exists()]


def _set_aside(place: AnyPath) -> None:
    """Makes room for a checkpoint in place of a damaged one, which may be of use."""
    if isinstance(place, Path):
        aside = place.with_name(place.name + _DAMAGED)
        workdir_lib.remove(aside)
        place.rename(aside)
    else:
        workdir_lib.write(place / _ASIDE, b"")
        manifest.remove(place)


def _remove(place: AnyPath) -> None:
    if isinstance(place, Path):
        place = place.rename(place.with_name(place.name + _REMOVING))
    else:
        manifest.remove(place)
    workdir_lib.remove(place)


def _without_room(reason: str) -> str:
    """Which of `_NO_ROOM` the text of an error has; empty if it is another one."""
    return next((words for words in _NO_ROOM if words in reason), "")


def _is_full(workdir: AnyPath, size: float) -> bool:
    return isinstance(workdir, Path) and shutil.disk_usage(workdir).free < size


def _require_seen(folder: AnyPath) -> None:
    """Refuses to go on where a process does not see what the first one has found whole.

    The others would wait for it, to read together.
    """
    if not manifest.exists(folder):
        raise workdir_lib.not_shared(folder)


def read_best(workdir: AnyPath) -> Best | None:
    """Which checkpoint an evaluation has found the best, if a run was told to keep that one."""
    try:
        return Best(**json.loads(workdir_lib.read(workdir / _CHECKPOINTS / _BEST) or b"null"))
    except (ValueError, TypeError):
        return None


def _named_step(workdir: AnyPath, name: str) -> int:
    best, steps = read_best(workdir), _steps(workdir)
    known = best is not None and best.step in steps
    if name == "best" and not known:
        raise UserError(
            f"{workdir}: it is not known which checkpoint is the best; a run that is told so by "
            "train.best_metric keeps it."
        )
    step = best.step if name == "best" and best else int(name) if name.isdigit() else -1
    if step not in steps:
        raise UserError(
            f"{workdir}: there is no checkpoint of step {name!r}; there are those of "
            f"{', '.join(map(str, steps))}{', and best' if known else ''}."
        )
    if damaged := manifest.damage(workdir / _CHECKPOINTS / str(step)):
        raise UserError(f"{workdir}: the checkpoint of step {step} is damaged ({damaged}).")
    return step


def restore_params(workdir: AnyPath, params: Any, which: str = "") -> tuple[Any, int]:
    """The parameters of a workdir's last good checkpoint, into `params`' shapes and shardings.

    What `params` lacks is not read.

    Args:
      workdir: of a run.
      params: abstract arrays.
      which: the step of another checkpoint that is kept, or "best", see `train.best_metric`.

    Returns:
      All parameters, trained and frozen, these as the run keeps them, and the step.

    Raises:
      UserError: there is no checkpoint, or none that is whole.
    """
    folder = workdir_lib.absolute(workdir / _CHECKPOINTS)

    def find() -> int:
        if latest_step(workdir) is None or identity.read(workdir) is None:
            raise UserError(f"{workdir}: holds no complete checkpoint ({folder}).")
        return _named_step(workdir, which) if which else _good_step(workdir)[0]

    step = processes.in_first(find)
    _require_seen(folder / str(step))
    if (run := identity.read(workdir)) is None:
        raise workdir_lib.not_shared(workdir)
    config = config_lib.from_flat(run)
    trained, frozen = partition(params, config_lib.trainable(config))
    frozen = store_frozen(frozen, config.model.frozen_dtype, convert=as_abstract)
    trained = _restore_part(folder / str(step) / "params", {POLICY: trained})[POLICY]
    return merge(trained, restore_frozen(workdir, frozen)), step


def restore_moving_reference(workdir: AnyPath, params: Any) -> Any:
    """The parameters that a reference which moves with the policy has reached.

    They are those of the last good checkpoint, whose policy `restore_params` gives.

    Args:
      workdir: of a run whose train state has the reference.
      params: abstract arrays, which say shapes and shardings.

    Raises:
      UserError: no checkpoint is whole.
    """
    step = processes.in_first(lambda: _good_step(workdir)[0])
    folder = workdir_lib.absolute(workdir / _CHECKPOINTS / str(step))
    _require_seen(folder)
    return _restore_part(folder / "rest", {"reference": params})["reference"]


def _restore_part(folder: AnyPath, wanted: Any) -> Any:
    """What is asked for of an item of a checkpoint; nothing else is read."""
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder, args=args)


def save_frozen(workdir: AnyPath, params: Any) -> None:
    """Keeps the parameters that are not trained with the run."""
    _save(workdir / _FROZEN, params)


def restore_frozen(workdir: AnyPath, params: Any) -> Any:
    """Reads the parameters that are not trained, if there are any.

    Raises:
      UserError: the workdir has none, or they are damaged.
    """
    return _restore(workdir / _FROZEN, params, "parameters that are not trained")


def latest_step(workdir: AnyPath) -> int | None:
    """The step of a workdir's last complete checkpoint, without opening it."""
    return max(_steps(workdir), default=None)


def _steps(workdir: AnyPath) -> list[int]:
    folder = workdir / _CHECKPOINTS
    found = {int(name) for name in workdir_lib.names(folder) if name.isdigit()}
    if not isinstance(workdir, Path):
        listed = found.union(_listed_steps(folder))
        found = {step for step in listed if manifest.exists(folder / str(step))}
    return sorted(found)


def _listed_steps(folder: AnyPath) -> list[int]:
    return json.loads(workdir_lib.read(folder / _STEPS) or b"[]")


def _list_step(folder: AnyPath, step: int) -> None:
    """Lets a complete checkpoint be found by name, where a listing may not have it yet."""
    if not isinstance(folder, Path):
        steps = {s for s in _listed_steps(folder) if manifest.exists(folder / str(s))} | {step}
        workdir_lib.write(folder / _STEPS, json.dumps(sorted(steps)))


def save_reference(workdir: AnyPath, params: Any) -> None:
    """Keeps the frozen reference with the run, so that resuming needs nothing else."""
    _save(workdir / _REFERENCE, params)


def restore_reference(workdir: AnyPath, params: Any) -> Any:
    """Reads the frozen reference into the shapes and shardings of abstract arrays.

    Raises:
      UserError: the workdir has none, or it is damaged.
    """
    return _restore(workdir / _REFERENCE, params, "frozen reference")


def _save(folder: AnyPath, params: Any) -> None:
    if not jax.tree.leaves(params):
        return
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(_begin(folder), params, force=True)
        if jax.process_index() == 0:
            _complete(folder)
    except Exception as error:
        if not (full := _without_room(str(error))):
            raise
        raise UserError(
            f"{folder}: the disk is full ({full}). Make room, then run it again."
        ) from error


def _restore(folder: AnyPath, params: Any, what: str) -> Any:
    if not jax.tree.leaves(params):
        return params

    def check() -> None:
        if not manifest.exists(folder) and not folder.is_dir():
            raise UserError(
                f"{folder}: the {what} of this run cannot be found, so it cannot be resumed; put "
                "the folder back, or start again in another --workdir."
            )
        if damaged := manifest.damage(folder):
            raise UserError(
                f"{folder}: the {what} of this run are damaged ({damaged}); put a copy of the "
                "folder back, or start again in another --workdir."
            )

    # One reads all of it for the digests, and each of the others what is on its own devices.
    processes.in_first(check)
    _require_seen(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir_lib.absolute(folder), params)
