"""Hidden states and an LM head to log-probabilities, without the full logits.

A step over `tokens` scored positions and a vocabulary of `vocabulary` entries would
need `tokens x vocabulary` logits several times over. Here the vocabulary is walked
in blocks: the forward pass keeps a running log-sum-exp, the backward pass computes
each block's logits again, and each block of the head's gradient is written once.

On a mesh each device walks its own part of the vocabulary for its own positions. It gathers one
block of the head's width at a time, and gives the block's gradient back reduced and scattered, so
that no device ever holds the whole head.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpref import collectives
from jaxpref.collectives import Split
from jaxpref.losses.inputs import check_range

# Logits alive at one time, in entries; 2**22 float32 entries are 16 MiB.
_BLOCK_ENTRIES = 2**22
# A narrower block leaves matrix units idle, and TPU lanes come in 128.
_SMALLEST_BLOCK = 1024
_LANES = 128
# Entries that a device hands over of a block: TPUs sum smaller parts everywhere, as it takes fewer
# messages, in place of gathering them, which moves half as much.
_SMALLEST_PART = 2**16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LMHead:
    """The map from hidden states to logits.

    With all its parts: `soft_cap * tanh((h @ kernel.T + bias) / soft_cap) / temperature`.

    Products are made in the dtype of the hidden states. The kernel may have a wider one, in which
    its gradient is then summed.

    Attributes:
      kernel: one row a vocabulary entry; for a tied head, the embedding table.
      bias: added to the logits; None for none.
      soft_cap: bound of the logits (Gemma 2, arXiv 2408.00118, section 2); None for none.
      temperature: what the logits are divided by last, above 0. What a policy sampled at this
        temperature has log-probs, entropy and KL of a head that has it too.
      split: how the kernel lies over a mesh, as `sharding.table_split` says; None: JAX decides
        what devices exchange.

    Raises:
      ValueError: the temperature is not above 0.
    """

    kernel: Float[Array, "vocabulary width"]
    bias: Float[Array, " vocabulary"] | None = None
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})
    split: Split | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_range("LMHead", above=0, temperature=self.temperature)

    def logits(self, hidden: Float[Array, "*positions width"]) -> Float[Array, "*positions _"]:
        """All logits in float32, for callers who want them; training does not."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        kernel = self.kernel.astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=dtype)
        if self.bias is not None:
            logits += jnp.broadcast_to(self.bias.astype(dtype), logits.shape)
        return _scaled(logits, self.soft_cap, self.temperature)


class TokenLogprobs(NamedTuple):
    """Log-probability of each target and entropy of each distribution, both in nats."""

    logprobs: Float[Array, "*positions"]
    entropy: Float[Array, "*positions"]


class TokenCollisions(NamedTuple):
    """Log-probability of each target, and the log of its expectation under the model."""

    logprobs: Float[Array, "*positions"]
    log_collision: Float[Array, "*positions"]


def token_logprobs(
    hidden: Float[Array, "*positions width"],
    head: LMHead,
    targets: Int[Array, "*positions"],
    *,
    block_size: int | None = None,
) -> Float[Array, "*positions"]:
    """Log-probability of each target token, $\\log \\pi(y_t \\mid h_t)$.

    Args:
      hidden: final hidden states (after the last norm) that predict the targets.
      head: the LM head.
      targets: token ids; one outside the vocabulary (an ignore-index) gives NaN.
      block_size: vocabulary entries whose logits exist at one time; by default
        as many as keep a block of logits near 16 MiB, and more where a device has so few
        columns of the head that it would hand over too little of a block.

    Returns:
      Log-probabilities in nats, in float32 whatever the dtypes of the inputs
      (float64 stays float64).

    Raises:
      TypeError: the head is no `LMHead`, but a bare kernel for example.
      ValueError: the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> head = LMHead(jnp.zeros((8, 4)))
    >>> print(token_logprobs(jnp.ones((2, 4)), head, jnp.array([0, 7])))  # -log(8)
    [-2.0794415 -2.0794415]
    """
    return _blockwise(hidden, head, targets, block_size).logprobs


