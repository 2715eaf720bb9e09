"""The one train loop: mesh, data, state, resume; then batch, update, log, evaluate, save."""

import dataclasses
import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import (
    algorithms,
    checkpoint,
    config as config_lib,
    data as data_lib,
    evaluation,
    metrics as metrics_lib,
    models,
    optimizer as optimizer_lib,
    packing,
    reference as reference_lib,
    sharding,
    weights,
)
from jaxpref.algorithms import Algorithm, Objective
from jaxpref.data import BatchStream, Data, TokenizedDataset
from jaxpref.errors import UserError
from jaxpref.metrics import Metric, console
from jaxpref.models import Decoder
from jaxpref.packing import Budget, PackedBatch
from jaxpref.reference import Another
from jaxpref.trainable import (
    as_abstract,
    as_array,
    merge,
    partition,
    path_of,
    store_frozen,
)

# In `run.json`: whether the reference has parameters of its own, beside those that are frozen.
_OWN = "reference.own_parameters"


class State(NamedTuple):
    """What a run carries from update to update."""

    step: jax.Array
    params: Any
    optimizer_state: Any
    # The reference, where it moves with the policy (TR-DPO); else {}.
    reference: Any
    # Sums and weights of what the loss reads the mean of, over all steps so far.
    running: dict[str, Metric]

    @property
    def rest(self) -> dict[str, Any]:
        """All that there is but the parameters, as checkpoints keep it."""
        parts = self._asdict().items()
        return {name: part for name, part in parts if name != "params" and jax.tree.leaves(part)}


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
    # Of several processes the first speaks, and writes what is not an array.
    console.quiet = jax.process_index() > 0
    with checkpoint.hold(workdir):
        checkpoint.check_same_run(workdir, checkpoint.describe_run(config))
        with checkpoint.Checkpoints(workdir, config.train.keep) as checkpoints:
            _run(config, workdir, checkpoints)
        _report(workdir, config)


