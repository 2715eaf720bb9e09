"""One decoder-only transformer: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Parameters carry logical axis names (`vocabulary`, `width`, `heads`, ...), which
`jaxpref.sharding` maps to mesh axes. The layers are scanned, so that their parameters
are stacked along a leading `layers` axis and compile time does not grow with depth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxpref.logprobs import LMHead
from jaxpref.models.attention import attention, rotary_angles, rotate

# What the backward pass computes again instead of keeping.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights are kept, and what attention gives: the dear part to compute again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attended"),
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder.

    Attributes:
      vocabulary_size: rows of the embedding table.
      width: size of a hidden state.
      layers: number of blocks.
      heads: query heads.
      kv_heads: key and value heads; divides `heads`.
      head_dim: size of a head; even.
      feed_forward: inner size of the SwiGLU.
      rope_theta: base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      tied_head: use the embedding table as the LM head.
      dtype: of activations and products.
      param_dtype: of parameters.
      remat: a key of `REMAT_POLICIES`.
      attention_block: queries a block of attention.
    """

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_head: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "dots"
    attention_block: int = 128

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads must divide model.heads; got {self.kv_heads} and {self.heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary; got {self.head_dim}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"model.remat should be one of {', '.join(REMAT_POLICIES)}; got {self.remat!r}."
            )


def _param(
    module: nn.Module, name: str, initializer: Callable, axes: tuple[str, ...], *shape: int
) -> Array:
    config: DecoderConfig = module.config
    partitioned = nn.with_logical_partitioning(initializer, axes)
    return module.param(name, partitioned, shape, jnp.dtype(config.param_dtype))


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), computed in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Scales `x` to unit mean square, then by a learned factor."""
        scale = _param(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1])
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each on the normed residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows length width"],
        cos: Float[Array, "rows length 1 half"],
        sin: Float[Array, "rows length 1 half"],
        mask: Bool[Array, "rows length length"],
    ) -> tuple[Float[Array, "rows length width"], None]:
        """Returns the new residual stream, and None for the scan."""
        config = self.config
        rows, length, width = x.shape
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        # Products run on one flat axis of tokens: XLA on CPU takes up to twice as long
        # for the gradient of a product with two leading axes.
        flat = (rows * length, width)

        def project(h: Array, name: str, axis: str, heads: int) -> Array:
            shape = (width, heads, head_dim)
            weight = self._weight(name, ("width", axis, "head_dim"), *shape, fan_in=width)
            return (h @ weight.reshape(width, -1)).reshape(rows, length, heads, head_dim)

        h = RMSNorm(config, name="attention_norm")(x).reshape(flat)
        query = rotate(project(h, "query", "heads", heads), cos, sin)
        key = rotate(project(h, "key", "kv_heads", kv_heads), cos, sin)
        value = project(h, "value", "kv_heads", kv_heads)
        attended = attention(query, key, value, mask, block_size=config.attention_block)
        attended = checkpoint_name(attended, "attended")
        # What is added to the residual stream starts smaller the deeper the model (GPT-2).
        depth = 2 * config.layers
        inner = heads * head_dim
        axes = ("heads", "head_dim", "width")
        out = self._weight("out", axes, heads, head_dim, width, fan_in=inner * depth)
        attended = attended.reshape(-1, inner) @ out.reshape(inner, width)
        x = x + attended.reshape(x.shape)
        x = nn.with_logical_constraint(x, ("rows", "length", "activation"))

        h = RMSNorm(config, name="feed_forward_norm")(x).reshape(flat)
        inner = config.feed_forward
        gate = self._weight("gate", ("width", "feed_forward"), width, inner, fan_in=width)
        up = self._weight("up", ("width", "feed_forward"), width, inner, fan_in=width)
        down = self._weight("down", ("feed_forward", "width"), inner, width, fan_in=inner * depth)
        x = x + ((nn.silu(h @ gate) * (h @ up)) @ down).reshape(x.shape)
        return nn.with_logical_constraint(x, ("rows", "length", "activation")), None

    def _weight(self, name: str, axes: tuple[str, ...], *shape: int, fan_in: int) -> Array:
        initializer = nn.initializers.normal(stddev=fan_in**-0.5)
        weight = _param(self, name, initializer, axes, *shape)
        return weight.astype(jnp.dtype(self.config.dtype))


class Decoder(nn.Module):
    """A decoder-only transformer.

    >>> import jax, jax.numpy as jnp
    >>> config = DecoderConfig(vocabulary_size=8, width=4, layers=1, heads=2, kv_heads=1,
    ...                        head_dim=2, feed_forward=8)
    >>> model, tokens = Decoder(config), jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> model.apply({"params": params}, tokens).shape
    (1, 3, 8)
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the parameters."""
        config = self.config
        table = (config.vocabulary_size, config.width)
        axes = ("vocabulary", "width")
        # Small, so that with a tied head a token does not predict itself at the start.
        normal = nn.initializers.normal(stddev=0.02)
        self.embedding = _param(self, "embedding", normal, axes, *table)
        if not config.tied_head:
            self.head_kernel = _param(self, "head", normal, axes, *table)
        block: Any = Block
        policy = REMAT_POLICIES[config.remat]
        if policy is not None:
            # Inside a scan nothing can be merged across layers, so CSE need not be prevented.
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config)

    def hidden_states(
        self,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"] | None = None,
        mask: Bool[Array, "rows length length"] | None = None,
    ) -> Float[Array, "rows length width"]:
        """Hidden states after the final norm, ready for `jaxpref.logprobs`.

        Args:
          tokens: token ids below the vocabulary size; others give NaN.
          positions: position of each token; by default 0, 1, 2, ...
          mask: `[row, query, key]`, never looking ahead; by default causal.
        """
        config = self.config
        rows, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        if mask is None:
            index = jnp.arange(length)
            mask = jnp.broadcast_to(index[:, None] >= index[None, :], (rows, length, length))
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta)
        x = jnp.take(self._gathered(self.embedding), tokens, axis=0)
        x = nn.with_logical_constraint(x, ("rows", "length", "activation"))
        x, _ = self.layers(x, cos, sin, mask)
        return self.final_norm(x)

    def lm_head(self) -> LMHead:
        """The head in the compute dtype: `model.apply(variables, method="lm_head")`."""
        return LMHead(self._gathered(self.embedding if self.config.tied_head else self.head_kernel))

    def _gathered(self, table: Array) -> Array:
        """A table of the vocabulary in the compute dtype, whole on every device.

        Looked up by rows that are split otherwise, or walked block by block, a table in
        parts would be gathered again and again.
        """
        table = table.astype(jnp.dtype(self.config.dtype))
        return nn.with_logical_constraint(table, ("gathered", "activation"))

    def __call__(
        self,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"] | None = None,
        mask: Bool[Array, "rows length length"] | None = None,
    ) -> Float[Array, "rows length vocabulary"]:
        """Logits in float32, for callers who want them all; training does not."""
        hidden = self.hidden_states(tokens, positions, mask)
        return jnp.einsum(
            "rtd,vd->rtv", hidden, self.lm_head().kernel, preferred_element_type=jnp.float32
        )
