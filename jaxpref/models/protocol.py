"""What the rest of the library needs of a model: a function of a packed batch.

    def model(params, batch, key=None) -> ModelOutput: ...

`packed` makes one of a `Decoder`. A model of one's own, in whatever library, is another: it gives
the hidden states of `batch.tokens`, in which each token has seen what `packing.attention_mask`
(or `batch.tree`) lets it see, and the head that reads them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from jaxpref.logprobs import LMHead
from jaxpref.losses.inputs import in_float32
from jaxpref.packing import PackedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """The head of a reward or value model: one number a token.

    Attributes:
      weights: the number is the product of a hidden state with these.
      pad_token_id: the token that is passed over at the end of a response, as transformers'
        classifiers do; None: a response's last token is read, whichever it is.
    """

    weights: Float[Array, " features"]
    pad_token_id: int | None = dataclasses.field(default=None, metadata={"static": True})

    def scalars(self, hidden: Float[Array, "*batch features"]) -> Float[Array, "*batch"]:
        """What the head says of hidden states, in float32 (float64 stays float64)."""
        return in_float32(hidden) @ in_float32(self.weights)


class ModelOutput(NamedTuple):
    """What a model says of a packed batch.

    Attributes:
      hidden: hidden states of all tokens, as the head takes them.
      head: an `LMHead`, or the `ScalarHead` of a reward or value model.
      auxiliary: losses of the model itself over the batch's tokens by name, each times its
        weight, such as a router's; they are added to every example's loss, and logged.
    """

    hidden: Float[Array, "rows length features"]
    head: LMHead | ScalarHead
    auxiliary: Mapping[str, Float[Array, ""]] = {}


@runtime_checkable
class Model(Protocol):
    """A model, as a pure function of its parameters."""

    def __call__(self, params: Any, batch: PackedBatch, key: Array | None = None) -> ModelOutput:
        """What it says of a batch without micro-batches; the key, if not None, is for dropout."""
