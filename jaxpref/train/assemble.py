"""From a config to all that the loop needs: mesh, state, reference, data, jitted functions."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import (
    algorithms,
    checkpoint,
    config as config_lib,
    data as data_lib,
    evaluation,
    experience,
    identity as identity_lib,
    processes,
    reference as reference_lib,
    sharding,
    weights,
)
from jaxpref.checkpoint import CRITIC
from jaxpref.data import Data
from jaxpref.data.synthetic import true_rewards
from jaxpref.errors import UserError
from jaxpref.interrupts import StoppedError
from jaxpref.measurements import Metric, total
from jaxpref.packing import Budget, PackedBatch
from jaxpref.terminal import console, progress
from jaxpref.train import evaluations
from jaxpref.train.begun import Begun
from jaxpref.train.layout import Layout, lay_out
from jaxpref.train.state import POLICY, State, initial_state
from jaxpref.train.update import (
    Frozen,
    Step,
    make_eval_step,
    make_step,
)
from jaxpref.trainable import as_abstract, store_frozen
from jaxpref.workdir import AnyPath


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
      source: gives what a step trains on.
      step: see `make_step`.
      evaluate: what is measured on held-out data, with the prefix `eval/`.
      loss_after: of a step's experience once more, or another number that is finite as long as
        the state is good.
      patience: steps after which a run without any gradient is given up.
      largest_kl: KL to the reference at which the run stops; 0: never.
      samples: whether the policy samples what it is trained on.
    """

    mesh: Mesh
    data: Data
    start: int
    steps: int
    state: State
    frozen: Frozen
    reference: Any
    source: experience.Source
    step: Step
    evaluate: evaluations.Evaluate
    loss_after: Callable[[State, experience.Experience], float]
    patience: int
    largest_kl: float = 0.0
    samples: bool = False


def assemble(config: ConfigDict, workdir: AnyPath, checkpoints: checkpoint.Checkpoints) -> Training:
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
    identity = identity_lib.describe(config, **data.fingerprints)
    processes.agree(identity)
    identity_lib.check_same(workdir, identity, begun=checkpoints.latest is not None)

    layout = lay_out(config, opened, mesh, steps)
    abstract, critic = layout.state, layout.critic
    start = checkpoints.latest or 0
    if start > steps:
        raise UserError(
            f"{workdir}: is already at step {start}, beyond train.steps = {steps}; ask for "
            "more steps, or give another --workdir."
        )
    if start:
        state = abstract.with_parts(*checkpoints.restore(start, abstract.params, abstract.rest))
        params, frozen = state.policy, _restore_frozen(config, workdir, layout.frozen)
    else:
        params, frozen = weights.load_first(config, opened, abstract.policy, layout.frozen)
        checkpoint.save_frozen(workdir, frozen)
    reference = reference_lib.start(
        reference_lib.Start(
            config=config,
            workdir=workdir,
            mesh=mesh,
            decoder=opened.model,
            another=another,
            algorithm=layout.algorithm,
            data=data,
            policy=params,
            frozen=frozen,
            resuming=start > 0,
        )
    )
    if not start:
        state = initial_state(
            params,
            layout.optimizer,
            running=layout.algorithm.running,
            reference=reference.moving,
            controls=layout.controls,
            abstract=abstract,
        )
        if critic is not None:
            state = state._replace(roles={**state.roles, CRITIC: critic.first(params, frozen)})

    columns = {side: {reference_lib.COLUMN: x} for side, x in reference.columns.items()}
    begun = Begun(
        config=config,
        workdir=workdir,
        mesh=mesh,
        opened=opened,
        another=another,
        data=data,
        columns=columns,
        state=state,
        frozen=frozen,
        reference=reference,
        start=start,
        steps=steps,
    )
    training = (_offline if layout.online is None else _online)(begun, layout)
    if not start:
        weights.keep(opened.source, opened.model, workdir)
        identity_lib.write(workdir, {**identity, **reference_lib.describe(reference)})
    return training


