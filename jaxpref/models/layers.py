"""The layers of a decoder: norms, and the block of attention and feed-forward."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpref.losses.inputs import in_float32
from jaxpref.models import splash
from jaxpref.models.attention import attention
from jaxpref.models.cache import Held, Places, attend
from jaxpref.models.config import ACTIVATIONS, DecoderConfig
from jaxpref.models.experts import mix_experts
from jaxpref.models.linear import Weight, multiply, on_own_rows
from jaxpref.models.rotary import rotate
from jaxpref.nf4 import Nf4
from jaxpref.packing import Seats

# Cosines and sines.
Angles = tuple[Array, Array]


class OfLayer(NamedTuple):
    """What belongs to one layer.

    Attributes:
      window: see `packing.sees`; None if no layer has one.
      rope: which rotary table; None for the first.
      held: what the layer remembers, where tokens follow what it has seen.
    """

    window: Array | int | None
    rope: Array | int | None
    held: Held | None = None


class OfRows(NamedTuple):
    """What all layers share.

    Attributes:
      angles: cosines and sines of each rotary table.
      seats: of the rows' tokens, where they see each other; None where they follow what is held.
      places: of what is held.
      positions: of tokens that follow what is held.
      keep: `()` where each layer shall give its keys and values; else None.
    """

    angles: Angles | None
    seats: Seats | None
    places: Places | None = None
    positions: Array | None = None
    keep: tuple[()] | None = None


class Seen(NamedTuple):
    """What a layer gives beside the residual stream.

    Attributes:
      held: what it remembers now, where it remembers anything.
      kept: its keys and values, if asked for.
      router_logits: of a mixture of experts.
    """

    held: Held | None
    kept: tuple[Array, Array] | None
    router_logits: Array | None


def param(
    module: nn.Module, name: str, initializer: Callable, axes: tuple[str, ...], *shape: int
) -> Array:
    """Declares a parameter, whose axes have logical names (see `jaxpref.sharding`)."""
    config: DecoderConfig = module.config
    partitioned = nn.with_logical_partitioning(initializer, axes)
    return module.param(name, partitioned, shape, jnp.dtype(config.param_dtype))


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in at least float32."""

    config: DecoderConfig
    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Scales `x` to unit mean square or variance, then by a learned factor."""
        centred = self.kind == "layer"
        initializer = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = in_float32(param(self, "scale", initializer, ("norm",), x.shape[-1]))
        if self.kind == "rms_plus_one":
            scale += 1
        x32 = in_float32(x)
        if centred:
            x32 -= x32.mean(axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        normed = normed * jnp.broadcast_to(scale, x.shape)
        if centred:
            bias = param(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1])
            normed += jnp.broadcast_to(bias, x.shape)
        return normed.astype(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, joined to the residual stream as `config.block` says."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows length width"], layer: OfLayer, rows: OfRows
    ) -> tuple[Float[Array, "rows length width"], Seen]:
        """Returns the new residual stream, and what the layer has seen."""
        block = self.config.block
        normed = x if block == "post_norm" else self._norm("attention_norm", x)
        attended, held, kept = self._attention(normed, layer, rows)
        if block == "sandwich":
            attended = self._norm("attention_out_norm", attended)
        if block == "parallel":
            normed = self._norm("feed_forward_norm", x)
        elif block != "parallel_shared":
            x = self._on_rows(x + attended)
            if block == "post_norm":
                x = normed = self._norm("attention_norm", x)
            else:
                normed = self._norm("feed_forward_norm", x)
        fed, router_logits = self._feed_forward(normed)
        if block == "sandwich":
            fed = self._norm("feed_forward_out_norm", fed)
        elif block in ("parallel", "parallel_shared"):
            x = x + attended
        x = self._on_rows(x + fed)
        if block == "post_norm":
            x = self._norm("feed_forward_norm", x)
        return x, Seen(held, kept, router_logits)

    def _norm(self, name: str, x: Array) -> Array:
        return Norm(self.config, self.config.norm, name=name)(x)

    def _on_rows(self, x: Array) -> Array:
        return nn.with_logical_constraint(x, ("rows", "length", "activation"))

    def _attention(
        self, x: Array, layer: OfLayer, rows: OfRows
    ) -> tuple[Array, Held | None, tuple[Array, Array] | None]:
        config = self.config
        heads, head_dim = config.heads, config.head_dim
        # Products run on one flat axis of tokens: XLA on CPU takes up to twice as long
        # for the gradient of a product with two leading axes.
        flat = x.reshape(-1, config.width)

        def project(name: str, axis: str, heads: int) -> Array:
            shape, axes = (config.width, heads, head_dim), ("width", axis, "head_dim")
            out = self._linear(flat, name, axes, shape, bias=config.attention_bias)
            return out.reshape(*x.shape[:2], heads, head_dim)

        query = project("query", "heads", heads)
        key = project("key", "kv_heads", config.kv_heads)
        value = project("value", "kv_heads", config.kv_heads)
        if config.query_key_norm:
            kind = "rms" if config.norm == "layer" else config.norm
            query = Norm(config, kind, name="query_norm")(query)
            key = Norm(config, kind, name="key_norm")(key)
        if rows.angles is not None:
            cos, sin = (x[0] if layer.rope is None else x[layer.rope] for x in rows.angles)
            turn = partial(rotate, cos=cos, sin=sin, interleaved=config.rope[0].interleaved)
            query, key = turn(query), turn(key)
        shape = {"scale": config.attention_scale, "soft_cap": config.attention_soft_cap}
        held = None
        if layer.held is not None:
            assert rows.places is not None
            assert rows.positions is not None
            assert not isinstance(layer.window, Array)
            attended, held = attend(
                query,
                key,
                value,
                rows.positions,
                layer.held,
                rows.places,
                window=layer.window,
                **shape,
            )
        else:
            assert rows.seats is not None
            if config.attention == "splash" and splash.can(rows.seats):
                windows = tuple(sorted(set(config.windows)))
                attend_rows: Any = partial(splash.splash_attention, windows=windows)
            else:
                attend_rows = partial(attention, block_size=config.attention_block)
            attended = attend_rows(query, key, value, rows.seats, window=layer.window, **shape)
        attended = checkpoint_name(attended, "attended")
        out = self._linear(
            attended.reshape(-1, heads * head_dim),
            "out",
            ("heads", "head_dim", "width"),
            (heads, head_dim, config.width),
            inputs=2,
            bias=config.out_bias,
            # What is added to the residual stream starts smaller the deeper the model (GPT-2).
            depth=2 * config.layers,
        )
        kept = None if rows.keep is None else (key, value)
        return out.reshape(x.shape), held, kept

    def _feed_forward(self, x: Array) -> tuple[Array, Array | None]:
        config = self.config
        flat = x.reshape(-1, config.width)
        if config.experts:
            out, router_logits = self._mixture(flat)
            return out.reshape(x.shape), router_logits
        linear = partial(self._linear, bias=config.feed_forward_bias)
        shape, axes = (config.width, config.feed_forward), ("width", "feed_forward")
        activation = ACTIVATIONS[config.activation]
        if config.gated:
            gate = activation(linear(flat, "gate", axes, shape))
            inner = gate * linear(flat, "up", axes, shape)
        else:
            inner = activation(linear(flat, "up", axes, shape))
        out = linear(inner, "down", axes[::-1], shape[::-1], depth=2 * config.layers)
        return out.reshape(x.shape), None

    def _mixture(self, flat: Array) -> tuple[Array, Array]:
        config = self.config
        width, inner, experts = config.width, config.feed_forward, config.experts
        logits = self._linear(flat, "router", ("width", "experts"), (width, experts))
        axes = ("experts", "width", "feed_forward")
        gate, up = (
            Weight(self._weight(name, axes, experts, width, inner, fan_in=width), axes)
            for name in ("gate", "up")
        )
        axes, fan_in = ("experts", "feed_forward", "width"), inner * 2 * config.layers
        down = Weight(self._weight("down", axes, experts, inner, width, fan_in=fan_in), axes)
        mix = partial(
            mix_experts,
            per_token=config.experts_per_token,
            normalize=config.normalize_experts,
            activation=ACTIVATIONS[config.activation],
        )
        out = on_own_rows(
            mix,
            (flat, logits),
            (gate, up, down),
            given=("width", "experts"),
            made="width",
            summed="feed_forward",
        )
        return out, logits

    def _linear(
        self,
        x: Float[Array, "tokens inputs"],
        name: str,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        *,
        inputs: int = 1,
        bias: bool = False,
        depth: int = 1,
    ) -> Float[Array, "tokens outputs"]:
        """A product with the weight `name`, whose first `inputs` axes are summed over."""
        fan_in = math.prod(shape[:inputs])
        weight = self._weight(name, axes, *shape, fan_in=fan_in * depth)
        out = multiply(x, Weight(weight, axes), inputs)
        if name in self.config.adapted:
            out += self._adapter(x, name, axes, shape, inputs)
        if bias:
            zeros = nn.initializers.zeros
            b = param(self, f"{name}_bias", zeros, axes[inputs:], *shape[inputs:])
            out += jnp.broadcast_to(b.astype(out.dtype).reshape(-1), out.shape)
        return out

    def _adapter(
        self, x: Array, name: str, axes: tuple[str, ...], shape: tuple[int, ...], inputs: int
    ) -> Array:
        lora = self.config.lora
        assert lora is not None
        fan_in = math.prod(shape[:inputs])
        bound = fan_in**-0.5

        def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        a_axes, b_axes = (*axes[:inputs], "rank"), ("rank", *axes[inputs:])
        a = param(self, f"{name}_lora_a", uniform, a_axes, *shape[:inputs], lora.rank)
        zeros = nn.initializers.zeros
        b = param(self, f"{name}_lora_b", zeros, b_axes, lora.rank, *shape[inputs:])
        if lora.dropout and self.has_rng("dropout"):
            keep = 1 - lora.dropout
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep, 0).astype(x.dtype)
        low = multiply(x, Weight(a.astype(x.dtype), a_axes), inputs)
        return multiply(low, Weight(b.astype(x.dtype), b_axes)) * lora.scale

    def _weight(self, name: str, axes: tuple[str, ...], *shape: int, fan_in: int) -> Array:
        if self.has_variable("params", name):
            stored = self.get_variable("params", name)
            if isinstance(stored, Nf4):
                return stored.dequantize(jnp.dtype(self.config.dtype))
        initializer = nn.initializers.normal(stddev=fan_in**-0.5)
        weight = param(self, name, initializer, axes, *shape)
        return weight.astype(jnp.dtype(self.config.dtype))
