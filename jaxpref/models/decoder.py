"""One decoder-only transformer; what differs between families of models is its config.

Parameters carry logical axis names (`vocabulary`, `width`, `heads`, ...), which
`jaxpref.sharding` maps to mesh axes. The layers are scanned, so that their parameters
are stacked along a leading `layers` axis and compile time does not grow with depth.
What differs from layer to layer (windows, rotary tables) is an array along that axis.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxpref.logprobs import LMHead
from jaxpref.losses.inputs import in_float32
from jaxpref.models.attention import attention, rotary_angles, rotate
from jaxpref.models.experts import mix_experts
from jaxpref.nf4 import Nf4
from jaxpref.packing import Seats, Tree

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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
      frequencies: angle by which each pair of a head turns from one position to the next;
        fewer than `head_dim / 2` leave the rest of the head as it is.
      scale: multiplies cosines and sines.
      interleaved: pairs are neighbours (GPT-J) rather than halves.
      limit: positions from here on give NaN, since the frequencies are not made for them
        (LongRoPE's short factors); 0 for none.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    limit: int = 0

    def angles(self, positions: Int[Array, "rows length"]) -> tuple[Array, Array]:
        """Cosines and sines for tokens at these positions."""
        cos, sin = rotary_angles(positions, jnp.asarray(self.frequencies), self.scale)
        if not self.limit:
            return cos, sin
        within = (positions < self.limit)[..., None, None]
        return jnp.where(within, cos, jnp.nan), jnp.where(within, sin, jnp.nan)


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


class Cache(NamedTuple):
    """Keys and values of what a row has seen, for decoding step by step.

    Attributes:
      keys: rotated keys of every layer.
      values: values of every layer.
      positions: position of each slot's token.
      filled: slots that hold a token, rather than padding or nothing.
      used: slots that have been written, the same in every row.
    """

    keys: Float[Array, "layers rows slots kv_heads head_dim"]
    values: Float[Array, "layers rows slots kv_heads head_dim"]
    positions: Int[Array, "rows slots"]
    filled: Bool[Array, "rows slots"]
    used: Int[Array, ""]


def empty_cache(config: DecoderConfig, rows: int, slots: int) -> Cache:
    """A cache with room for `slots` tokens a row."""
    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((rows, slots), jnp.int32),
        filled=jnp.zeros((rows, slots), bool),
        used=jnp.zeros((), jnp.int32),
    )


class _OfLayer(NamedTuple):
    """What belongs to one layer: scanned over."""

    window: Array | None
    rope: Array | None
    cached: tuple[Array, Array] | None


class _OfRows(NamedTuple):
    """What all layers share."""

    angles: tuple[Array, Array] | None
    queries: Seats
    keys: Seats | None
    used: Array | None


class _Seen(NamedTuple):
    """What a layer gives beside the residual stream."""

    cached: tuple[Array, Array] | None
    router_logits: Array | None


def _param(
    module: nn.Module, name: str, initializer: Callable, axes: tuple[str, ...], *shape: int
) -> Array:
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
        scale = in_float32(_param(self, "scale", initializer, ("norm",), x.shape[-1]))
        if self.kind == "rms_plus_one":
            scale += 1
        x32 = in_float32(x)
        if centred:
            x32 -= x32.mean(axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        normed = normed * jnp.broadcast_to(scale, x.shape)
        if centred:
            bias = _param(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1])
            normed += jnp.broadcast_to(bias, x.shape)
        return normed.astype(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, joined to the residual stream as `config.block` says."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows length width"], layer: _OfLayer, rows: _OfRows
    ) -> tuple[Float[Array, "rows length width"], _Seen]:
        """Returns the new residual stream, and what the layer has seen."""
        block = self.config.block
        normed = x if block == "post_norm" else self._norm("attention_norm", x)
        attended, cached = self._attention(normed, layer, rows)
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
        return x, _Seen(cached, router_logits)

    def _norm(self, name: str, x: Array) -> Array:
        return Norm(self.config, self.config.norm, name=name)(x)

    def _on_rows(self, x: Array) -> Array:
        return nn.with_logical_constraint(x, ("rows", "length", "activation"))

    def _attention(
        self, x: Array, layer: _OfLayer, rows: _OfRows
    ) -> tuple[Array, tuple[Array, Array] | None]:
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
        cached = None
        if layer.cached is not None:
            key, value = cached = (
                _write(layer.cached[0], key, rows.used),
                _write(layer.cached[1], value, rows.used),
            )
        attended = attention(
            query,
            key,
            value,
            rows.queries,
            rows.keys,
            window=layer.window,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
            block_size=config.attention_block,
        )
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
        return out.reshape(x.shape), cached

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
            self._weight(name, axes, experts, width, inner, fan_in=width) for name in ("gate", "up")
        )
        axes, fan_in = ("experts", "feed_forward", "width"), inner * 2 * config.layers
        down = self._weight("down", axes, experts, inner, width, fan_in=fan_in)
        out = mix_experts(
            flat,
            logits,
            (gate, up, down),
            per_token=config.experts_per_token,
            normalize=config.normalize_experts,
            activation=ACTIVATIONS[config.activation],
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
        out = x @ weight.reshape(fan_in, -1)
        if name in self.config.adapted:
            out += self._adapter(x, name, axes, shape, inputs)
        if bias:
            zeros = nn.initializers.zeros
            b = _param(self, f"{name}_bias", zeros, axes[inputs:], *shape[inputs:])
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
        a = _param(self, f"{name}_lora_a", uniform, a_axes, *shape[:inputs], lora.rank)
        zeros = nn.initializers.zeros
        b = _param(self, f"{name}_lora_b", zeros, b_axes, lora.rank, *shape[inputs:])
        if lora.dropout and self.has_rng("dropout"):
            keep = 1 - lora.dropout
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep, 0).astype(x.dtype)
        a, b = a.astype(x.dtype).reshape(fan_in, -1), b.astype(x.dtype).reshape(lora.rank, -1)
        return (x @ a) @ b * lora.scale

    def _weight(self, name: str, axes: tuple[str, ...], *shape: int, fan_in: int) -> Array:
        if self.has_variable("params", name):
            stored = self.get_variable("params", name)
            if isinstance(stored, Nf4):
                return stored.dequantize(jnp.dtype(self.config.dtype))
        initializer = nn.initializers.normal(stddev=fan_in**-0.5)
        weight = _param(self, name, initializer, axes, *shape)
        return weight.astype(jnp.dtype(self.config.dtype))


def _write(slots: Array, new: Array, used: Array | None) -> Array:
    """Writes new keys or values after those in use."""
    assert used is not None
    zero = jnp.zeros_like(used)
    return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), (zero, used, zero, zero))


def _seats(slots: Array, positions: Array, present: Array | np.ndarray) -> Seats:
    """Seats of tokens in a cache, where what is not `present` is padding, or not written yet.

    Padding is a branch of its own, slot by slot: it sees what is before it and itself, and
    nobody else sees it.
    """
    branch = jnp.where(present, 0, -1 - slots[None])
    return Seats(slots, positions, Tree(jnp.ones_like(branch), branch))


class Decoder(nn.Module):
    """A decoder-only transformer.

    >>> import jax, jax.numpy as jnp
    >>> config = DecoderConfig(vocabulary_size=8, width=4, layers=1, heads=2, kv_heads=1,
    ...                        head_dim=2, feed_forward=8, rope=(Rope((1.0,)),))
    >>> model, tokens = Decoder(config), jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> model.apply({"params": params}, tokens).shape
    (1, 3, 8)

    Attributes:
      config: its shape and numerics.
      origin: the `jaxpref.models.huggingface.Origin` that it was read from, if any.
    """

    config: DecoderConfig
    origin: Any = None

    def setup(self) -> None:
        """Declares the parameters."""
        config = self.config
        # Small, so that with a tied head a token does not predict itself at the start.
        normal = nn.initializers.normal(stddev=0.02)
        narrow = config.embedding_width or config.width
        table, axes = (config.vocabulary_size, narrow), ("vocabulary", "width")
        self.embedding = _param(self, "embedding", normal, axes, *table)
        if config.learned_positions:
            shape = (config.learned_positions, config.width)
            self.position_embedding = _param(
                self, "position_embedding", normal, ("positions", "width"), *shape
            )
        if config.embedding_width:
            axes_in, axes_out = ("embedding", "width"), ("width", "embedding")
            self.project_in = _param(self, "project_in", normal, axes_in, narrow, config.width)
            self.project_out = _param(self, "project_out", normal, axes_out, config.width, narrow)
        if config.scalar_head:
            # As in Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1.
            initializer = nn.initializers.normal((narrow + 1) ** -0.5)
            self.score = _param(self, "score", initializer, ("scalar", "width"), 1, narrow)
        elif not config.tied_head:
            self.head_kernel = _param(self, "head", normal, axes, *table)
        if config.head_bias and not config.scalar_head:
            size = config.vocabulary_size
            zeros = nn.initializers.zeros
            self.head_bias = _param(self, "head_bias", zeros, ("vocabulary",), size)
        block: Any = Block
        policy = REMAT_POLICIES[config.remat]
        if policy is not None:
            # Inside a scan nothing can be merged across layers, so CSE need not be prevented.
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        if config.final_norm:
            self.final_norm = Norm(config, config.norm)

    def hidden_states(
        self,
        tokens: Int[Array | np.ndarray, "rows length"],
        positions: Int[Array | np.ndarray, "rows length"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "rows length features"]:
        """Hidden states after the final norm, ready for `jaxpref.logprobs`.

        Args:
          tokens: token ids below the vocabulary size; others give NaN.
          positions: position of each token; by default 0, 1, 2, ...; one that the model does
            not know (see `DecoderConfig.max_length`) gives NaN.
          tree: groups and branches of the tokens, which say who sees whom (`batch.tree` of a
            packed batch); by default a row is one sequence.

        Raises:
          ValueError: without positions, rows longer than the model knows positions.
        """
        length = tokens.shape[1]
        longest = self.config.max_length
        if positions is None and 0 < longest < length:
            raise ValueError(
                f"a row has {length} tokens, but the model knows only {longest} positions. If its "
                "positions can be scaled (LongRoPE, dynamic), read it with the max_length of your "
                "sequences: from_pretrained(..., max_length=...)."
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        seats = Seats(jnp.arange(length), jnp.asarray(positions), jax.tree.map(jnp.asarray, tree))
        x, seen = self._run(jnp.asarray(tokens), _OfRows(None, seats, None, None), None)
        if seen.router_logits is not None:
            self.sow("intermediates", "router_logits", seen.router_logits)
        return x

    def scalars(
        self,
        tokens: Int[Array | np.ndarray, "rows length"],
        positions: Int[Array | np.ndarray, "rows length"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "rows length"]:
        """What a scalar head says at each token, in float32 (float64 stays float64)."""
        return self.scalars_of(self.hidden_states(tokens, positions, tree))

    def scalars_of(self, hidden: Float[Array, "*batch features"]) -> Float[Array, "*batch"]:
        """What a scalar head says of hidden states, in float32 (float64 stays float64)."""
        return in_float32(hidden) @ in_float32(self.score[0])

    def extend(
        self,
        tokens: Int[Array | np.ndarray, "rows new"],
        cache: Cache,
        positions: Int[Array | np.ndarray, "rows new"] | None = None,
        real: Bool[Array | np.ndarray, "rows new"] | None = None,
    ) -> tuple[Float[Array, "rows new features"], Cache]:
        """Hidden states of tokens that follow what the cache holds, and the longer cache.

        Prompts may be padded on either side: padding takes slots that nobody looks at.

        Args:
          tokens: the next tokens of each row.
          cache: from `empty_cache` or an earlier call; with room for the new tokens.
          positions: by default, the number of real tokens before.
          real: False for padding; by default all are real.
        """
        rows, new = tokens.shape
        if real is None:
            real = jnp.ones((rows, new), bool)
        if positions is None:
            before = cache.filled.sum(axis=1, dtype=jnp.int32)
            positions = before[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
            positions = jnp.maximum(positions, 0)
        positions = jnp.asarray(positions)
        start = (jnp.zeros_like(cache.used), cache.used)
        place = partial(jax.lax.dynamic_update_slice, start_indices=start)
        filled, all_positions = place(cache.filled, real), place(cache.positions, positions)
        slots = jnp.arange(filled.shape[1])
        own = cache.used + jnp.arange(new)
        seats = _seats(own, positions, real), _seats(slots, all_positions, filled)
        shared = _OfRows(None, *seats, cache.used)
        x, seen = self._run(jnp.asarray(tokens), shared, (cache.keys, cache.values))
        keys, values = seen.cached or (cache.keys, cache.values)
        return x, Cache(keys, values, all_positions, filled, cache.used + new)

    def _run(
        self, tokens: Array, rows: _OfRows, cached: tuple[Array, Array] | None
    ) -> tuple[Array, _Seen]:
        """Embeds, runs the layers, norms."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        positions = rows.queries.positions
        x = jnp.take(self._gathered(self.embedding), tokens, axis=0)
        if config.embedding_scale != 1:
            x *= jnp.asarray(config.embedding_scale, dtype)
        if config.embedding_width:
            x @= self.project_in.astype(dtype)
        if config.learned_positions:
            table = self._gathered(self.position_embedding)
            x += jnp.take(table, positions + config.position_offset, axis=0)
        x = nn.with_logical_constraint(x, ("rows", "length", "activation"))
        if config.rope:
            angles = [rope.angles(positions) for rope in config.rope]
            cos, sin = (jnp.stack(parts) for parts in zip(*angles, strict=True))
            rows = rows._replace(angles=(cos, sin))
        layer = _OfLayer(
            window=jnp.asarray(config.windows, jnp.int32) if any(config.windows) else None,
            rope=jnp.asarray(config.layer_rope, jnp.int32) if config.layer_rope else None,
            cached=cached,
        )
        x, seen = self.layers(x, layer, rows)
        if config.final_norm:
            x = self.final_norm(x)
        if config.embedding_width:
            x @= self.project_out.astype(dtype)
        return x, seen

    def lm_head(self) -> LMHead:
        """The head in the compute dtype: `model.apply(variables, method="lm_head")`."""
        config = self.config
        if config.scalar_head:
            raise ValueError("a model with a scalar head has no LM head; ask for its scalars.")
        kernel = self._gathered(self.embedding if config.tied_head else self.head_kernel)
        bias = self.head_bias.astype(jnp.dtype(config.dtype)) if config.head_bias else None
        return LMHead(kernel, bias, config.logit_soft_cap)

    def _gathered(self, table: Array) -> Array:
        """A table of the vocabulary in the compute dtype, whole on every device.

        Looked up by rows that are split otherwise, or walked block by block, a table in
        parts would be gathered again and again.
        """
        table = table.astype(jnp.dtype(self.config.dtype))
        return nn.with_logical_constraint(table, ("gathered", "activation"))

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "rows length"],
        positions: Int[Array | np.ndarray, "rows length"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "rows length vocabulary"]:
        """Logits in float32, for callers who want them all; training does not."""
        hidden = self.hidden_states(tokens, positions, tree)
        return self.lm_head().logits(hidden)