def token_logprobs_and_entropy(
    hidden: Float[Array, "*positions width"],
    head: LMHead,
    targets: Int[Array, "*positions"],
    *,
    block_size: int | None = None,
) -> TokenLogprobs:
    """As `token_logprobs`, with the entropy $-\\sum_v \\pi(v) \\log \\pi(v)$ of each position."""
    result = _blockwise(hidden, head, targets, block_size, with_entropy=True)
    return TokenLogprobs(result.logprobs, result.entropy)


def token_logprobs_and_collision(
    hidden: Float[Array, "*positions width"],
    head: LMHead,
    targets: Int[Array, "*positions"],
    *,
    block_size: int | None = None,
) -> TokenCollisions:
    """As `token_logprobs`, with $\\log \\sum_v \\pi(v)^2$ of each position, which has no gradient.

    It is the probability that two samples are the same token, in nats, and what
    `losses.weighting.wpo` aligns log-probabilities with.
    """
    result = _blockwise(hidden, head, targets, block_size, with_collision=True)
    return TokenCollisions(result.logprobs, jax.lax.stop_gradient(result.log_collision))


def token_kl(
    hidden_p: Float[Array, "*positions width_p"],
    head_p: LMHead,
    hidden_q: Float[Array, "*positions width_q"],
    head_q: LMHead,
    *,
    block_size: int | None = None,
) -> Float[Array, "*positions"]:
    """Exact KL divergence of the next-token distributions, $KL(p(\\cdot|h_t), q(\\cdot|h'_t))$.

    Formula: $\\sum_v p_v (\\log p_v - \\log q_v)$, over the whole vocabulary. Summed over the
    positions of a response that was sampled from p it is an estimate of the KL of responses, see
    `evaluation.sequence_kl`.

    The gradient is right, and as little of the logits exists in the backward pass; it is not as
    fast as that of `token_logprobs`.

    Args:
      hidden_p: final hidden states that predict the next tokens, of p.
      head_p: p's LM head; its temperature counts.
      hidden_q: those of q, of the same positions.
      head_q: q's LM head, of the same vocabulary.
      block_size: vocabulary entries whose logits exist at one time, of both.

    Returns:
      Divergences in nats, at least 0, in float32 whatever the dtypes of the inputs (float64 stays
      float64).

    Raises:
      TypeError: a head is no `LMHead`.
      ValueError: the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> p, q = LMHead(jnp.zeros((2, 1))), LMHead(jnp.log(jnp.array([[0.25], [0.75]])))
    >>> print(f"{token_kl(jnp.ones((1, 1)), p, jnp.ones((1, 1)), q)[0]:.4f}")  # log(2 / sqrt(3))
    0.1438
    """
    positions = hidden_p.shape[:-1]
    _check("token_kl", hidden_p, head_p, positions, "their positions")
    _check("token_kl", hidden_q, head_q, positions, "p's positions")
    vocabulary = head_p.kernel.shape[0]
    if head_q.kernel.shape[0] != vocabulary:
        raise ValueError(
            f"token_kl expected heads of one vocabulary; got {vocabulary} entries and "
            f"{head_q.kernel.shape[0]}."
        )
    count = math.prod(positions)
    # Twice as many logits exist at one time as for log-probs.
    block_size = block_size or _block_size(2 * count)
    sides = [
        (_Setting(block_size, head.soft_cap, head.temperature), hidden.reshape(count, -1), head)
        for hidden, head in ((hidden_p, head_p), (hidden_q, head_q))
    ]
    return _token_kl(sides, block_size, vocabulary).reshape(positions)


