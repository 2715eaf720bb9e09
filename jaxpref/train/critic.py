"""The critic: a second role, with a model, an optimizer and frozen parameters of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import checkpoint, identity, models, optimizer as optimizer_lib, weights
from jaxpref.algorithms import Algorithm
from jaxpref.checkpoint import CRITIC
from jaxpref.errors import UserError
from jaxpref.models import Decoder
from jaxpref.models.protocol import Model
from jaxpref.train.state import Trained, abstract_role
from jaxpref.train.update import Update, make_update
from jaxpref.trainable import merge
from jaxpref.workdir import as_path

# With adapters the base is the policy's own, which both read.
_ADAPTERS = r"_lora_[ab]$|^score$"


@dataclasses.dataclass(frozen=True)
class Critic:
    """A critic before it has values.

    Attributes:
      config: of the run.
      decoder: the policy's, with a scalar head.
      optimizer: of the critic.
      abstract: shapes and shardings of what it trains.
    """

    config: ConfigDict
    decoder: Decoder
    optimizer: optax.GradientTransformation
    abstract: Trained

    @classmethod
    def of(cls, config: ConfigDict, opened: weights.Opened, mesh: Mesh, updates: int) -> "Critic":
        """The critic that a config asks for.

        Raises:
          UserError: it cannot begin as asked.
        """
        if config.critic.init_from and config.model.lora.rank:
            raise UserError(
                f"critic.init_from is {config.critic.init_from!r}, but with model.lora.rank the "
                "critic is adapters on the policy's frozen base; leave it empty."
            )
        _check_begin(config)
        own = ConfigDict(config.optimizer)
        own.learning_rate, own.clip_norm = config.critic.learning_rate, config.critic.clip_norm
        optimizer, _ = optimizer_lib.build(own, updates)
        decoder = models.as_scalar(opened.model)
        trainable = _ADAPTERS if config.model.lora.rank else ""
        abstract, _ = abstract_role(decoder, optimizer, mesh, trainable)
        return cls(config, decoder, optimizer, abstract)

    @property
    def model(self) -> Model:
        """As a function of a packed batch."""
        return models.packed(self.decoder)

    def frozen(self, policy: Any) -> Any:
        """What the critic does not train, of the policy's frozen parameters."""
        if not self.config.model.lora.rank:
            return {}
        return {name: part for name, part in policy.items() if name not in ("head", "head_bias")}

    def first(self, policy: Any, frozen: Any) -> Trained:
        """The critic before its first update, from the policy's first parameters.

        Args:
          policy: those that are trained.
          frozen: those that are not.
        """
        abstract = self.abstract.params
        if self.config.critic.init_from:
            params, _ = checkpoint.restore_params(as_path(self.config.critic.init_from), abstract)
        else:
            zeros = jax.jit(
                lambda: jnp.zeros(abstract["score"].shape, abstract["score"].dtype),
                out_shardings=abstract["score"].sharding,
            )
            # It trains adapters where the policy does, and all of its parameters elsewhere.
            lora = self.config.model.lora.rank
            whole = policy if lora else models.dequantize(merge(policy, frozen))
            whole = {**whole, "score": zeros()}
            # These are copies, since each role's update takes over its own buffers.
            params = {
                name: jax.tree.map(
                    lambda like, x: jnp.array(x, like.dtype, copy=True), part, whole[name]
                )
                for name, part in abstract.items()
            }
        of_optimizer = jax.tree.map(lambda x: x.sharding, self.abstract.optimizer_state)
        init = jax.jit(self.optimizer.init, out_shardings=of_optimizer)
        return Trained(params, init(params))

    def update(self, algorithm: Algorithm) -> Update:
        """Its update by a loss."""
        return make_update(
            algorithm, self.model, self.optimizer, seed=self.config.seed, role=CRITIC
        )


def _check_begin(config: ConfigDict) -> None:
    path = config.critic.init_from
    run = identity.read(as_path(path)) if path else None
    if path and (run is None or run["algorithm.name"] != "reward"):
        raise UserError(
            f"critic.init_from={path}: should be the workdir of a run of algorithm reward."
        )
