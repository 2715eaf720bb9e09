"""From a config to all that the loop needs: mesh, state, reference, data, jitted functions."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import (
    algorithms,
    checkpoint,
    config as config_lib,
    data as data_lib,
    experience,
    models,
    optimizer as optimizer_lib,
    reference as reference_lib,
    sharding,
    weights,
)
from jaxpref.data import BatchStream, Data
from jaxpref.errors import UserError
from jaxpref.packing import PackedBatch
from jaxpref.terminal import console, progress
from jaxpref.train.state import POLICY, State, abstract_state, initial_state
from jaxpref.train.update import EvalStep, Update, make_eval_step, make_update
from jaxpref.trainable import as_abstract, as_array, merge, partition, store_frozen


class Training(NamedTuple):
    """A run that is ready to train.

    Attributes:
      mesh: over which it is sharded.
      data: what is trained on and held out.
      start: steps that it has behind it.
      steps: steps in all.
      state: after step `start`.
      frozen: the parameters that are not trained.
      reference: the reference's own parameters, where they do not move.
      source: gives the batch of a step.
      held_out: every held-out example once; None if there is none.
      update: see `make_update`.
      eval_step: see `make_eval_step`.
    """

    mesh: Mesh
    data: Data
    start: int
    steps: int
    state: State
    frozen: Any
    reference: Any
    source: experience.Source
    held_out: BatchStream | None
    update: Update
    eval_step: EvalStep

    def put(self, batch: PackedBatch) -> PackedBatch:
        """The batch on the devices."""
        return sharding.put_batch(self.mesh, batch)


def assemble(config: ConfigDict, workdir: Path, checkpoints: checkpoint.Checkpoints) -> Training:
    """Opens a run, from its first weights or from its last checkpoint.

    Args:
      config: checked.
      workdir: a workdir of this run's own, which receives what a later run needs to go on.
      checkpoints: of the workdir.

    Raises:
      UserError: something that the user gave cannot be used, or the run cannot go on.
    """
    opened = weights.open_run(config, workdir)
    mesh = sharding.make_mesh(**config.mesh)
    another = reference_lib.find_another(config, workdir, opened.model, opened.tokenizer)
    data = _load(config, opened.tokenizer)
    steps = config.train.steps or max(
        round(config.train.epochs * len(data.train) / config.data.batch_size), 1
    )
    identity = checkpoint.describe_run(config, **data.fingerprints)
    checkpoint.check_same_run(workdir, identity)

    algorithm = algorithms.build(config)
    optimizer, schedule = optimizer_lib.build(config.optimizer, steps)
    abstract, abstract_frozen = abstract_state(
        opened.model,
        optimizer,
        mesh,
        config_lib.trainable(config),
        moving_reference=reference_lib.moves(config),
        running=algorithm.running,
    )
    start = checkpoints.latest or 0
    if start > steps:
        raise UserError(
            f"{workdir}: is already at step {start}, beyond train.steps = {steps}; ask for "
            "more steps, or give another --workdir."
        )
    if start:
        state = abstract.with_parts(*checkpoints.restore(start, abstract.params, abstract.rest))
        params, frozen = state.policy, _restore_frozen(config, workdir, abstract_frozen)
    else:
        params, frozen = _first_weights(config, opened, abstract, abstract_frozen)
        checkpoint.save_frozen(workdir, frozen)
    reference = reference_lib.start(
        reference_lib.Start(
            config=config,
            workdir=workdir,
            mesh=mesh,
            decoder=opened.model,
            another=another,
            algorithm=algorithm,
            data=data,
            policy=params,
            frozen=frozen,
            resuming=start > 0,
        )
    )
    if not start:
        state = initial_state(
            params,
            optimizer,
            running=algorithm.running,
            reference=reference.moving,
            abstract=abstract,
        )

    def stream(side: str, *, training: bool) -> BatchStream:
        columns = {reference_lib.COLUMN: reference.columns[side]} if reference.columns else {}
        return data_lib.stream_of(config, data, side, mesh, training=training, columns=columns)

    with sharding.use(mesh):
        train_stream = stream("train", training=True)
        _describe(config, mesh, state, abstract_frozen, data, train_stream, start, steps)
        if not start:
            weights.keep(opened.source, opened.model, workdir)
            checkpoint.write_run(workdir, {**identity, **reference_lib.describe(reference)})
        model = models.packed(opened.model)
        return Training(
            mesh=mesh,
            data=data,
            start=start,
            steps=steps,
            state=state,
            frozen=frozen,
            reference=reference.params,
            source=experience.offline(train_stream, start, steps),
            held_out=None if data.held_out is None else stream("held_out", training=False),
            update=make_update(
                algorithm, model, optimizer, schedule, reference=reference.mode, seed=config.seed
            ),
            eval_step=make_eval_step(algorithm, model, reference=reference.mode),
        )


def _load(config: ConfigDict, tokenizer: Any) -> Data:
    with progress("tokenising", "examples") as tell:
        data = data_lib.load(config, tokenizer, config_lib.data_kind(config), progress=tell)
    data_lib.check_batch_size(config, data)
    return data


def _restore_frozen(config: ConfigDict, workdir: Path, abstract: Any) -> Any:
    stored = store_frozen(abstract, config.model.frozen_dtype, convert=as_abstract)
    return checkpoint.restore_frozen(workdir, stored)


def _first_weights(
    config: ConfigDict, opened: weights.Opened, abstract: State, abstract_frozen: Any
) -> tuple[Any, Any]:
    """The first parameters: those that are trained, and the others as they are kept."""
    dtype = config.model.frozen_dtype
    read_as = "float32" if dtype == "float32" else "bfloat16"
    whole = merge(abstract.policy, store_frozen(abstract_frozen, read_as, convert=as_abstract))
    params, frozen = partition(
        weights.load(config, opened.source, opened.model, whole), config_lib.trainable(config)
    )
    return params, store_frozen(frozen, dtype, convert=as_array)


def _describe(
    config: ConfigDict,
    mesh: Mesh,
    state: State,
    abstract_frozen: Any,
    data: Data,
    stream: BatchStream,
    start: int,
    steps: int,
) -> None:
    """Tells in the terminal what is about to be trained."""
    trained = sum(x.size for x in jax.tree.leaves(state.policy))
    parameters = trained + sum(x.size for x in jax.tree.leaves(abstract_frozen))
    optimizer_bytes = sum(x.nbytes for x in jax.tree.leaves(state.roles[POLICY].optimizer_state))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in data.counts.items())
    console.print(f"model: {parameters / 1e6:.1f}M parameters; mesh: {axes} ({jax.devices()[0]})")
    if trained < parameters:
        console.print(
            f"trained: {trained:,} of {parameters:,} parameters, with "
            f"{optimizer_bytes / 1e6:.1f} MB of optimizer state"
        )
    for note in data.notes:
        console.print(f"data: {note}")
    console.print(f"data: {counts}")
    if 0 < steps <= (warmup := config.optimizer.warmup_steps):
        console.print(
            f"optimizer.warmup_steps is {warmup}, which this run of {steps} steps does not reach: "
            f"the learning rate stays below {config.optimizer.learning_rate}"
        )
    if config.train.eval_every and data.held_out is None:
        console.print("train.eval_every has no effect, since no data is held out")
    console.print(
        f"{config.algorithm.name}: {steps} steps of {config.data.batch_size} examples, rows of "
        f"{stream.budget.row_length} tokens with {stream.budget.scored_length} scored"
        + (f"; resuming after step {start}" if start else "")
    )
