"""Rotary positions, from the keys with which Hugging Face describes them."""

import math
from typing import Any

import numpy as np

from jaxpref.errors import UserError
from jaxpref.models.rotary import Rope


def make_rope(
    head_dim: int, *, interleaved: bool = False, max_length: int = 0, **rope: Any
) -> Rope:
    """Rotary positions from the keys of Hugging Face's `rope_parameters`.

    Args:
      head_dim: size of a head.
      interleaved: the two entries of a pair are neighbours; else they are half of the turning
        entries apart.
      max_length: the longest sequence, in tokens, that the model will see. Above the original
        length LongRoPE (arXiv 2402.13753) takes its long factors, and dynamic scaling takes
        the factors of a sequence of that length. The original implementations choose in
        each call by the longest sequence in it, which would let one sequence of a batch
        change another.
      rope: `rope_type` (default, linear, dynamic, llama3, yarn, longrope) and its parameters.

    Raises:
      UserError: `rope_type` is none of these.
    """
    kind = rope.get("rope_type", "default")
    frequencies, scale, limit = _plain_frequencies(head_dim, rope), 1.0, 0
    if kind == "linear":
        frequencies = frequencies / np.float32(rope["factor"])
    elif kind == "dynamic":
        original = rope["max_position_embeddings"]
        limit = max(max_length, original)
        frequencies = _dynamic(head_dim, rope, max(max_length / original, 1.0))
    elif kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif kind == "yarn":
        frequencies, scale = _yarn(frequencies, rope)
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        long = max_length > original
        limit = 0 if long else original
        factors = rope["long_factor" if long else "short_factor"]
        frequencies = frequencies / np.asarray(factors, np.float32)
        factor = rope.get("factor") or rope["max_position_embeddings"] / original
        scale = rope.get("attention_factor") or (
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        )
    elif kind != "default":
        raise UserError(
            f"{rope.get('where', 'rope_parameters')}: rope_type is {kind!r}, which jaxpref does "
            "not support; only default, linear, dynamic, llama3, yarn and longrope."
        )
    return Rope(tuple(map(float, frequencies)), scale, interleaved, limit)


def _plain_frequencies(head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    turning = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    # The original implementations compute the frequencies in float32, so these do too.
    exponents = np.arange(0, turning, 2, dtype=np.float32) / np.float32(turning)
    return 1 / np.float32(rope.get("rope_theta", 10_000.0)) ** exponents


def _dynamic(head_dim: int, rope: dict[str, Any], longer: float) -> np.ndarray:
    """Dynamic NTK-aware scaling for sequences `longer` times the original (arXiv 2309.00071, 3.3).

    The base grows so that slow frequencies are interpolated and the fastest one stays.
    """
    turning = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    stretch = rope["factor"] * longer - (rope["factor"] - 1)
    theta = rope["rope_theta"] * stretch ** (turning / (turning - 2))
    return _plain_frequencies(head_dim, {**rope, "rope_theta": theta})


def _llama3(frequencies: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """Llama 3.1's scaling.

    Slow frequencies are divided by the factor, fast ones stay as they are, and those in
    between are interpolated.
    """
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / rope["factor"] + kept * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, rope: dict[str, Any]) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3.2 and equation 22)."""
    factor, theta, size = rope["factor"], rope["rope_theta"], 2 * len(frequencies)
    original = rope.get("original_max_position_embeddings") or rope["max_position_embeddings"]

    def pair(turns: float) -> float:
        """The place of the pair that makes this many turns over the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(len(frequencies)) - low) / ((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    mixed = (1 - kept) * frequencies / factor + kept * frequencies

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return mixed.astype(np.float32), float(magnitude(1) if scale is None else scale)