def _run(config: ConfigDict, workdir: Path, checkpoints: checkpoint.Checkpoints) -> None:
    """From the first data to the last checkpoint, in a workdir of this run's own."""
    source = weights.find(config, workdir)
    mesh = sharding.make_mesh(**config.mesh)

    name = config.tokenizer.name
    tokenizer = data_lib.load_tokenizer(
        source.tokenizer if name == "auto" else name, config.tokenizer.chat_template
    )
    model = weights.build_model(config, source, len(tokenizer))
    another = reference_lib.find_another(config, workdir, model, tokenizer)
    algorithm = algorithms.build(config, model, another and another.model)
    method = config_lib.method_of(config.algorithm.name)
    with metrics_lib.progress("tokenising", "examples") as tell:
        data = data_lib.load(config, tokenizer, method.data, progress=tell)
    data_lib.check_batch_size(config, data)
    steps = config.train.steps or max(
        round(config.train.epochs * len(data.train) / config.data.batch_size), 1
    )
    identity = checkpoint.describe_run(config, **data.fingerprints)
    checkpoint.check_same_run(workdir, identity)

    optimizer, schedule = optimizer_lib.build(config.optimizer, steps)
    trainable = config_lib.trainable(config)
    synced = config.reference.mode == "synced"
    abstract, abstract_frozen = abstract_state(
        model, optimizer, mesh, trainable, synced=synced, running=algorithm.running
    )
    start = checkpoints.latest or 0
    if start > steps:
        raise UserError(
            f"{workdir}: is already at step {start}, beyond train.steps = {steps}; ask for "
            "more steps, or give another --workdir."
        )
    if start:
        params, rest = checkpoints.restore(start, abstract.params, abstract.rest)
        state = abstract._replace(params=params, **rest)
        stored = store_frozen(abstract_frozen, config.model.frozen_dtype, convert=as_abstract)
        frozen = checkpoint.restore_frozen(workdir, stored)
    else:
        read_as = "float32" if config.model.frozen_dtype == "float32" else "bfloat16"
        whole = store_frozen(abstract_frozen, read_as, convert=as_abstract)
        whole = merge(abstract.params, whole)
        params, frozen = partition(weights.load(config, source, model, whole), trainable)
        frozen = store_frozen(frozen, config.model.frozen_dtype, convert=as_array)
        state = initial_state(params, optimizer, abstract)
        if synced and another is not None:
            state = state._replace(reference=another.load(mesh, "float32"))
        checkpoint.save_frozen(workdir, frozen)
    reference, tables = _reference(
        config, workdir, mesh, algorithm, another, model, data, state, frozen, abstract
    )
    if config.reference.mode == "adapter" and reference:
        # The adapters that training starts with are on in the reference.
        algorithm = algorithms.build(config, model, model)
    with sharding.use(mesh):
        train_stream, held_out_stream = _streams(config, mesh, data, tables)
        _describe(config, mesh, state, abstract_frozen, data, train_stream, start, steps)
        if not start:
            weights.keep(source, model, workdir)
            checkpoint.write_run(workdir, {**identity, _OWN: bool(reference)})
        update = make_update(
            algorithm,
            optimizer,
            schedule,
            seed=config.seed,
            sync=_sync(config) if synced else None,
            shared=another is None or synced,
        )
        score = make_score(algorithm, shared=another is None or synced)

        def evaluate(state: State, step: int) -> dict[str, float]:
            if held_out_stream is None or data.held_out is None:
                return {}
            results = evaluation.evaluate(
                lambda batch: score(state, frozen, reference, sharding.put_batch(mesh, batch)),
                held_out_stream.once(),
                data.held_out.true_rewards,
                data.held_out.sources,
            )
            metrics_lib.require_finite(step, results.values, checkpoints.kept)
            if results.reliability is not None and not jax.process_index():
                title = f"{workdir}, step {step}"
                picture = workdir / "reliability.png"
                evaluation.plot_reliability(results.reliability, picture, title)
            return results.values

        with (
            _interrupts() as interrupted,
            metrics_lib.Writer(workdir, start=start, steps=steps) as writer,
        ):
            if start == 0:
                counts = {f"data/{name}": float(n) for name, n in data.counts.items()}
                writer.write(0, {**counts, **evaluate(state, 0)})
            log = metrics_lib.Log(
                writer,
                every=config.train.log_every,
                steps=steps,
                epoch=-(-len(data.train) // config.data.batch_size),
                kept=checkpoints.kept,
                resumed=start > 0,
            )
            for step, batch in enumerate(train_stream.batches(start, steps), start=start + 1):
                log.dispatching(step, batch)
                batch = sharding.put_batch(mesh, batch)
                state, measured = update(state, frozen, reference, batch)
                log.dispatched(step, measured)
                # Asked once a step: what is saved and what stops must agree.
                last, stop = step == steps, interrupted(step)
                if last or _due(step, config.train.eval_every):
                    log.settle()
                    writer.write(step, evaluate(state, step))
                    log.pause()
                if last or stop or _due(step, config.train.save_every):
                    log.flush(step)
                    # Only weights that still give finite losses become the last good ones.
                    loss = _weighted_sum(score(state, frozen, reference, batch).loss)
                    after = {"loss after the update": float(loss)}
                    metrics_lib.require_finite(step, after, checkpoints.kept)
                    checkpoints.save(step, state.params, state.rest)
                    log.pause()
                if last or stop:
                    # Awaited here, where a second signal does not kill the save.
                    checkpoints.wait()
                if stop and not last:
                    raise KeyboardInterrupt(
                        f"interrupted after step {step}, which is saved; the same command resumes."
                    )


def abstract_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: str = "",
    *,
    synced: bool = False,
    running: Sequence[str] = (),
) -> tuple[State, Any]:
    """Shapes, dtypes and shardings of the state, without computing anything.

    Like `initial_state` it is called outside `sharding.use`: where parameters go is said
    by their own shardings, and the rules for activations do not fit one row of tokens.

    Args:
      model: the model.
      optimizer: its state belongs to what is trained alone.
      mesh: where the arrays go.
      trainable: a regular expression for the paths of the parameters that are trained.
      synced: whether the state has a reference that moves with the policy.
      running: names of the means that the loss reads.

    Returns:
      The state, and the parameters that are not trained.

    Raises:
      UserError: no parameter is trained.
    """

    def init(key: jax.Array) -> tuple[State, Any]:
        params, frozen = partition(models.init_params(model, key, boxed=True), trainable)
        reference = params if synced else {}
        state = State(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), reference, _zeros(running)
        )
        return state, frozen

    boxed = jax.eval_shape(init, jax.random.key(0))
    if not boxed[0].params:
        names = sorted({path_of(path) for path, _ in jax.tree.leaves_with_path(boxed[1])})
        raise UserError(
            f"train.trainable is {trainable!r}, which is no part of any parameter's path; there "
            f"are {', '.join(names)}."
        )
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        nn.meta.unbox(boxed),
        sharding.shardings(mesh, boxed),
    )


