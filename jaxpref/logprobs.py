"""Hidden states and an LM head to log-probabilities, without the full logits.

A step over `tokens` scored positions and a vocabulary of `vocabulary` entries would
need `tokens x vocabulary` logits several times over. Here the vocabulary is walked
in blocks: the forward pass keeps a running log-sum-exp, the backward pass computes
each block's logits again, and each block of the head's gradient is written once.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.inputs import check_range

# Logits alive at one time, in entries; 2**22 float32 entries are 16 MiB.
_BLOCK_ENTRIES = 2**22
# A narrower block leaves matrix units idle, and TPU lanes come in 128.
_SMALLEST_BLOCK = 1024
_LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LMHead:
    """The map from hidden states to logits.

    With all its parts: `soft_cap * tanh((h @ kernel.T + bias) / soft_cap) / temperature`.

    Attributes:
      kernel: one row a vocabulary entry; for a tied head, the embedding table.
      bias: added to the logits; None for none.
      soft_cap: bound of the logits (Gemma 2, arXiv 2408.00118, section 2); None for none.
      temperature: what the logits are divided by last, above 0. What a policy sampled at this
        temperature has log-probs, entropy and KL of a head that has it too.

    Raises:
      ValueError: the temperature is not above 0.
    """

    kernel: Float[Array, "vocabulary width"]
    bias: Float[Array, " vocabulary"] | None = None
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_range("LMHead", above=0, temperature=self.temperature)

    def logits(self, hidden: Float[Array, "*positions width"]) -> Float[Array, "*positions _"]:
        """All logits in float32, for callers who want them; training does not."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum("...d,vd->...v", hidden, self.kernel, preferred_element_type=dtype)
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
        as many as keep a block of logits near 16 MiB.

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
    if not isinstance(head, LMHead):
        raise TypeError(
            f"token_logprobs expected an LMHead; got {type(head).__name__}. Pass LMHead(kernel), "
            "with one row of the kernel a vocabulary entry, or LMHead(kernel, bias)."
        )
    vocabulary, width = head.kernel.shape
    if hidden.shape != (*targets.shape, width):
        raise ValueError(
            f"token_logprobs expected hidden states {(*targets.shape, width)}, the targets' shape "
            f"and the width of the head's kernel {head.kernel.shape}; got {hidden.shape}."
        )
    if head.bias is not None and head.bias.shape != (vocabulary,):
        raise ValueError(f"head.bias should be {(vocabulary,)}; got {head.bias.shape}.")
    if block_size is None:
        block_size = _BLOCK_ENTRIES // max(targets.size, 1) // _LANES * _LANES
        block_size = max(block_size, _SMALLEST_BLOCK)
    setting = _Setting(min(block_size, vocabulary), head.soft_cap, head.temperature, **wanted)
    # The positions lie along one flat axis: XLA on CPU is slower at products with several axes.
    result = _token_logprobs(
        setting, hidden.reshape(-1, width), head.kernel, head.bias, targets.ravel()
    )
    return _Result(*(x.reshape(targets.shape) for x in result))


class _Setting(NamedTuple):
    block_size: int
    soft_cap: float | None
    temperature: float
    with_entropy: bool = False
    with_collision: bool = False


class _Result(NamedTuple):
    logprobs: Array
    entropy: Array
    log_collision: Array


def _over_blocks(block_size: int, vocabulary: int, step: Callable, carry: Any) -> Any:
    """Applies `step(carry, first_column, columns)` to the remainder, then to each full block."""
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
    kernel = jax.lax.dynamic_slice_in_dim(kernel, start, size)
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
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

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
        target_logit += jnp.where(_is_target(targets, start, size), logits, 0).sum(axis=-1)
        return new_maximum, total, moment, squares, target_logit

    # A finite start, since (-inf) * 0 would make the moment NaN.
    lowest = jnp.full(targets.shape, jnp.finfo(dtype).min / 4, dtype)
    zeros = jnp.zeros(targets.shape, dtype)
    maximum, total, moment, squares, target_logit = _over_blocks(
        setting.block_size, kernel.shape[0], step, (lowest, zeros, zeros, zeros, zeros)
    )
    log_total = jnp.log(total)
    entropy = log_total - moment / total if setting.with_entropy else zeros
    log_collision = jnp.log(squares) - 2 * log_total if setting.with_collision else zeros
    # Subtracting the maximum first keeps small log-probs exact for large logits.
    logps = _nan_outside(kernel.shape[0], targets, (target_logit - maximum) - log_total)
    result = _Result(logps, entropy, log_collision)
    return result, (hidden, kernel, bias, targets, maximum, log_total, entropy)


def _backward(setting: _Setting, residuals: tuple, cotangents: _Result) -> tuple:
    hidden, kernel, bias, targets, maximum, log_total, entropy = residuals
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    by_logprob, by_entropy = (x[..., None] for x in cotangents[:2])

    def step(carry: tuple, start: Array | int, size: int) -> tuple:
        by_hidden, by_kernel, by_bias = carry
        logits, kernel_block = _block_logits(setting, hidden, kernel, bias, start, size)
        logps = (logits - maximum[..., None]) - log_total[..., None]
        probabilities = jnp.exp(logps)
        by_logits = jnp.where(_is_target(targets, start, size), by_logprob, 0)
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
        by_kernel = jax.lax.dynamic_update_slice_in_dim(
            by_kernel, block.astype(kernel.dtype), start, 0
        )
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
    return by_hidden.astype(hidden.dtype), by_kernel, by_bias, None


_token_logprobs.defvjp(_forward, _backward)