def _token_kl(
    sides: Sequence[tuple["_Setting", Array, LMHead]], block_size: int, vocabulary: int
) -> Float[Array, " positions"]:
    hidden = [of_side for _, of_side, _ in sides]
    dtype = jnp.promote_types(jnp.result_type(*hidden), jnp.float32)

    def step(carry: tuple, start: Array | int, size: int) -> tuple:
        maxima, totals, moment = carry
        logits = [
            _block_logits(setting, of_side, head.kernel, head.bias, start, size)[0].astype(dtype)
            for setting, of_side, head in sides
        ]
        # What the sums are relative to is arbitrary, so that it has no gradient.
        new = [
            jnp.maximum(before, jax.lax.stop_gradient(x).max(axis=-1))
            for before, x in zip(maxima, logits, strict=True)
        ]
        moves = [before - after for before, after in zip(maxima, new, strict=True)]
        shifted = [x - after[:, None] for x, after in zip(logits, new, strict=True)]
        weights = [jnp.exp(x) for x in shifted]
        # An entry that p never gives counts nothing, whatever q says of it.
        here = weights[0] > 0
        ratios = jnp.where(here, shifted[0], 0) - jnp.where(here, shifted[1], 0)
        # The moment is the sum of p's weights * (log-ratio), relative to both maxima.
        moment = jnp.exp(moves[0]) * (moment + (moves[0] - moves[1]) * totals[0])
        moment += jnp.where(here, weights[0] * ratios, 0).sum(axis=-1)
        totals = [
            jnp.exp(move) * total + of_block.sum(axis=-1)
            for move, total, of_block in zip(moves, totals, weights, strict=True)
        ]
        return tuple(new), tuple(totals), moment

    zeros = jnp.zeros(len(hidden[0]), dtype)
    # A finite start, since (-inf) * 0 would make the moment NaN.
    lowest = jnp.full_like(zeros, jnp.finfo(dtype).min / 4)
    # The backward pass makes the logits of each block again.
    step = jax.checkpoint(step, static_argnums=2)
    _, (total_p, total_q), moment = _over_blocks(
        block_size, vocabulary, step, ((lowest, lowest), (zeros, zeros), zeros)
    )
    divergence = moment / total_p - (jnp.log(total_p) - jnp.log(total_q))
    # Below 0 it is rounding; a NaN stays one.
    return jnp.maximum(divergence, 0)