def initial_state(params: Any, optimizer: optax.GradientTransformation, abstract: State) -> State:
    """The state before the first update."""
    where = jax.tree.map(lambda x: x.sharding, abstract)
    optimizer_state = jax.jit(optimizer.init, out_shardings=where.optimizer_state)(params)
    zeros = jax.jit(
        lambda: (jnp.zeros((), jnp.int32), _zeros(abstract.running)),
        out_shardings=(where.step, where.running),
    )
    step, running = zeros()
    # A copy, since the update takes over the policy's buffers.
    reference = jax.tree.map(jnp.copy, params) if jax.tree.leaves(abstract.reference) else {}
    return State(step, params, optimizer_state, reference, running)


def _zeros(running: Iterable[str]) -> dict[str, Metric]:
    return {name: Metric(jnp.zeros(()), jnp.zeros(())) for name in running}


def make_update(
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    seed: int = 0,
    sync: Callable[[jax.Array, Any, Any], Any] | None = None,
    shared: bool = True,
) -> Callable[[State, Any, Any, PackedBatch], tuple[State, dict[str, Metric]]]:
    """The jitted update `(state, frozen, reference, batch)` to a new state and measurements.

    The batch has a leading axis of micro-batches. Each measurement is a sum of weighted
    values and the sum of their weights; the gradient is of the loss's sum, divided once
    by its weight, so that it does not depend on how the batch was cut. Where that weight is 0
    nothing but the step moves on. Only the state's parameters have gradients and optimizer
    state; `frozen` holds the others. With `sync`, `(step, params, reference)` to the next
    reference, the reference is the state's own. What a reference lacks it shares with the
    policy's frozen parameters, unless it is not `shared`.
    """

    def weighted_loss(
        params: Any, frozen: Any, reference: Any, batch: PackedBatch, key: jax.Array
    ) -> tuple[Any, dict]:
        batch = algorithm.prepare(_whole(frozen, reference, shared), batch)
        objective = algorithm.loss(merge(params, frozen), batch, key)
        sums = {
            name: Metric(_weighted_sum(metric), metric.weights.sum())
            for name, metric in {"loss": objective.loss, **objective.metrics}.items()
        }
        return sums["loss"].values, sums

    def pooled(params: Any, frozen: Any, reference: Any, batch: PackedBatch) -> dict[str, Metric]:
        assert algorithm.pooled is not None
        batch = algorithm.prepare(_whole(frozen, reference, shared), batch)
        found = algorithm.pooled(merge(params, frozen), batch)
        return {name: Metric(_weighted_sum(m), m.weights.sum()) for name, m in found.items()}

    gradient = jax.grad(weighted_loss, has_aux=True)

    def update(
        state: State, frozen: Any, reference: Any, batch: PackedBatch
    ) -> tuple[State, dict[str, Metric]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        reference = state.reference if sync else reference
        batch = _with_means(batch, "running", state.running)
        if algorithm.pooled is not None and batch.tokens.shape[0] > 1:
            totals = _over_micro_batches(
                lambda micro, _: pooled(state.params, frozen, reference, micro), batch, key
            )
            batch = _with_means(batch, "pooled", totals)
        gradients, sums = _over_micro_batches(
            lambda micro, key: gradient(state.params, frozen, reference, micro, key), batch, key
        )
        weight = sums["loss"].weights
        trains = weight > 0
        gradients = jax.tree.map(
            lambda g: jnp.where(trains, g / jnp.where(trains, weight, 1), 0), gradients
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        # A batch without any weight says nothing: moments and weight decay would move all the same.
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(trains, new, old),
            (optax.apply_updates(state.params, updates), optimizer_state),
            (state.params, state.optimizer_state),
        )
        for name, value, counts in (
            ("grad_norm", optax.tree.norm(gradients), trains),
            ("param_norm", optax.tree.norm(params), True),
            ("learning_rate", schedule(state.step), True),
        ):
            sums[name] = Metric(*(jnp.asarray(x, jnp.float32) for x in (value, counts)))
        running = {
            name: jax.tree.map(jnp.add, total, sums[name]) for name, total in state.running.items()
        }
        step, reference = state.step + 1, state.reference
        if sync:
            reference = sync(step, params, reference)
        return State(step, params, optimizer_state, reference, running), sums

    return jax.jit(update, donate_argnums=0)


def make_score(
    algorithm: Algorithm, *, shared: bool = True
) -> Callable[[State, Any, Any, PackedBatch], Objective]:
    """The jitted `(state, frozen, reference, batch)` to per-example losses and metrics.

    See `make_update`.
    """

    def score(state: State, frozen: Any, reference: Any, batch: PackedBatch) -> Objective:
        reference = state.reference or reference
        batch = jax.tree.map(lambda x: x[0], _with_means(batch, "running", state.running))
        batch = algorithm.prepare(_whole(frozen, reference, shared), batch)
        return algorithm.loss(merge(state.params, frozen), batch, None)

    return jax.jit(score)


def _with_means(batch: PackedBatch, kind: str, totals: dict[str, Metric]) -> PackedBatch:
    """The batch with the means of some sums as `extras["KIND/NAME"]`, one copy a micro-batch."""
    micro_batches = batch.tokens.shape[0]
    means = {
        f"{kind}/{name}": jnp.broadcast_to(
            total.values / jnp.maximum(total.weights, 1e-8), (micro_batches,)
        )
        for name, total in totals.items()
    }
    return dataclasses.replace(batch, extras={**batch.extras, **means}) if means else batch


def _sync(config: ConfigDict) -> Callable[[jax.Array, Any, Any], Any]:
    """TR-DPO (arXiv 2404.09656), equations 3 and 4: the reference follows the policy."""
    mix, every = config.reference.sync_mix, config.reference.sync_every

    def sync(step: jax.Array, params: Any, reference: Any) -> Any:
        share = jnp.where(step % every == 0, mix, 0.0)
        return jax.tree.map(lambda new, old: share * new + (1 - share) * old, params, reference)

    return sync


def _whole(frozen: Any, reference: Any, shared: bool) -> Any:
    """The reference's parameters: what the policy shares with it, if anything, and its own."""
    return merge(frozen, reference) if shared and reference is not None else reference


def _weighted_sum(metric: Metric) -> jax.Array:
    # A value without weight may be anything, NaN too.
    return jnp.where(metric.weights > 0, metric.values * metric.weights, 0).sum()


def _over_micro_batches(
    function: Callable[[PackedBatch, jax.Array], Any], batch: PackedBatch, key: jax.Array
) -> Any:
    """The sum of `function` over the leading axis."""
    first = jax.tree.map(lambda x: x[0], batch)
    count = batch.tokens.shape[0]
    if count == 1:
        return function(first, key)

    def add(total: Any, micro: tuple[PackedBatch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*micro)), None

    shapes = jax.eval_shape(function, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (batch, jax.random.split(key, count)))[0]


def _with_dtype(abstract: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: as_abstract(x, dtype), abstract)


def _reference(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    algorithm: Algorithm,
    another: Another | None,
    model: Decoder,
    data: Data,
    state: State,
    frozen: Any,
    abstract: State,
) -> tuple[Any, dict[str, np.ndarray]]:
    """The reference's own parameters, if it is needed live, and its log-probs, if precomputed.

    What the policy does not train, the reference shares with it, if it is the policy that
    training starts from. Before the first update the rest comes from that policy, and is kept in
    the workdir; when a run resumes it comes from there, so that nothing else has to be where it
    was. Like `abstract_state` this is called outside `sharding.use`.
    """
    mode, resuming = config.reference.mode, int(state.step) > 0
    dtype = config.reference.dtype
    if mode in ("free", "synced"):
        return None, {}
    if mode == "adapter":
        adapted = (
            (checkpoint.read_run(workdir) or {}).get(_OWN, False)
            if resuming
            else reference_lib.has_adapted(state.params)
        )
        if not adapted:
            # All that it needs is shared: the base.
            return {}, {}
    if mode in ("live", "adapter"):
        own = another.abstract(mesh, dtype) if another else _with_dtype(abstract.params, dtype)
        if resuming:
            return checkpoint.restore_reference(workdir, own), {}
        if another is not None:
            reference = another.load(mesh, dtype)
            another.keep(workdir)
        else:
            # A copy, since the update takes over the policy's buffers.
            reference = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), state.params)
        checkpoint.save_reference(workdir, reference)
        return reference, {}
    sides = {"train": data.train, "held_out": data.held_out}
    present = {name: dataset for name, dataset in sides.items() if dataset is not None}
    # How the reference's sums are made, beside its parameters.
    settings = f"{model.config}, {config.algorithm.get('length_alpha', 1.0)}"
    parts = [dataset.fingerprint() for dataset in present.values()]
    data_fingerprint = "-".join([*parts, hashlib.sha256(settings.encode()).hexdigest()[:16]])
    digest = None
    if not resuming:
        params = another.load(mesh, dtype) if another else merge(state.params, frozen)
        digest = reference_lib.digest(params)
        if another is not None:
            digest += hashlib.sha256(str(another.model.config).encode()).hexdigest()[:8]
    tables = reference_lib.load_table(workdir, data_fingerprint, digest)
    if tables is not None:
        return None, tables
    if resuming:
        raise UserError(
            f"{workdir}: the precomputed log-probs of this run's reference are missing."
        )
    assert algorithm.reference_logps is not None
    score_reference = algorithm.reference_logps
    logps = jax.jit(
        lambda params, batch: score_reference(params, jax.tree.map(lambda x: x[0], batch))
    )
    tables = {}
    for name, dataset in present.items():
        with sharding.use(mesh), metrics_lib.progress("reference log-probs", "examples") as tell:
            tables[name] = reference_lib.precompute(
                lambda batch: logps(params, sharding.put_batch(mesh, batch)),
                _stream(config, mesh, data, dataset, training=False).once(),
                len(dataset),
                tell,
            )
    reference_lib.save_table(workdir, tables, data_fingerprint, str(digest))
    return None, tables


