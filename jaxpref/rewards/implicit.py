"""The implicit reward of a policy: what it has come to prefer, compared with its reference."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxpref import config as config_lib, reference as reference_lib, weights
from jaxpref.algorithms import response_logps
from jaxpref.errors import UserError
from jaxpref.methods import METHODS
from jaxpref.models import packed
from jaxpref.packing import PackedBatch
from jaxpref.rewards.scoring import Scorer
from jaxpref.trainable import merge, partition
from jaxpref.workdir import AnyPath, as_path


class Policies(NamedTuple):
    """The parameters of a policy and of its reference.

    Attributes:
      trained: what the policy's run has trained.
      frozen: the policy's other parameters, which the reference may share.
      reference: the reference's own.
    """

    trained: Any
    frozen: Any
    reference: Any


class ImplicitReward(Scorer):
    """The reward that a run of a method with a reference has learned, without a reward model.

    Formula: $r(x, y) = \\beta (\\log \\pi(y | x) - \\log \\pi_{ref}(y | x))$, in nats, with beta
    from the run; a run with `reference.mode` free has $\\beta \\log \\pi(y | x)$. It is the reward
    whose optimum the policy is, up to a constant for each prompt.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5 and section 5.

    Log-probs are sums over all tokens of a response and its end token, whatever weights the run's
    loss gives to them; at `sampling.temperature` where the run samples.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        max_length: int = 0,
        chat_template: str = "",
        mesh: Mesh | None = None,
    ):
        """Opens it, before any weights are read.

        Args:
          path: the workdir of a run that compares its policy with a reference by a beta.
          max_length: see `RewardModel`.
          chat_template: see `tokenizer.chat_template`; empty for its own.
          mesh: over which it is sharded; None for the one that its config says.

        Raises:
          UserError: the run has no implicit reward, or no complete checkpoint yet.
        """
        config = weights.config_of(as_path(path))
        if config is None:
            raise UserError(f"{path}: is no workdir of a run, so it has no reference.")
        name, self._beta = config.algorithm.name, float(config.algorithm.get("beta", 0.0))
        known = _methods()
        if name not in known or not self._beta:
            beta = " with algorithm.beta 0" if name in known else ""
            raise UserError(
                f"{path}: is a run of {name}{beta}, which has learned neither a reward nor an "
                "implicit one. What gives rewards is a run of algorithm reward, a sequence "
                "classifier with one label, and a run of a method that compares its policy with a "
                f"reference by algorithm.beta: {', '.join(known)}."
            )
        super().__init__(path, config, max_length, chat_template, mesh)

    def load(self, dtype: str = "float32") -> Policies:
        """See `Scorer`; the reference has the dtype in which the run has kept it.

        Raises:
          UserError: the reference's weights cannot be had any more.
        """
        whole = weights.load_finished(self.workdir, self.opened, self.mesh, dtype)
        trained, frozen = partition(whole, config_lib.trainable(self.config))
        reference = reference_lib.finished(
            self.config, self.workdir, self.mesh, self.opened, trained, frozen
        )
        policy = packed(self.opened.model, temperature=config_lib.temperature(self.config))

        def rewards(params: Policies, batch: PackedBatch) -> Float[Array, "groups responses"]:
            whole = jax.tree.map(lambda x: x[0], batch)
            logps = response_logps(policy(merge(params.trained, params.frozen), whole), whole)
            of_reference = reference.mode.logps(
                response_logps, params.reference, params.frozen, whole
            )
            return self._beta * (logps if of_reference is None else logps - of_reference)

        self._rewards = jax.jit(rewards)
        return Policies(trained, frozen, reference.params)

    def rewards(self, params: Policies, batch: PackedBatch) -> Float[Array, "groups responses"]:
        """See `Scorer`."""
        return self._rewards(params, batch)


def _methods() -> list[str]:
    """The methods whose runs have an implicit reward."""
    return [
        name
        for name, method in METHODS.items()
        if method.reference != "none" and "beta" in method.knobs
    ]