def from_logits(
    logits: Float[Array, "*positions vocabulary"], targets: Int[Array, "*positions"]
) -> Float[Array, "*positions"]:
    """Log-probability of each target, for models that only give logits.

    Args:
      logits: unnormalised log-probabilities. For a causal model over `tokens`,
        pass `logits[:, :-1]` with `tokens[:, 1:]`.
      targets: token ids; one outside the vocabulary (an ignore-index) gives NaN.

    Returns:
      Log-probabilities in nats, in float32 (float64 stays float64).

    Raises:
      ValueError: the leading shapes differ.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"from_logits expected one target a position; got logits {logits.shape} "
            f"and targets {targets.shape}. Shift them first: logits[:, :-1] with tokens[:, 1:]."
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logps = target_logits - jax.nn.logsumexp(logits, axis=-1)
    return _nan_outside(logits.shape[-1], targets, logps)


def _blockwise(
    hidden: Array, head: LMHead, targets: Array, block_size: int | None, **wanted: bool
) -> "_Result":
    _check("token_logprobs", hidden, head, targets.shape, "the targets' shape")
    width = head.kernel.shape[1]
    shards = 1 if head.split is None else head.split.shards
    if not block_size:
        # What counts is how many positions a device has, and how much it hands over of a block.
        parts = 1 if head.split is None else head.split.parts
        least = -(-_SMALLEST_PART * parts // width) if parts > 1 else 0
        block_size = max(_block_size(-(-targets.size // shards)), -(-least // _LANES) * _LANES)
    setting = _Setting(block_size, head.soft_cap, head.temperature, head.split, **wanted)
    # The positions lie along one flat axis: XLA on CPU is slower at products with several axes.
    hidden, flat = hidden.reshape(-1, width), targets.ravel()
    missing = -flat.size % shards
    if missing:
        hidden, flat = (
            jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for x in (hidden, flat)
        )
    result = _token_logprobs(setting, hidden, head.kernel, head.bias, flat)
    return _Result(*(x[: targets.size].reshape(targets.shape) for x in result))


def _check(name: str, hidden: Array, head: LMHead, positions: tuple[int, ...], whose: str) -> None:
    """Refuses hidden states and a head that do not fit together, or not these positions."""
    if not isinstance(head, LMHead):
        raise TypeError(
            f"{name} expected an LMHead; got {type(head).__name__}. Pass LMHead(kernel), "
            "with one row of the kernel a vocabulary entry, or LMHead(kernel, bias)."
        )
    vocabulary, width = head.kernel.shape
    if hidden.shape != (*positions, width):
        raise ValueError(
            f"{name} expected hidden states {(*positions, width)}, {whose} "
            f"and the width of the head's kernel {head.kernel.shape}; got {hidden.shape}."
        )
    if head.bias is not None and head.bias.shape != (vocabulary,):
        raise ValueError(f"head.bias should be {(vocabulary,)}; got {head.bias.shape}.")


def _block_size(positions: int) -> int:
    """As many vocabulary entries as keep the logits of these positions near `_BLOCK_ENTRIES`."""
    return max(_BLOCK_ENTRIES // max(positions, 1) // _LANES * _LANES, _SMALLEST_BLOCK)


class _Setting(NamedTuple):
    block_size: int
    soft_cap: float | None
    temperature: float
    split: Split | None = None
    with_entropy: bool = False
    with_collision: bool = False

    def on_devices(self, function: Callable, inputs: tuple[str, ...], outputs: Any) -> Callable:
        """A function of what each device has, as one of whole arrays.

        Args:
          function: of arrays, which are "table", "bias" or "rows".
          inputs: which of these.
          outputs: which of these its results are.
        """
        if self.split is None:
            return function
        specs = {
            "table": self.split.table,
            "bias": PartitionSpec(self.split.vocabulary),
            "rows": self.split.rows,
        }
        return jax.shard_map(
            function,
            in_specs=tuple(specs[name] for name in inputs),
            out_specs=jax.tree.map(specs.__getitem__, outputs),
            # What is equal on several devices is said here by the sums over them.
            check_vma=False,
        )

    def first_entry(self, kernel: Array) -> Array | int:
        """The first entry of the vocabulary that this device has."""
        if self.split is None or self.split.vocabulary is None:
            return 0
        return jax.lax.axis_index(self.split.vocabulary) * kernel.shape[0]

    def entries(self, kernel: Array) -> int:
        """How many entries the whole vocabulary has."""
        if self.split is None or self.split.vocabulary is None:
            return kernel.shape[0]
        return kernel.shape[0] * jax.lax.axis_size(self.split.vocabulary)

    def gathered(self, block: Array) -> Array:
        """A block of the kernel with all of its columns."""
        if self.split is None or self.split.width is None:
            return block
        return jax.lax.all_gather(block, self.split.width, axis=1, tiled=True)

    def scattered(self, block: Array) -> Array:
        """This device's columns of a block, summed over the devices that gathered it."""
        if self.split is None or self.split.width is None:
            return block
        return collectives.scatter(block, self.split.width, 1)

    def over_vocabulary(self, x: Any, reduce: Callable = jax.lax.psum) -> Any:
        """Sums, or another reduction, over all parts of the vocabulary."""
        if self.split is None or self.split.vocabulary is None:
            return x
        return reduce(x, self.split.vocabulary)


class _Result(NamedTuple):
    logprobs: Array
    entropy: Array
    log_collision: Array


def _over_blocks(block_size: int, vocabulary: int, step: Callable, carry: Any) -> Any:
    """Applies `step(carry, first_column, columns)` to the remainder, then to each full block."""
    block_size = min(block_size, vocabulary)
    full, remainder = divmod(vocabulary, block_size)
    if remainder:
        carry = step(carry, full * block_size, remainder)
    return jax.lax.fori_loop(
        0, full, lambda i, carry: step(carry, i * block_size, block_size), carry
    )


