"""What a reference says in a step, and how it moves after an update: one small object a mode.

A mode holds no arrays. The reference's own parameters are handed to it: those that stay as they
are come from `Reference.params`, those that move from the train state. What it shares with the
policy, the policy's frozen parameters, is handed to it too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.models.protocol import Model, ModelOutput
from jaxpref.packing import PackedBatch
from jaxpref.trainable import merge

# The name of precomputed log-probs among the values that a batch has of its examples.
COLUMN = "reference_logps"
# A method reads a log-prob of every response in a model's output.
ReadLogps = Callable[[ModelOutput, PackedBatch], Float[Array, "groups responses"]]


@runtime_checkable
class Mode(Protocol):
    """How a reference gives log-probs, and how it moves."""

    @property
    def moves(self) -> bool:
        """Whether its parameters are in the train state."""

    def logps(
        self, read: ReadLogps, params: Any, frozen: Any, batch: PackedBatch
    ) -> Float[Array, "groups responses"] | None:
        """Log-probs of the batch's responses; None without a reference.

        Args:
          read: what the method reads of the reference's output.
          params: the reference's own parameters.
          frozen: the policy's frozen parameters.
          batch: without micro-batches.
        """

    def moved(self, step: jax.Array, policy: Any, params: Any) -> Any:
        """The reference's own parameters after update `step`, from the policy's."""


class Still:
    """A reference that does not move."""

    moves = False

    def moved(self, step: jax.Array, policy: Any, params: Any) -> Any:
        """See `Mode`."""
        return params


class Free(Still):
    """No reference: as if it gave every response the same."""

    def logps(self, read: ReadLogps, params: Any, frozen: Any, batch: PackedBatch) -> None:
        """See `Mode`."""
        return


class Precomputed(Still):
    """Log-probs that were computed once, and come with the batch."""

    def logps(
        self, read: ReadLogps, params: Any, frozen: Any, batch: PackedBatch
    ) -> Float[Array, "groups responses"]:
        """See `Mode`."""
        return jnp.asarray(batch.extras[COLUMN])


class Live(Still):
    """A model that is asked in every step."""

    def __init__(self, model: Model, *, shared: bool = True):
        """Takes the model.

        Args:
          model: the reference's.
          shared: whether what its own parameters lack is the policy's frozen ones.
        """
        self._model, self._shared = model, shared

    def logps(
        self, read: ReadLogps, params: Any, frozen: Any, batch: PackedBatch
    ) -> Float[Array, "groups responses"]:
        """See `Mode`."""
        whole = merge(frozen, params) if self._shared else params
        return read(self._model(whole, batch), batch)


class Synced(Live):
    """A model that is mixed with the policy now and then.

    Source: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656), equations 3 and 4.
    """

    moves = True

    def __init__(self, model: Model, *, mix: float, every: int):
        """Takes the model, the policy's share after a mix, and the updates between two."""
        super().__init__(model)
        self._mix, self._every = mix, every

    def moved(self, step: jax.Array, policy: Any, params: Any) -> Any:
        """See `Mode`."""
        share = jnp.where(step % self._every == 0, self._mix, 0.0)
        return jax.tree.map(lambda new, old: share * new + (1 - share) * old, policy, params)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference that has started.

    Attributes:
      mode: what it says in a step, and how it moves.
      params: its own parameters, where they stay as they are; else {}.
      moving: its own parameters before the first update, where they move; else {}.
      columns: precomputed log-probs of the examples, by side of the data; else {}.
    """

    mode: Mode
    params: Any = dataclasses.field(default_factory=dict)
    moving: Any = dataclasses.field(default_factory=dict)
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
