"""Shape and numerics of a decoder: what differs between families of models."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxpref.models.rotary import Rope

_attended = jax.checkpoint_policies.save_only_these_names("attended")
# Of products whose parts lie along an axis of the mesh.
_SUMS = ("psum", "psum_invariant")
# What the backward pass computes again instead of keeping. A weight that was gathered from all its
# parts is never kept.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights are kept, and what attention gives: the dear part to compute again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        lambda primitive, *_, **params: (
            _attended(primitive, *_, **params) or primitive.name in _SUMS
        ),
    ),
}

NORMS = ("rms", "rms_plus_one", "layer")
# How attention and feed-forward join the residual stream x, with norms n:
#   sequential       x + attention(n x), then x + feed_forward(n x)
#   sandwich         x + n attention(n x), then x + n feed_forward(n x)   (Gemma 2)
#   post_norm        n(x + attention(x)), then n(x + feed_forward(x))     (OPT-350m)
#   parallel         x + attention(n x) + feed_forward(n' x)              (GPT-NeoX)
#   parallel_shared  the same with one norm for both                      (GPT-J)
BLOCKS = ("sequential", "sandwich", "post_norm", "parallel", "parallel_shared")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}

# What computes attention: block by block on any device, or a kernel for TPUs where it can tell the
# tokens' places (see `packing.Alignment`), and block by block elsewhere.
ATTENTIONS = ("blockwise", "splash")

# What can have an adapter; experts cannot.
ADAPTABLE = ("query", "key", "value", "out", "gate", "up", "down")
_OF_FEED_FORWARD = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): `x W + alpha / rank * dropout(x) A B`.

    Attributes:
      rank: of A B.
      alpha: see there.
      targets: the products that have one, of `ADAPTABLE`; none for all that can have one (of a
        mixture of experts, those of attention).
      dropout: share of the adapters' inputs that are set to 0 in training.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(ADAPTABLE)
        if unknown:
            raise ValueError(
                f"model.lora.targets should be some of {', '.join(ADAPTABLE)}; got {self.targets}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder.

    Attributes:
      vocabulary_size: rows of the embedding table.
      width: size of a hidden state.
      layers: number of blocks.
      heads: query heads.
      kv_heads: key and value heads; divides `heads`.
      head_dim: size of a head.
      feed_forward: inner size of the feed-forward, or of one expert.
      rope: rotary positions; several if layers differ, none for learned positions.
      layer_rope: which of `rope` each layer uses; empty if there is one.
      windows: how far back each layer sees, 0 for everything; empty if no layer is bounded.
      learned_positions: rows of a table of learned positions; 0 for none.
      position_offset: the row of position 0 in that table.
      norm: one of `NORMS`: RMSNorm (arXiv 1910.07467), RMSNorm whose factor is one plus its
        parameter, LayerNorm with bias.
      norm_epsilon: added to the mean square or variance.
      final_norm: norm the last hidden state.
      query_key_norm: RMSNorm of each query and key head before the rotation.
      block: one of `BLOCKS`.
      activation: a key of `ACTIVATIONS`.
      gated: activation of a gate times a second projection (SwiGLU, arXiv 2002.05202).
      attention_bias: biases of query, key and value.
      out_bias: bias of attention's output.
      feed_forward_bias: biases of the feed-forward.
      attention_scale: of the scores; None for `head_dim ** -0.5`.
      attention_soft_cap: bound of the scores; None for none.
      embedding_scale: multiplies the embeddings.
      embedding_width: width of the embedding table if it differs from `width` (OPT-350m,
        which projects in and out); 0 for none.
      experts: number of experts a layer; 0 for a plain feed-forward.
      experts_per_token: how many of them a token goes to.
      normalize_experts: let the weights of a token's experts add up to one.
      router_loss: weight of the router's load-balancing loss.
      tied_head: use the embedding table as the LM head.
      head_bias: bias of the LM head.
      scalar_head: a head that gives one number a token instead of the LM head (reward and
        value models).
      pad_token_id: of a model with a scalar head, the token that is passed over at the end of
        a response, as transformers' classifiers do; None: its last token is read, whichever
        it is.
      logit_soft_cap: bound of the logits; None for none.
      lora: low-rank adapters; None for none.
      dtype: of activations and products.
      param_dtype: of parameters.
      remat: a key of `REMAT_POLICIES`.
      attention: one of `ATTENTIONS`: which function computes it.
      attention_block: queries a block of attention.
    """

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    rope: tuple[Rope, ...] = ()
    layer_rope: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    learned_positions: int = 0
    position_offset: int = 0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    final_norm: bool = True
    query_key_norm: bool = False
    block: str = "sequential"
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    embedding_scale: float = 1.0
    embedding_width: int = 0
    experts: int = 0
    experts_per_token: int = 0
    normalize_experts: bool = True
    router_loss: float = 0.0
    tied_head: bool = True
    head_bias: bool = False
    scalar_head: bool = False
    pad_token_id: int | None = None
    logit_soft_cap: float | None = None
    lora: Lora | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "dots"
    attention: str = "blockwise"
    attention_block: int = 128

    @property
    def max_length(self) -> int:
        """Positions that the model knows, where their number is bounded; else 0."""
        limits = [rope.limit for rope in self.rope if rope.limit]
        if self.learned_positions:
            limits.append(self.learned_positions - self.position_offset)
        return min(limits, default=0)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The products that have an adapter."""
        if self.lora is None:
            return ()
        without = _OF_FEED_FORWARD if self.experts else ()
        return self.lora.targets or tuple(name for name in ADAPTABLE if name not in without)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads must divide model.heads; got {self.kv_heads} and {self.heads}."
            )
        for name, known in {
            "remat": tuple(REMAT_POLICIES),
            "norm": NORMS,
            "block": BLOCKS,
            "activation": tuple(ACTIVATIONS),
            "attention": ATTENTIONS,
        }.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"model.{name} should be one of {', '.join(known)}; got {value!r}."
                )
        if not self.rope and not self.learned_positions:
            raise ValueError(
                "a decoder needs positions: rope=(jaxpref.models.make_rope(head_dim),), or "
                "learned_positions."
            )
        for name in ("layer_rope", "windows"):
            if len(getattr(self, name)) not in (0, self.layers):
                raise ValueError(f"{name} needs one entry a layer ({self.layers}), or none.")
        if self.experts and self.lora and set(_OF_FEED_FORWARD) & set(self.lora.targets):
            raise ValueError(
                "model.lora.targets: experts have no adapters; leave out gate, up and down."
            )
        for rope in self.rope:
            if 2 * len(rope.frequencies) > self.head_dim:
                raise ValueError(
                    f"{len(rope.frequencies)} rotary frequencies turn {2 * len(rope.frequencies)} "
                    f"entries, but a head has {self.head_dim}."
                )