def _block_logits(
    setting: _Setting,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    start: Array | int,
    size: int,
) -> tuple[Array, Array]:
    """The logits of `size` columns from `start` on, and the rows of the kernel behind them."""
    kernel = jax.lax.dynamic_slice_in_dim(kernel, start, size).astype(hidden.dtype)
    kernel = setting.gathered(kernel)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("td,vd->tv", hidden, kernel, preferred_element_type=dtype)
    if bias is not None:
        logits += jax.lax.dynamic_slice_in_dim(bias, start, size).astype(dtype)[None]
    return _scaled(logits, setting.soft_cap, setting.temperature), kernel


def _scaled(logits: Array, soft_cap: float | None, temperature: float) -> Array:
    """Products of hidden states and the head, bounded and divided by the temperature."""
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits if temperature == 1 else logits / temperature


def _through_scaling(by_logits: Array, logits: Array, setting: _Setting) -> Array:
    """The gradient by what `_scaled` was given, from that by the logits that it gave."""
    if setting.soft_cap is not None:
        by_logits *= 1 - jnp.square(logits / (setting.soft_cap / setting.temperature))
    return by_logits if setting.temperature == 1 else by_logits / setting.temperature


def _nan_outside(vocabulary: int, targets: Array, logps: Array) -> Array:
    """A target that is no token, such as an ignore-index of -100, must not look like one."""
    return jnp.where((targets >= 0) & (targets < vocabulary), logps, jnp.nan)


