"""The one train loop: batch, update, log, evaluate, save; then the next."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxpref import (
    checkpoint,
    config as config_lib,
    data as data_lib,
    evaluation,
    metrics as metrics_lib,
    sharding,
)
from jaxpref.measurements import total
from jaxpref.terminal import console
from jaxpref.train.assemble import Training, assemble
from jaxpref.train.interrupts import interrupts
from jaxpref.train.state import State


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Trains as the config says; run again, it resumes from the last checkpoint.

    Args:
      config: from a recipe.
      workdir: receives checkpoints, `metrics.jsonl`, TensorBoard files and `curves.png`.

    Raises:
      UserError: something the user gave cannot be used, or the run cannot go on.
      KeyboardInterrupt: interrupted; the state was saved.
    """
    workdir = Path(workdir)
    config_lib.check(config)
    data_lib.check(config)
    # Where several processes train, the first one alone speaks and writes what is not an array.
    console.quiet = jax.process_index() > 0
    with checkpoint.hold(workdir):
        checkpoint.check_same_run(workdir, checkpoint.describe_run(config))
        with checkpoint.Checkpoints(workdir, config.train.keep) as checkpoints:
            training = assemble(config, workdir, checkpoints)
            with sharding.use(training.mesh):
                _loop(config, workdir, checkpoints, training)
        _report(workdir, config)


def _loop(
    config: ConfigDict, workdir: Path, checkpoints: checkpoint.Checkpoints, training: Training
) -> None:
    state, frozen, reference = training.state, training.frozen, training.reference
    start, steps = training.start, training.steps
    with (
        interrupts() as interrupted,
        metrics_lib.Writer(workdir, start=start, steps=steps) as writer,
    ):
        if start == 0:
            counts = {f"data/{name}": float(n) for name, n in training.data.counts.items()}
            first = _evaluate(workdir, checkpoints, training, state, 0)
            writer.write(0, {**counts, **first})
        log = metrics_lib.Log(
            writer,
            every=config.train.log_every,
            steps=steps,
            epoch=-(-len(training.data.train) // config.data.batch_size),
            kept=checkpoints.kept,
            resumed=start > 0,
        )
        for step in range(start + 1, steps + 1):
            batch = training.source(step, state)
            log.dispatching(step, batch)
            batch = training.put(batch)
            state, measured = training.update(state, frozen, reference, batch)
            log.dispatched(step, measured)
            # This is asked once a step, so that what is saved and what stops agree.
            last, stop = step == steps, interrupted(step)
            if last or _due(step, config.train.eval_every):
                log.settle()
                writer.write(step, _evaluate(workdir, checkpoints, training, state, step))
                log.pause()
            if last or stop or _due(step, config.train.save_every):
                log.flush(step)
                # Only weights that still give finite losses become the last good ones.
                after = total(training.eval_step(state, frozen, reference, batch).loss).values
                found = {"loss after the update": float(after)}
                metrics_lib.require_finite(step, found, checkpoints.kept)
                checkpoints.save(step, state.params, state.rest)
                log.pause()
            if last or stop:
                # The save is awaited here, where a second signal does not kill it.
                checkpoints.wait()
            if stop and not last:
                raise KeyboardInterrupt(
                    f"interrupted after step {step}, which is saved; the same command resumes."
                )


def _evaluate(
    workdir: Path,
    checkpoints: checkpoint.Checkpoints,
    training: Training,
    state: State,
    step: int,
) -> dict[str, float]:
    """Measurements on the held-out data, if there is any; draws the reliability diagram."""
    held_out = training.data.held_out
    if training.held_out is None or held_out is None:
        return {}
    results = evaluation.evaluate(
        lambda batch: training.eval_step(
            state, training.frozen, training.reference, training.put(batch)
        ),
        training.held_out.once(),
        held_out.true_rewards,
        held_out.sources,
    )
    metrics_lib.require_finite(step, results.values, checkpoints.kept)
    if results.reliability is not None and not jax.process_index():
        title = f"{workdir}, step {step}"
        evaluation.plot_reliability(results.reliability, workdir / "reliability.png", title)
    return results.values


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _report(workdir: Path, config: ConfigDict) -> None:
    if jax.process_index():
        return
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    curves = workdir / "curves.png"
    evaluation.plot_curves(lines, curves, f"{config.algorithm.name}: {workdir}")
    table = evaluation.closing_table(lines)
    if table is not None:
        console.print(table)
    console.print(f"curves: {curves}\nmeasurements: {workdir / 'metrics.jsonl'}")
