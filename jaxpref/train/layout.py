"""What a run is made of before anything has values: shapes, places, the functions it compiles."""

from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import (
    algorithms,
    config as config_lib,
    models,
    optimizer as optimizer_lib,
    reference as reference_lib,
    weights,
)
from jaxpref.algorithms import Algorithm, Online
from jaxpref.checkpoint import CRITIC
from jaxpref.errors import UserError
from jaxpref.experience.rollouts import MOMENTS
from jaxpref.models import Model
from jaxpref.reference.modes import Mode
from jaxpref.train.critic import Critic
from jaxpref.train.state import State, abstract_state
from jaxpref.train.update import Update, make_update

# Rows of an array in bfloat16 that a TPU keeps together; narrow parts of weights lie transposed.
_COLUMNS = 16


class Layout(NamedTuple):
    """A run as its config says it, on a mesh.

    Attributes:
      config: a checked config.
      opened: its model and tokenizer.
      mesh: over which it is sharded.
      online: the method, if it samples; else None.
      algorithm: the loss of the policy's updates.
      optimizer: of the policy.
      schedule: its learning rate by step.
      critic: the second role, if there is one.
      state: shapes and shardings of the train state.
      frozen: those of the policy's parameters that are not trained, all in float32.
    """

    config: ConfigDict
    opened: weights.Opened
    mesh: Mesh
    online: Online | None
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    schedule: optimizer_lib.Schedule
    critic: Critic | None
    state: State
    frozen: Any

    @property
    def policy(self) -> Model:
        """The policy as a function of a packed batch."""
        return models.packed(self.opened.model, temperature=config_lib.temperature(self.config))

    @property
    def controls(self) -> dict[str, float]:
        """What a method that samples carries from step to step, as it begins."""
        return _controls(self.online)

    def policy_update(self, mode: Mode) -> Update:
        """The policy's update, with a reference of this mode."""
        return make_update(
            self.algorithm,
            self.policy,
            self.optimizer,
            self.schedule,
            reference=mode,
            seed=self.config.seed,
        )

    def critic_update(self) -> Update | None:
        """The critic's update, if there is one."""
        if self.critic is None or self.online is None or self.online.critic is None:
            return None
        return self.critic.update(self.online.critic)


def lay_out(config: ConfigDict, opened: weights.Opened, mesh: Mesh, steps: int) -> Layout:
    """What a run is made of; nothing is computed.

    Args:
      config: a checked config.
      opened: its model and tokenizer.
      mesh: over which it is sharded.
      steps: in all, which the learning rate depends on.

    Raises:
      UserError: no parameter is trained, the critic cannot begin as asked, or TPUs would have too
        small a part of each weight.
    """
    platform = mesh.devices.flat[0].platform
    _check_columns(opened.model.config.width, mesh.shape["fsdp"], platform)
    method = config_lib.method_of(config.algorithm.name)
    online = algorithms.build_online(config) if method.samples else None
    algorithm = algorithms.build(config) if online is None else online.policy
    updates = steps * (1 if online is None else online.epochs * online.minibatches)
    optimizer, schedule = optimizer_lib.build(config.optimizer, updates)
    state, frozen = abstract_state(
        opened.model,
        optimizer,
        mesh,
        config_lib.trainable(config),
        moving_reference=reference_lib.moves(config),
        running=algorithm.running,
        controls=_controls(online),
    )
    critic = None
    if online is not None and online.critic is not None:
        critic = Critic.of(config, opened, mesh, updates)
        state = state._replace(roles={**state.roles, CRITIC: critic.abstract})
    return Layout(
        config, opened, mesh, online, algorithm, optimizer, schedule, critic, state, frozen
    )


def _check_columns(width: int, fsdp: int, platform: str) -> None:
    """Refuses parts of weights so narrow that a TPU would pad them wherever they go."""
    if platform != "tpu" or fsdp == 1 or width // fsdp >= _COLUMNS:
        return
    most = max(width // _COLUMNS, 1)
    raise UserError(
        f"mesh.fsdp is {fsdp}, which leaves a TPU {width // fsdp} of the {width} columns of a "
        f"weight; it should have at least {_COLUMNS}. Set mesh.fsdp to at most {most}, and give "
        "the other devices to mesh.data or mesh.tensor."
    )


def _controls(online: Online | None) -> dict[str, float]:
    return {} if online is None else {**online.controls, **dict.fromkeys(MOMENTS, 0.0)}
