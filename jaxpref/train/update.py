"""One update of one role, and one look at held-out data: jitted functions of the train state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpref.algorithms import Algorithm, LossInputs, Objective
from jaxpref.experience import Experience
from jaxpref.measurements import Metric, mean, total
from jaxpref.models.protocol import Model, ModelOutput
from jaxpref.packing import PackedBatch, sum_micro_batches
from jaxpref.reference.modes import Free, Mode
from jaxpref.train.state import POLICY, State, Trained
from jaxpref.trainable import merge

# A function (state, frozen, reference, batch) to a new state and its measurements.
Update = Callable[[State, Any, Any, PackedBatch], tuple[State, dict[str, Metric]]]
# A function (number, state, frozen, reference, experience) to the state after a step, and what it
# has measured.
Step = Callable[[int, State, "Frozen", Any, Experience], tuple[State, dict[str, Metric]]]
# A function (state, frozen, reference, batch) to losses and metrics of each example.
EvalStep = Callable[[State, Any, Any, PackedBatch], Objective]


class Frozen(NamedTuple):
    """The parameters that are not trained, by role; {} where there are none."""

    policy: Any
    critic: Any = {}  # noqa: RUF012


def make_update(
    algorithm: Algorithm,
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any] | None = None,
    *,
    reference: Mode | None = None,
    seed: int = 0,
    role: str = POLICY,
) -> Update:
    """The jitted update `(state, frozen, reference, batch)` to a new state and measurements.

    The batch has a leading axis of micro-batches. Each measurement is a sum of weighted
    values and the sum of their weights; the gradient is of the loss's sum, divided once
    by its weight, so that it does not depend on how the batch was cut. Where that weight is 0
    nothing but the step moves on. Only the role's parameters have gradients and optimizer
    state; `frozen` holds the others, `reference` what a reference has of its own, unless it
    moves. The model's auxiliary losses are added here, so that no method has to.

    Args:
      algorithm: the method.
      model: of the role.
      optimizer: of the role.
      schedule: the learning rate by step, for the log; None leaves it out.
      reference: how the reference gives log-probs and moves; None for none.
      seed: of dropout.
      role: whose parameters are trained. Steps are those of the policy: with an update of another
        role neither the step nor the reference moves.
    """
    mode = reference or Free()

    def weighted_loss(
        params: Any,
        state: State,
        frozen: Any,
        held: Any,
        pooled: Mapping[str, jax.Array],
        batch: PackedBatch,
        key: jax.Array,
    ) -> tuple[Any, dict]:
        running = {name: mean(sums) for name, sums in state.running.items()}
        said = _read_reference(algorithm, mode, state, held, frozen, batch)
        inputs = LossInputs(said, running, pooled)
        output = model(merge(params, frozen), batch, key)
        objective = _with_auxiliary(algorithm.loss(output, batch, inputs), output)
        sums = {
            name: total(metric)
            for name, metric in {"loss": objective.loss, **objective.metrics}.items()
        }
        return sums["loss"].values, sums

    gradient = jax.grad(weighted_loss, has_aux=True)

    def update(
        state: State, frozen: Any, held: Any, batch: PackedBatch
    ) -> tuple[State, dict[str, Metric]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params, moments = state.roles[role]

        def read(micro: PackedBatch) -> tuple[ModelOutput, LossInputs]:
            said = _read_reference(algorithm, mode, state, held, frozen, micro)
            return model(merge(params, frozen), micro), LossInputs(said)

        pooled = _pooled(algorithm, read, batch)

        def gradients_of(micro: PackedBatch, number: jax.Array) -> tuple[Any, dict]:
            of_part = jax.random.fold_in(key, number)
            return gradient(params, state, frozen, held, pooled, micro, of_part)

        gradients, sums = sum_micro_batches(gradients_of, batch)
        weight = sums["loss"].weights
        trains = weight > 0
        gradients = jax.tree.map(
            lambda g: jnp.where(trains, g / jnp.where(trains, weight, 1), 0), gradients
        )
        updates, new_moments = optimizer.update(gradients, moments, params)
        # A batch without any weight says nothing: moments and weight decay would move all the same.
        trained = jax.tree.map(
            lambda new, old: jnp.where(trains, new, old),
            Trained(optax.apply_updates(params, updates), new_moments),
            Trained(params, moments),
        )
        more = {
            "grad_norm": (optax.tree.norm(gradients), trains),
            "param_norm": (optax.tree.norm(trained.params), True),
        }
        if schedule is not None:
            more["learning_rate"] = (schedule(state.step), True)
        for name, (value, counts) in more.items():
            sums[name] = Metric(*(jnp.asarray(x, jnp.float32) for x in (value, counts)))
        state = state._replace(roles={**state.roles, role: trained})
        if role != POLICY:
            return state, sums
        step = state.step + 1
        moved = mode.moved(step, trained.params, state.reference)
        running = {
            name: jax.tree.map(jnp.add, so_far, sums[name])
            for name, so_far in state.running.items()
        }
        return state._replace(step=step, reference=moved, running=running), sums

    return jax.jit(update, donate_argnums=0)


def make_step(
    policy: Update,
    critic: Update | None = None,
    *,
    epochs: int = 1,
    stop_kl: float = 0.0,
    warmup: int = 0,
) -> Step:
    """All updates of a step: `(number, state, frozen, reference, experience)` to a new state.

    Args:
      policy: the policy's update.
      critic: the critic's, which comes before the policy's; what is measured of it has the prefix
        `val/`.
      epochs: passes over the batches.
      stop_kl: KL of a token to the policy that sampled after which there are no more updates; 0:
        never.
      warmup: first steps in which the critic alone is trained.
    """

    def step(
        number: int, state: State, frozen: Frozen, reference: Any, experience: Experience
    ) -> tuple[State, dict[str, Metric]]:
        measured = dict(experience.measured)
        for batch in (b for _ in range(epochs) for b in experience.batches):
            if critic is not None:
                state, found = critic(state, frozen.critic, {}, batch)
                _add(measured, {f"val/{name}": metric for name, metric in found.items()})
            if number <= warmup:
                continue
            state, found = policy(state, frozen.policy, reference, batch)
            _add(measured, found)
            if stop_kl and float(mean(found["policy/approx_kl"])) > stop_kl:
                break
        return state._replace(controls={**state.controls, **experience.controls}), measured

    return step


def _add(measured: dict[str, Metric], found: Mapping[str, Metric]) -> None:
    for name, metric in found.items():
        before = measured.get(name)
        measured[name] = metric if before is None else jax.tree.map(jnp.add, before, metric)


def make_eval_step(
    algorithm: Algorithm, model: Model, *, reference: Mode | None = None, role: str = POLICY
) -> EvalStep:
    """The jitted `(state, frozen, reference, batch)` to per-example losses and metrics.

    See `make_update` for the arguments.
    """
    mode = reference or Free()

    def eval_step(state: State, frozen: Any, held: Any, batch: PackedBatch) -> Objective:
        running = {name: mean(sums) for name, sums in state.running.items()}
        params = merge(state.roles[role].params, frozen)

        def inputs(micro: PackedBatch, pooled: Mapping[str, jax.Array]) -> LossInputs:
            said = _read_reference(algorithm, mode, state, held, frozen, micro)
            return LossInputs(said, running, pooled)

        pooled = _pooled(algorithm, lambda micro: (model(params, micro), inputs(micro, {})), batch)

        def look(micro: PackedBatch, _: jax.Array) -> dict[str, Metric]:
            output = model(params, micro)
            found = algorithm.loss(output, micro, inputs(micro, pooled))
            objective = _with_auxiliary(found, output)
            named = {"loss": objective.loss, **objective.metrics}
            return {name: _weighted(metric) for name, metric in named.items()}

        # An example is in one micro-batch, and has no weight in the others.
        sums = sum_micro_batches(look, batch)
        metrics = {
            name: Metric(values / jnp.where(weights > 0, weights, 1), weights)
            for name, (values, weights) in sums.items()
        }
        return Objective(metrics.pop("loss"), metrics)

    return jax.jit(eval_step)


def _pooled(
    algorithm: Algorithm,
    read: Callable[[PackedBatch], tuple[ModelOutput, LossInputs]],
    batch: PackedBatch,
) -> Mapping[str, jax.Array]:
    """What a method reads the means of over a whole batch, where that is cut."""
    pooled = algorithm.pooled
    if pooled is None or batch.tokens.shape[0] == 1:
        return {}

    def sums(micro: PackedBatch, _: jax.Array) -> dict[str, Metric]:
        output, inputs = read(micro)
        return {name: total(found) for name, found in pooled(output, micro, inputs).items()}

    found = sum_micro_batches(sums, batch)
    return {name: mean(of_name) for name, of_name in found.items()}


def _weighted(metric: Metric) -> Metric:
    """The values times their weights, where there is any."""
    values, weights = (jnp.asarray(x) for x in metric)
    return Metric(jnp.where(weights > 0, values * weights, 0), weights)


def _read_reference(
    algorithm: Algorithm, mode: Mode, state: State, held: Any, frozen: Any, batch: PackedBatch
) -> Any:
    if algorithm.reference_logps is None:
        return None
    own = state.reference if mode.moves else held
    return mode.logps(algorithm.reference_logps, own, frozen, batch)


def _with_auxiliary(objective: Objective, output: ModelOutput) -> Objective:
    """The objective with the model's own losses added to each example's, and logged."""
    (values, weights), metrics = objective
    for name, value in output.auxiliary.items():
        added = Metric(jnp.broadcast_to(value, values.shape), weights)
        values, metrics = values + added.values, {**metrics, name: added}
    return Objective(Metric(values, weights), metrics)