def _stream(
    config: ConfigDict,
    mesh: Mesh,
    data: Data,
    dataset: TokenizedDataset,
    *,
    training: bool,
    table: np.ndarray | None = None,
) -> BatchStream:
    row_length = config.data.row_length or config.data.max_length
    train = data.train
    scored_length = config.data.scored_length or packing.scored_budget(
        train.prompt_lengths, train.response_lengths, row_length, train.scored_lengths
    )
    batch_size, micro_batches = config.data.batch_size, config.train.micro_batches
    if not training:
        # A forward pass alone, over no more at a time than training takes.
        batch_size, micro_batches = batch_size // micro_batches, 1
    return BatchStream(
        dataset,
        batch_size=batch_size,
        budget=Budget(row_length, scored_length, sharding.batch_shards(mesh)),
        seed=config.seed,
        micro_batches=micro_batches,
        extras={} if table is None else {"reference_logps": table},
        weights=data.weights if training else None,
    )


def train_stream(config: ConfigDict, data: Data) -> BatchStream:
    """The batches that a run of the config trains on, but for a reference's log-probs."""
    return _stream(config, sharding.make_mesh(**config.mesh), data, data.train, training=True)


def _streams(
    config: ConfigDict, mesh: Mesh, data: Data, tables: dict[str, np.ndarray]
) -> tuple[BatchStream, BatchStream | None]:
    train = _stream(config, mesh, data, data.train, training=True, table=tables.get("train"))
    if data.held_out is None:
        return train, None
    table = tables.get("held_out")
    return train, _stream(config, mesh, data, data.held_out, training=False, table=table)


@contextmanager
def _interrupts() -> Iterator[Callable[[int], bool]]:
    """Asks, after each step, whether to stop: a first SIGINT or SIGTERM says so.

    A second signal acts as usual. Where several processes train together one of them may get the
    signal alone, but all have to stop after the same step: JAX's own handler of SIGTERM tells the
    others, and they agree.
    """
    seen: list[int] = []
    before: dict[int, Any] = {}
    together = jax.process_count() > 1

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        # Not print: the handler may run in the middle of another write.
        os.write(2, b"\ninterrupted: saving after this step (once more to stop at once)\n")
        restore()
        if together:
            os.kill(os.getpid(), signal.SIGTERM)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        # Handlers belong to the main thread; a caller in another one has its own.
        before.clear()
    try:
        yield multihost_utils.reached_preemption_sync_point if together else lambda _: bool(seen)
    finally:
        restore()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _describe(
    config: ConfigDict,
    mesh: Mesh,
    state: State,
    frozen: Any,
    data: Data,
    stream: BatchStream,
    start: int,
    steps: int,
) -> None:
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    parameters = trained + sum(x.size for x in jax.tree.leaves(frozen))
    optimizer_bytes = sum(x.nbytes for x in jax.tree.leaves(state.optimizer_state))
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
