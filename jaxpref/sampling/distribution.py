"""What a token is drawn from, and how: the settings, their distribution, the random numbers."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

# Tokens whose probabilities are added up before one of them is drawn.
_BLOCK = 128


class Sampling(NamedTuple):
    """How responses are sampled.

    Attributes:
      samples: responses to each prompt.
      max_new_tokens: a response is cut after so many tokens.
      stops: a response ends with the first of these tokens, which belongs to it.
      temperature: what logits are divided by, for each sample, or one for all; 0 takes the most
        probable token.
      top_k: only so many tokens, the most probable ones, may be drawn; 0 for all.
      top_p: only the most probable tokens that together reach this probability may be drawn
        (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751); 1 for all.
      min_p: only tokens at least this share as probable as the most probable one may be drawn
        (Nguyen et al. 2024, arXiv 2407.01082); 0 for all.
      cache_dtype: of the keys and values that are remembered; None for the compute dtype.
    """

    samples: int = 1
    max_new_tokens: int = 128
    stops: tuple[int, ...] = ()
    temperature: float | tuple[float, ...] = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    cache_dtype: str | None = None

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One for each sample."""
        given = self.temperature
        return given if isinstance(given, tuple) else (given,) * self.samples

    @property
    def plain(self) -> bool:
        """Whether what is drawn from is the policy itself."""
        usual = all(t == 1 for t in self.temperatures)
        return usual and (self.top_k, self.top_p, self.min_p) == (0, 1, 0)

    def check(self) -> None:
        """Refuses what cannot be sampled.

        Raises:
          ValueError: naming the field.
        """
        for name, fits, need in (
            ("samples", self.samples >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", all(0 <= t < np.inf for t in self.temperatures), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise ValueError(f"{name} should be {need}; got {getattr(self, name)}.")
        if len(self.temperatures) != self.samples:
            raise ValueError(
                f"temperature should be one for all samples, or one for each of {self.samples}; "
                f"got {self.temperature}."
            )


def truncated(
    logits: Float[Array, "*rows vocabulary"],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Float[Array, "*rows vocabulary"]:
    """Logits with -infinity for what may not be drawn; see `Sampling`.

    The three are applied in this order, each to what the one before has left. Tokens as probable
    as the last one that is kept are kept too, so that the result does not depend on their order.

    >>> print(truncated(jnp.log(jnp.array([0.5, 0.3, 0.2])), top_p=0.6))
    [-0.6931472 -1.2039728       -inf]
    """
    if 0 < top_k < logits.shape[-1]:
        logits = _keep_most(logits, jnp.ones_like(logits), jnp.asarray(top_k, logits.dtype))
    if top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = _keep_most(logits, probabilities, jnp.asarray(top_p, logits.dtype))
    if min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + np.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _keep_most(logits: Array, weights: Array, enough: Array) -> Array:
    """Keeps the highest logits whose weights reach `enough`.

    The lowest logit that is kept is found bit by bit, which on most devices is much faster than
    to sort a vocabulary.
    """
    bits = 8 * logits.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    raw = jax.lax.bitcast_convert_type(logits, unsigned)
    highest = jnp.asarray(1 << (bits - 1), unsigned)
    # As unsigned numbers these are in the order of the floating-point numbers.
    rank = jnp.where(raw >= highest, ~raw, raw | highest)

    def step(i: Array, least: UInt[Array, "*rows 1"]) -> UInt[Array, "*rows 1"]:
        higher = least | (highest >> i.astype(unsigned))
        reached = jnp.where(rank >= higher, weights, 0).sum(-1, keepdims=True)
        return jnp.where(reached >= enough, higher, least)

    least = jax.lax.fori_loop(0, bits, step, jnp.zeros((*logits.shape[:-1], 1), unsigned))
    return jnp.where(rank >= least, logits, -jnp.inf)


def draw(
    key: Key[Array, ""], logits: Float[Array, " vocabulary"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Draws a token from the softmax of logits, and gives its log-probability in nats.

    A block of the vocabulary is drawn first, by its share of the probability, then a token of the
    block, each as the highest of logits with Gumbel noise. The distribution is that of noise on
    every logit, for a small part of the random numbers.
    """
    vocabulary = logits.shape[0]
    padded = jnp.pad(logits, (0, -vocabulary % _BLOCK), constant_values=-jnp.inf)
    blocks = padded.reshape(-1, _BLOCK)
    shares = jax.nn.logsumexp(blocks, axis=1)
    noise = jax.random.gumbel(key, (len(blocks) + _BLOCK,), logits.dtype)
    block = jnp.argmax(shares + noise[: len(blocks)])
    within = jnp.argmax(blocks[block] + noise[len(blocks) :])
    logp = blocks[block, within] - jax.nn.logsumexp(shares)
    return (block * _BLOCK + within).astype(jnp.int32), logp


def prompt_keys(seed: int, step: int, prompts: int) -> Key[Array, " prompts"]:
    """The keys of a step's prompts."""
    of_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, of_step))(jnp.arange(prompts))
