"""The one train loop: batch, update, log, evaluate, save; then the next."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import jax
from ml_collections import ConfigDict

from jaxpref import (
    checkpoint,
    config as config_lib,
    data as data_lib,
    evaluation,
    identity,
    lock,
    metrics as metrics_lib,
    processes,
    sharding,
    workdir as workdir_lib,
)
from jaxpref.errors import UserError
from jaxpref.interrupts import Interrupts, StoppedError, interrupts
from jaxpref.terminal import console
from jaxpref.train.assemble import Training, assemble
from jaxpref.train.state import State
from jaxpref.workdir import AnyPath, as_path

# How much longer than others the first step may take, which compiles.
_AT_FIRST = 4


def run(
    config: ConfigDict,
    workdir: str | AnyPath,
    *,
    leave: Callable[[], NoReturn] | None = None,
) -> bool:
    """Trains as the config says; run again, it resumes from the last checkpoint.

    Args:
      config: from a recipe.
      workdir: receives checkpoints, `metrics.jsonl`, TensorBoard files and `curves.png`; a folder,
        or an address such as `gs://bucket/run`.
      leave: ends the process, or all processes, on a signal before the first step is done, when
        there is nothing to save. None: the signal waits until that step is done and saved.

    Returns:
      Whether to stop what comes after this run, which is complete: a signal came as it was saved.

    Raises:
      UserError: something the user gave cannot be used, or the run cannot go on.
      KeyboardInterrupt: interrupted; the state was saved.
    """
    workdir = as_path(workdir)
    config_lib.check(config)
    data_lib.check(config)
    # Where several processes train, the first one alone speaks and writes what is not an array.
    console.quiet = jax.process_index() > 0
    run_of = identity.describe(config)
    processes.agree({**run_of, "--workdir": str(workdir), **_versions()})
    with lock.hold(workdir) as owned:
        begun = checkpoint.latest_step(workdir) is not None
        # What goes on and what begins would wait for each other.
        if processes.in_first(lambda: begun) != begun:
            raise workdir_lib.not_shared(workdir)
        identity.check_same(workdir, run_of, begun=begun)
        knobs = config.train
        best = {"best_metric": knobs.best_metric, "best_mode": knobs.best_mode}
        with checkpoint.Checkpoints(workdir, knobs.keep, owned, **best) as checkpoints:
            with _interrupts(leave) if leave else nullcontext():
                training = assemble(config, workdir, checkpoints)
            with (
                sharding.use(training.mesh),
                processes.watched(_AT_FIRST * config.train.hang_seconds),
            ):
                signalled = _loop(config, workdir, checkpoints, training, leave)
        _report(workdir, config)
    return signalled


def _versions() -> dict[str, str]:
    """Of what a run computes, reads and writes with."""
    found = {}
    for name in ("jaxpref", "jax", "jaxlib", "libtpu", "optax", "orbax-checkpoint", "tokenizers"):
        try:
            found[f"version of {name}"] = version(name)
        except PackageNotFoundError:
            found[f"version of {name}"] = "none"
    return found


def _loop(
    config: ConfigDict,
    workdir: AnyPath,
    checkpoints: checkpoint.Checkpoints,
    training: Training,
    leave: Callable[[], NoReturn] | None,
) -> bool:
    state, frozen, reference = training.state, training.frozen, training.reference
    start, steps = training.start, training.steps
    with (
        _interrupts(leave) as interrupted,
        metrics_lib.Writer(workdir, start=start, steps=steps) as writer,
    ):
        if start == 0:
            counts = {f"data/{name}": float(n) for name, n in training.data.counts.items()}
            try:
                first = _evaluate(checkpoints, training, state, 0, interrupted)
            except StoppedError:
                _stop_before(1, checkpoints)
            checkpoints.note(0, first)
            writer.write(0, {**counts, **first})
        else:
            found = _evaluated(workdir, start)
            if not found and (start == steps or _due(start, config.train.eval_every)):
                # The run was stopped before the evaluation after its last step ended.
                found = _evaluate(checkpoints, training, state, start, _never)
                writer.write(start, found)
            if checkpoints.best_metric in found:
                checkpoints.note(start, found)
        log = metrics_lib.Log(
            writer,
            every=config.train.log_every,
            steps=steps,
            patience=training.patience,
            kept=checkpoints.kept,
            resumed=start > 0,
        )
        for step in range(start + 1, steps + 1):
            if training.samples:
                # To sample is part of the step, whose time begins when the one before is done.
                log.settle()
            experience = training.source(step, state, partial(_at_once, interrupted))
            if experience is None:
                _save_before(step, checkpoints, state, log)
            _refuse_kl(training, step, experience.kl, checkpoints)
            log.dispatching(step, *experience.work)
            state, measured = training.step(step, state, frozen, reference, experience)
            log.dispatched(step, measured)
            # The first step's measurements have been waited for.
            interrupted.save_from_now_on()
            processes.beat(config.train.hang_seconds)
            last, stop, better = step == steps, interrupted(), False
            if not stop and (last or _due(step, config.train.eval_every)):
                log.settle()
                try:
                    found = _evaluate(checkpoints, training, state, step, interrupted)
                    better = checkpoints.note(step, found)
                    writer.write(step, found)
                except StoppedError:
                    stop = True
                log.pause()
            if last or stop or better or _due(step, config.train.save_every):
                log.saving(step)
                # Only weights that still give finite losses become the last good ones.
                losses = {"loss after the update": training.loss_after(state, experience)}
                metrics_lib.require_finite(step, losses, checkpoints.kept)
                checkpoints.save(step, state.params, state.rest)
                log.pause()
            if last or stop:
                # The save is awaited here, where a second signal does not kill it.
                checkpoints.wait()
            if stop:
                raise KeyboardInterrupt(
                    f"interrupted after step {step}, which is saved; the same command resumes."
                )
    # Only now, since from here on a signal acts as usual again.
    return interrupted()


def _interrupts(
    leave: Callable[[], NoReturn] | None,
) -> AbstractContextManager[Interrupts]:
    together = jax.process_count() > 1
    return interrupts("saving after this step", together=together, leave=leave)


def _at_once(interrupted: Callable[[], bool]) -> bool:
    # Where several processes train they have to agree, which they do once a step.
    return jax.process_count() == 1 and interrupted()


def _never() -> bool:
    return False


def _evaluated(workdir: AnyPath, step: int) -> dict[str, float]:
    """What the evaluation after a step has measured; empty if there was none."""

    def found() -> dict[str, float]:
        lines = [x for x in metrics_lib.read(workdir / "metrics.jsonl") if x["step"] == step]
        return {name: x[name] for x in lines for name in x if name.startswith("eval/")}

    return processes.in_first(found)


def _save_before(
    step: int, checkpoints: checkpoint.Checkpoints, state: State, log: metrics_lib.Log
) -> NoReturn:
    """Ends a run whose step has only sampled so far; that is dropped, and sampled again."""
    done = step - 1
    if done and checkpoints.latest != done:
        log.saving(done)
        checkpoints.save(done, state.params, state.rest)
    _stop_before(step, checkpoints)


def _stop_before(step: int, checkpoints: checkpoint.Checkpoints) -> NoReturn:
    """Ends a run before a step is done, after what was done before is saved."""
    done = step - 1
    checkpoints.wait()
    where = f"step {done}, which is saved" if done else "the first step was done"
    raise KeyboardInterrupt(
        f"interrupted {'after' if done else 'before'} {where}; the same command "
        f"{'resumes' if done else 'begins again'}."
    )


def _refuse_kl(
    training: Training, step: int, kl: float, checkpoints: checkpoint.Checkpoints
) -> None:
    largest = training.largest_kl
    if largest and not kl <= largest:
        raise UserError(
            f"step {step}: the KL of a response to the reference is {kl:.1f} nats, above "
            f"algorithm.largest_kl ({largest}). Stopped; {checkpoints.kept()}. A higher "
            "algorithm.beta, a lower optimizer.learning_rate or algorithm.kl_target may help."
        )


def _evaluate(
    checkpoints: checkpoint.Checkpoints,
    training: Training,
    state: State,
    step: int,
    stopping: Callable[[], bool],
) -> dict[str, float]:
    """Measurements on the held-out data, if there is any."""
    found = training.evaluate(step, state, stopping)
    metrics_lib.require_finite(step, found, checkpoints.kept)
    return found


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _report(workdir: AnyPath, config: ConfigDict) -> None:
    if jax.process_index():
        return
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    curves = workdir / "curves.png"
    evaluation.plot_curves(lines, curves, f"{config.algorithm.name}: {workdir}")
    table = evaluation.closing_table(lines)
    if table is not None:
        console.print(table)
    samples = workdir / "samples.jsonl"
    if samples.exists():
        said = [json.loads(line) for line in workdir_lib.read_lines(samples)]
        table = evaluation.samples_table(said)
        if table is not None:
            console.print(table)
            console.print(f"samples: {samples}")
    best = checkpoint.read_best(workdir) if config.train.best_metric else None
    if best is not None:
        console.print(
            f"best: step {best.step}, {best.metric} {best.value:.4g}; python -m jaxpref.export "
            "--step=best writes it"
        )
    console.print(f"curves: {curves}\nmeasurements: {workdir / 'metrics.jsonl'}")
