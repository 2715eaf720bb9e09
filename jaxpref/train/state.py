"""The train state: what each role has trained so far, and what moves along with it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpref import models, sharding
from jaxpref.checkpoint import POLICY
from jaxpref.errors import UserError
from jaxpref.measurements import Metric
from jaxpref.models import Decoder
from jaxpref.trainable import partition, path_of


class Trained(NamedTuple):
    """What a role has trained: parameters, and the optimizer's state for them."""

    params: Any
    optimizer_state: Any


class State(NamedTuple):
    """What a run carries from update to update.

    Attributes:
      step: updates of the policy so far.
      roles: what is trained, by role.
      reference: the reference's parameters, where they move with the policy; else {}.
      running: sums and weights of what the loss reads the mean of, over all steps so far.
      controls: numbers that a method which samples carries from step to step, by name.
    """

    step: jax.Array
    roles: Mapping[str, Trained]
    reference: Any
    running: dict[str, Metric]
    controls: Mapping[str, jax.Array] = {}

    @property
    def policy(self) -> Any:
        """The policy's trained parameters."""
        return self.roles[POLICY].params

    @property
    def params(self) -> dict[str, Any]:
        """The trained parameters, by role."""
        return {role: trained.params for role, trained in self.roles.items()}

    @property
    def rest(self) -> dict[str, Any]:
        """All that there is but the parameters, as checkpoints keep it."""
        parts = {
            "step": self.step,
            "optimizer_state": {role: t.optimizer_state for role, t in self.roles.items()},
            "reference": self.reference,
            "running": self.running,
            "controls": self.controls,
        }
        return {name: part for name, part in parts.items() if jax.tree.leaves(part)}

    def with_parts(self, params: Mapping[str, Any], rest: Mapping[str, Any]) -> "State":
        """The state of `params` and `rest`, as a checkpoint gave them back."""
        rest = dict(rest)
        moments = rest.pop("optimizer_state", {})
        roles = {
            role: Trained(params[role], moments.get(role, trained.optimizer_state))
            for role, trained in self.roles.items()
        }
        return self._replace(roles=roles, **rest)


def abstract_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: str = "",
    *,
    moving_reference: bool = False,
    running: Sequence[str] = (),
    controls: Iterable[str] = (),
) -> tuple[State, Any]:
    """Shapes, dtypes and shardings of the state, without computing anything.

    Like `initial_state` it is called outside `sharding.use`: where parameters go is said
    by their own shardings, and the rules for activations do not fit one row of tokens.

    Args:
      model: the policy's.
      optimizer: its state belongs to what is trained alone.
      mesh: where the arrays go.
      trainable: a regular expression for the paths of the parameters that are trained.
      moving_reference: whether the state has a reference that moves with the policy.
      running: names of the means that the loss reads.
      controls: names of what a method that samples carries from step to step.

    Returns:
      The state, and the parameters that are not trained.

    Raises:
      UserError: no parameter is trained.
    """

    def init(key: jax.Array) -> tuple[State, Any]:
        params, frozen = partition(models.init_params(model, key, boxed=True), trainable)
        policy = Trained(params, optimizer.init(params))
        reference = params if moving_reference else {}
        numbers = {name: jnp.zeros(()) for name in controls}
        step = jnp.zeros((), jnp.int32)
        return State(step, {POLICY: policy}, reference, _zeros(running), numbers), frozen

    boxed = jax.eval_shape(init, jax.random.key(0))
    if not boxed[0].policy:
        names = sorted({path_of(path) for path, _ in jax.tree.leaves_with_path(boxed[1])})
        raise UserError(
            f"train.trainable is {trainable!r}, which is no part of any parameter's path; there "
            f"are {', '.join(names)}."
        )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        sharding.shardings(mesh, boxed),
    )


def initial_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    running: Sequence[str] = (),
    reference: Any = None,
    controls: Mapping[str, float] | None = None,
    abstract: State | None = None,
) -> State:
    """The state before the first update.

    Args:
      params: the policy's trained parameters; the update will take over their buffers.
      optimizer: its state is made for them.
      running: names of the means that the loss reads, see `Algorithm.running`.
      reference: the reference's parameters, where they move with the policy.
      controls: what a method that samples carries from step to step, as it begins.
      abstract: says where everything goes; by default JAX decides.
    """
    of_optimizer, of_zeros = None, None
    if abstract is not None:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        of_optimizer = shardings.roles[POLICY].optimizer_state
        of_zeros = shardings.step, shardings.running, shardings.controls
    init = jax.jit(optimizer.init, out_shardings=of_optimizer)

    def first() -> tuple[jax.Array, dict[str, Metric], dict[str, jax.Array]]:
        numbers = {name: jnp.float32(value) for name, value in (controls or {}).items()}
        return jnp.zeros((), jnp.int32), _zeros(running), numbers

    step, means, numbers = jax.jit(first, out_shardings=of_zeros)()
    policy = Trained(params, init(params))
    return State(step, {POLICY: policy}, {} if reference is None else reference, means, numbers)


def abstract_role(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: str = "",
) -> tuple[Trained, Any]:
    """Shapes, dtypes and shardings of another role's part of the state.

    Args:
      model: the role's.
      optimizer: the role's.
      mesh: where the arrays go.
      trainable: see `abstract_state`.

    Returns:
      What the role trains, and the parameters that it does not.
    """
    state, frozen = abstract_state(model, optimizer, mesh, trainable)
    return state.roles[POLICY], frozen


def _zeros(running: Iterable[str]) -> dict[str, Metric]:
    return {name: Metric(jnp.zeros(()), jnp.zeros(())) for name in running}
