"""One decoder-only transformer; what differs between families of models is its config.

Parameters carry logical axis names (`vocabulary`, `width`, `heads`, ...), which
`jaxpref.sharding` maps to mesh axes. The layers are scanned, so that their parameters
are stacked along a leading `layers` axis and compile time does not grow with depth.
What differs from layer to layer (windows, rotary tables) is an array along that axis.

For decoding the layers are written out one after the other instead (`unrolled`), each with
parameters and memory of its own: a slice of what is stacked would be a copy for every token.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpref import sharding
from jaxpref.logprobs import LMHead
from jaxpref.models.cache import Cache, Held, seated
from jaxpref.models.config import REMAT_POLICIES, DecoderConfig
from jaxpref.models.layers import Angles, Block, Norm, OfLayer, OfRows, param
from jaxpref.models.linear import keeps_no_gathered
from jaxpref.models.protocol import ScalarHead
from jaxpref.models.vocabulary import look_up
from jaxpref.packing import Seats, Tree


class Decoder(nn.Module):
    """A decoder-only transformer.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpref.models import Decoder, DecoderConfig, Rope
    >>> config = DecoderConfig(vocabulary_size=8, width=4, layers=1, heads=2, kv_heads=1,
    ...                        head_dim=2, feed_forward=8, rope=(Rope((1.0,)),))
    >>> model, tokens = Decoder(config), jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> model.apply({"params": params}, tokens).shape
    (1, 3, 8)

    Attributes:
      config: its shape and numerics.
      origin: the `jaxpref.models.huggingface.Origin` that it was read from, if any.
      unrolled: whether the layers are written out, with parameters as `unroll` gives them.
    """

    config: DecoderConfig
    origin: Any = None
    unrolled: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        config = self.config
        # Small, so that with a tied head a token does not predict itself at the start.
        normal = nn.initializers.normal(stddev=0.02)
        narrow = config.embedding_width or config.width
        table, axes = (config.vocabulary_size, narrow), ("vocabulary", "width")
        self.embedding = param(self, "embedding", normal, axes, *table)
        if config.learned_positions:
            shape = (config.learned_positions, config.width)
            self.position_embedding = param(
                self, "position_embedding", normal, ("positions", "width"), *shape
            )
        if config.embedding_width:
            axes_in, axes_out = ("embedding", "width"), ("width", "embedding")
            self.project_in = param(self, "project_in", normal, axes_in, narrow, config.width)
            self.project_out = param(self, "project_out", normal, axes_out, config.width, narrow)
        if config.scalar_head:
            # This is the initial scale of Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1.
            initializer = nn.initializers.normal((narrow + 1) ** -0.5)
            self.score = param(self, "score", initializer, ("scalar", "width"), 1, narrow)
        elif not config.tied_head:
            self.head_kernel = param(self, "head", normal, axes, *table)
        if config.head_bias and not config.scalar_head:
            size = config.vocabulary_size
            zeros = nn.initializers.zeros
            self.head_bias = param(self, "head_bias", zeros, ("vocabulary",), size)
        if config.final_norm:
            self.final_norm = Norm(config, config.norm)
        if self.unrolled:
            self.layers: Any = [Block(config) for _ in range(config.layers)]
            return
        block: Any = Block
        policy = REMAT_POLICIES[config.remat]
        name, parts = sharding.gathered_along()
        if policy is None and name and (parts > 1 or config.experts):
            policy = keeps_no_gathered
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
            packed batch; in padded rows, group 1 for tokens and 0 for padding, and branch 0);
            by default a row is one sequence.

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
        x, seen = self._run(jnp.asarray(tokens), seats.positions, OfRows(None, seats))
        if not self.unrolled and seen.router_logits is not None:
            self.sow("intermediates", "router_logits", seen.router_logits)
        return x

    def scalars(
        self,
        tokens: Int[Array | np.ndarray, "rows length"],
        positions: Int[Array | np.ndarray, "rows length"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "rows length"]:
        """What a scalar head says at each token, in float32 (float64 stays float64)."""
        return self.scalar_head().scalars(self.hidden_states(tokens, positions, tree))

    def scalar_head(self) -> ScalarHead:
        """The head of a reward or value model: `model.apply(variables, method="scalar_head")`."""
        return ScalarHead(self.score[0], self.config.pad_token_id)

    def prefill(
        self,
        tokens: Int[Array | np.ndarray, "prompts length"],
        real: Bool[Array | np.ndarray, "prompts length"],
        table: Angles | None = None,
    ) -> tuple[Float[Array, "prompts features"], tuple[tuple[Array, Array], ...]]:
        """Reads prompts, one a row, for what follows them; of an unrolled model.

        Args:
          tokens: token ids; prompts may be padded on either side.
          real: False for padding.
          table: of `rotary_table` for one row of all positions, in order. XLA would compute angles
            anew in every layer that is written out, for every head, if they were not given.

        Returns:
          The hidden state of each prompt's last token, and the keys and values of every layer
          `[prompts, length, kv_heads, head_dim]` (see `jaxpref.models.cache.branch`).
        """
        real = jnp.asarray(real)
        positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
        tree = Tree(real.astype(jnp.int32), jnp.zeros_like(positions))
        seats = Seats(jnp.arange(tokens.shape[1]), positions, tree)
        rows = OfRows(_looked_up(table, positions), seats, keep=())
        x, seen = self._run(jnp.asarray(tokens), positions, rows)
        last = tokens.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return hidden, tuple(layer.kept for layer in seen)

    def step(
        self,
        tokens: Int[Array, "prompts branches"],
        positions: Int[Array, "prompts branches"],
        cache: Cache,
        table: Angles | None = None,
    ) -> tuple[Float[Array, "prompts branches features"], Cache]:
        """Hidden states of one more token in every branch, and what is remembered then.

        Args:
          tokens: the next token of each branch.
          positions: of these tokens in their sequences.
          cache: from `jaxpref.models.cache.branch` or an earlier step; of an unrolled model.
          table: see `prefill`.
        """
        of_rows = positions.reshape(-1, 1)
        rows = OfRows(_looked_up(table, of_rows), None, cache.places, positions)
        x, seen = self._run(tokens.reshape(-1, 1), of_rows, rows, cache.layers)
        layers = tuple(layer.held for layer in seen)
        return x.reshape(*tokens.shape, -1), Cache(layers, seated(cache.places, positions))

    def _run(
        self,
        tokens: Array,
        positions: Array,
        rows: OfRows,
        held: tuple[Held, ...] | None = None,
    ) -> tuple[Array, Any]:
        """Embeds, runs the layers, norms; what layers have seen is stacked, or in a list."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x = look_up(self.embedding, tokens).astype(dtype)
        if config.embedding_scale != 1:
            x *= jnp.asarray(config.embedding_scale, dtype)
        if config.embedding_width:
            x @= self.project_in.astype(dtype)
        if config.learned_positions:
            table = nn.with_logical_constraint(
                self.position_embedding.astype(dtype), ("gathered", "activation")
            )
            x += jnp.take(table, positions + config.position_offset, axis=0)
        x = nn.with_logical_constraint(x, ("rows", "length", "activation"))
        if config.rope and rows.angles is None:
            rows = rows._replace(angles=rotary_table(config, positions))
        if self.unrolled:
            seen: Any = []
            for number, block in enumerate(self.layers):
                x, of_layer = block(x, self._layer(number, held), rows)
                seen.append(of_layer)
        else:
            layer = OfLayer(
                window=jnp.asarray(config.windows, jnp.int32) if any(config.windows) else None,
                rope=jnp.asarray(config.layer_rope, jnp.int32) if config.layer_rope else None,
            )
            x, seen = self.layers(x, layer, rows)
        if config.final_norm:
            x = self.final_norm(x)
        if config.embedding_width:
            x @= self.project_out.astype(dtype)
        return x, seen

    def _layer(self, number: int, held: tuple[Held, ...] | None) -> OfLayer:
        config = self.config
        return OfLayer(
            window=(config.windows[number] or None) if config.windows else None,
            rope=config.layer_rope[number] if config.layer_rope else None,
            held=None if held is None else held[number],
        )

    def lm_head(self) -> LMHead:
        """The head, with the table as it is: `model.apply(variables, method="lm_head")`."""
        config = self.config
        if config.scalar_head:
            raise ValueError("a model with a scalar head has no LM head; ask for its scalars.")
        kernel = self.embedding if config.tied_head else self.head_kernel
        bias = self.head_bias if config.head_bias else None
        split = sharding.table_split(kernel.shape)
        return LMHead(kernel, bias, config.logit_soft_cap, split=split)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "rows length"],
        positions: Int[Array | np.ndarray, "rows length"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "rows length vocabulary"]:
        """Logits in float32, for callers who want them all; training does not."""
        hidden = self.hidden_states(tokens, positions, tree)
        return self.lm_head().logits(hidden)


def rotary_table(
    config: DecoderConfig, positions: Int[Array | np.ndarray, "rows length"]
) -> Angles | None:
    """Cosines and sines of each of a decoder's rotary tables at these positions.

    Returns:
      Both `[tables, rows, length, 1, half]`; None for a decoder without rotary positions.
    """
    if not config.rope:
        return None
    angles = [rope.angles(jnp.asarray(positions)) for rope in config.rope]
    cos, sin = (jnp.stack(parts) for parts in zip(*angles, strict=True))
    return cos, sin


def _looked_up(table: Angles | None, positions: Int[Array, "rows length"]) -> Angles | None:
    if table is None:
        return None
    cos, sin = (x[:, 0, positions] for x in table)
    return cos, sin


def unroll(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The same function with its layers written out, for decoding.

    Args:
      model: with scanned layers.
      params: of the model.

    Returns:
      The model, and its parameters: those of layer i under `layers_i`.
    """
    stacked = params["layers"]
    rest = {name: part for name, part in params.items() if name != "layers"}
    layers = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stacked)
        for i in range(model.config.layers)
    }
    return model.clone(unrolled=True), {**rest, **layers}