def _training(begun: Begun, source: experience.Source, step: Step, **others: Any) -> Training:
    """The run, with what is peculiar to it."""
    epoch = -(-len(begun.data.train) // begun.config.data.batch_size)
    return Training(
        mesh=begun.mesh,
        data=begun.data,
        start=begun.start,
        steps=begun.steps,
        state=begun.state,
        reference=begun.reference.params,
        source=source,
        step=step,
        **{"frozen": Frozen(begun.frozen), "patience": epoch, **others},
    )


def _offline(begun: Begun, layout: Layout) -> Training:
    """A run on data."""
    data, mesh, mode = begun.data, begun.mesh, begun.reference.mode
    update = layout.policy_update(mode)
    eval_step = make_eval_step(layout.algorithm, layout.policy, reference=mode)
    put = partial(sharding.put_batch, mesh)
    stream = begun.stream("train", training=True)
    held_out = None if data.held_out is None else begun.stream("held_out", training=False)
    sampled = evaluations.of_run_on_data(begun)
    _describe(begun, layout.frozen, stream.budget)

    def look(state: State, batch: PackedBatch) -> algorithms.Objective:
        processes.beat()
        return eval_step(state, begun.frozen, begun.reference.params, batch)

    def evaluate(step: int, state: State, stopping: Callable[[], bool]) -> dict[str, float]:
        if held_out is None or data.held_out is None:
            return {}

        def look_or_stop(batch: PackedBatch) -> algorithms.Objective:
            if stopping():
                raise StoppedError("an evaluation was stopped.")
            return look(state, put(batch))

        results = evaluation.evaluate(
            look_or_stop,
            held_out.once(),
            data.held_out.true_rewards,
            data.held_out.sources,
        )
        if results.reliability is not None and not jax.process_index():
            title = f"{begun.workdir}, step {step}"
            evaluation.plot_reliability(
                results.reliability, begun.workdir / "reliability.png", title
            )
        return {**results.values, **sampled(step, state, stopping)}

    def loss_after(state: State, given: experience.Experience) -> float:
        return float(total(look(state, given.batches[0]).loss).values)

    source = experience.offline(stream, begun.start, begun.steps, put)
    return _training(begun, source, make_step(update), evaluate=evaluate, loss_after=loss_after)


def _online(begun: Begun, layout: Layout) -> Training:
    """A run on what the policy samples."""
    config, data, mesh = begun.config, begun.data, begun.mesh
    online, critic = layout.online, layout.critic
    assert online is not None
    budget = experience.budget_of(
        config, mesh, samples=config.sampling.samples, scored_length=config.data.scored_length
    )
    parts = experience.Parts(
        **evaluations.shared_parts(begun, budget),
        mode=begun.reference.mode,
        rewards=evaluations.build_rewards(begun, data.train),
        true_rewards=true_rewards if config.data.format == "synthetic" else None,
        online=online,
        critic=None if critic is None else critic.model,
        critic_frozen={} if critic is None else critic.frozen(begun.frozen),
    )
    stream = begun.stream("train", training=True)
    source = experience.Rollouts(parts, experience.Prompts(data.train, stream), begun.workdir)
    evaluate = evaluations.of_run_on_samples(begun, parts)
    _describe(begun, layout.frozen, parts.budget)
    updates = make_step(
        layout.policy_update(begun.reference.mode),
        layout.critic_update(),
        epochs=online.epochs,
        stop_kl=online.stop_kl,
        warmup=0 if critic is None else config.critic.warmup,
    )

    def step(number: int, state: State, *given: Any) -> tuple[State, dict[str, Metric]]:
        began = time.monotonic()
        state, measured = updates(number, state, *given)
        jax.block_until_ready(state.roles)
        seconds = np.asarray(time.monotonic() - began, np.float32)
        return state, {**measured, "perf/update_seconds": Metric(seconds, np.ones_like(seconds))}

    def loss_after(state: State, given: experience.Experience) -> float:
        # What was sampled is the old policy's; that the parameters are finite is what counts.
        return float(optax.tree.norm(state.policy))

    return _training(
        begun,
        source,
        step,
        evaluate=evaluate,
        loss_after=loss_after,
        frozen=Frozen(begun.frozen, parts.critic_frozen),
        patience=len(data.train),
        largest_kl=online.largest_kl,
        samples=True,
    )


def _load(config: ConfigDict, tokenizer: Any) -> Data:
    with progress("tokenising", "examples") as tell:
        data = data_lib.load(config, tokenizer, config_lib.data_kind(config), progress=tell)
    data_lib.check_batch_size(config, data)
    return data


def _restore_frozen(config: ConfigDict, workdir: AnyPath, abstract: Any) -> Any:
    stored = store_frozen(abstract, config.model.frozen_dtype, convert=as_abstract)
    return checkpoint.restore_frozen(workdir, stored)


def _describe(begun: Begun, abstract_frozen: Any, budget: Budget) -> None:
    """Tells in the terminal what is about to be trained."""
    config, data, state, steps = begun.config, begun.data, begun.state, begun.steps
    trained = sum(x.size for x in jax.tree.leaves(state.policy))
    parameters = trained + sum(x.size for x in jax.tree.leaves(abstract_frozen))
    optimizer_bytes = sum(x.nbytes for x in jax.tree.leaves(state.roles[POLICY].optimizer_state))
    axes = " x ".join(f"{name} {size}" for name, size in begun.mesh.shape.items())
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in data.counts.items())
    console.print(f"model: {parameters / 1e6:.1f}M parameters; mesh: {axes} ({jax.devices()[0]})")
    for sentence in sharding.not_split(state.params, frozen=abstract_frozen):
        console.print(sentence)
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
    for knob in ("train.eval_every", "eval.win_rate_prompts"):
        if config_lib.get(config, knob) and data.held_out is None:
            console.print(f"{knob} has no effect, since no data is held out")
    samples = ""
    if config_lib.method_of(config.algorithm.name).samples:
        samples = f", {config.sampling.samples} responses each"
        every = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        cut = [name for name, all in every.items() if config.sampling[name] != all]
        if cut:
            console.print(
                f"sampling.{cut[0]} is {config.sampling[cut[0]]}: the policy is trained on what a "
                "truncated one has said, and sampling/kept_mass says how much of it that is"
            )
    console.print(
        f"{config.algorithm.name}: {steps} steps of {config.data.batch_size} examples{samples}, "
        f"rows of {budget.row_length} tokens with {budget.scored_length} scored"
        + (f"; resuming after step {begun.start}" if begun.start else "")
    )