def _is_target(targets: Array, start: Array | int, size: int) -> Array:
    columns = start + jnp.arange(size, dtype=targets.dtype)
    return targets[:, None] == columns[None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(
    setting: _Setting, hidden: Array, kernel: Array, bias: Array | None, targets: Array
) -> _Result:
    return _forward(setting, hidden, kernel, bias, targets)[0]


def _forward(
    setting: _Setting, hidden: Array, kernel: Array, bias: Array | None, targets: Array
) -> tuple[_Result, tuple]:
    forward = setting.on_devices(
        partial(_forward_here, setting),
        ("rows", "table", "bias", "rows"),
        ("rows",) * 5,
    )
    *result, highest, log_total = forward(hidden, kernel, bias, targets)
    found = _Result(*result)
    return found, (hidden, kernel, bias, targets, highest, log_total, found.entropy)


def _forward_here(
    setting: _Setting, hidden: Array, kernel: Array, bias: Array | None, targets: Array
) -> tuple[Array, ...]:
    """On one device: the result, the highest logits, and the log-sum-exp relative to them."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    first = setting.first_entry(kernel)

    def step(carry: tuple, start: Array | int, size: int) -> tuple:
        maximum, total, moment, squares, target_logit = carry
        logits, _ = _block_logits(setting, hidden, kernel, bias, start, size)
        new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
        shifted = logits - new_maximum[..., None]
        weights = jnp.exp(shifted)
        rescale = jnp.exp(maximum - new_maximum)
        if setting.with_entropy:
            # The moment is the sum of weights * (logit - maximum), so it moves with the maximum.
            moment = rescale * (moment + (maximum - new_maximum) * total)
            moment += jnp.where(weights > 0, weights * shifted, 0).sum(axis=-1)
        if setting.with_collision:
            squares = jnp.square(rescale) * squares + jnp.square(weights).sum(axis=-1)
        total = rescale * total + weights.sum(axis=-1)
        here = _is_target(targets, first + start, size)
        target_logit += jnp.where(here, logits, 0).sum(axis=-1)
        return new_maximum, total, moment, squares, target_logit

    # A finite start, since (-inf) * 0 would make the moment NaN.
    lowest = jnp.full(targets.shape, jnp.finfo(dtype).min / 4, dtype)
    zeros = jnp.zeros(targets.shape, dtype)
    maximum, total, moment, squares, target_logit = _over_blocks(
        setting.block_size, kernel.shape[0], step, (lowest, zeros, zeros, zeros, zeros)
    )
    highest = setting.over_vocabulary(maximum, jax.lax.pmax)
    rescale = jnp.exp(maximum - highest)
    moment = rescale * (moment + (maximum - highest) * total)
    total, moment, squares, target_logit = setting.over_vocabulary(
        (rescale * total, moment, jnp.square(rescale) * squares, target_logit)
    )
    log_total = jnp.log(total)
    entropy = log_total - moment / total if setting.with_entropy else zeros
    log_collision = jnp.log(squares) - 2 * log_total if setting.with_collision else zeros
    # Subtracting the maximum first keeps small log-probs exact for large logits.
    logps = _nan_outside(setting.entries(kernel), targets, (target_logit - highest) - log_total)
    return logps, entropy, log_collision, highest, log_total


def _backward(setting: _Setting, residuals: tuple, cotangents: _Result) -> tuple:
    rows = ("rows",) * 6
    backward = setting.on_devices(
        partial(_backward_here, setting),
        ("rows", "table", "bias", *rows),
        ("rows", "table", "bias"),
    )
    by_result = jnp.asarray(cotangents.logprobs), jnp.asarray(cotangents.entropy)
    return *backward(*residuals, *by_result), None


def _backward_here(
    setting: _Setting,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    targets: Array,
    maximum: Array,
    log_total: Array,
    entropy: Array,
    by_logprob: Array,
    by_entropy: Array,
) -> tuple[Array, Array, Array | None]:
    """On one device: the gradients by the hidden states, the kernel and the bias."""
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    by_logprob, by_entropy = by_logprob[:, None], by_entropy[:, None]
    first = setting.first_entry(kernel)

    def step(carry: tuple, start: Array | int, size: int) -> tuple:
        by_hidden, by_kernel, by_bias = carry
        logits, kernel_block = _block_logits(setting, hidden, kernel, bias, start, size)
        logps = (logits - maximum[..., None]) - log_total[..., None]
        probabilities = jnp.exp(logps)
        by_logits = jnp.where(_is_target(targets, first + start, size), by_logprob, 0)
        by_logits -= by_logprob * probabilities
        if setting.with_entropy:
            surprise = jnp.where(probabilities > 0, logps + entropy[..., None], 0)
            by_logits -= by_entropy * probabilities * surprise
        by_logits = _through_scaling(by_logits, logits, setting)
        if by_bias is not None:
            block = by_logits.sum(axis=0).astype(by_bias.dtype)
            by_bias = jax.lax.dynamic_update_slice_in_dim(by_bias, block, start, 0)
        # Both products run in the compute dtype, as the forward product did.
        by_logits = by_logits.astype(hidden.dtype)
        by_hidden += jnp.einsum(
            "tv,vd->td", by_logits, kernel_block, preferred_element_type=accumulator
        )
        block = jnp.einsum("tv,td->vd", by_logits, hidden, preferred_element_type=accumulator)
        block = setting.scattered(block).astype(kernel.dtype)
        by_kernel = jax.lax.dynamic_update_slice_in_dim(by_kernel, block, start, 0)
        return by_hidden, by_kernel, by_bias

    by_hidden, by_kernel, by_bias = _over_blocks(
        setting.block_size,
        kernel.shape[0],
        step,
        (
            jnp.zeros(hidden.shape, accumulator),
            jnp.zeros_like(kernel),
            None if bias is None else jnp.zeros_like(bias),
        ),
    )
    by_hidden = setting.over_vocabulary(by_hidden).astype(hidden.dtype)
    if setting.split is not None:
        by_kernel = jax.lax.psum(by_kernel, setting.split.copies)
        by_bias = jax.lax.psum(by_bias, setting.split.positions)
    return by_hidden, by_kernel, by_bias


_token_logprobs.defvjp(_forward, _backward)
