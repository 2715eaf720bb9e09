"""The frozen reference: the policy's initial parameters, or their log-probs computed once."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxpref.errors import UserError
from jaxpref.packing import PackedBatch

_TABLE = "reference_logps.npz"


def precompute(
    logps: Callable[[PackedBatch], Float[Array, "groups responses"]],
    batches: Iterable[PackedBatch],
    examples: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "examples responses"]:
    """Log-probs of every response under the reference, in the data's order.

    Args:
      logps: summed log-probs of a batch's responses.
      batches: every example once, in order.
      examples: how many there are; what comes after them is filling.
      progress: called with the number of examples done so far.
    """
    parts: list[np.ndarray] = []
    for batch in batches:
        parts.append(np.asarray(jax.device_get(logps(batch))))
        progress(min(sum(map(len, parts)), examples))
    return np.concatenate(parts)[:examples]


def save_table(
    workdir: Path, tables: dict[str, Float[np.ndarray, "_ _"]], fingerprint: str
) -> None:
    """Stores precomputed log-probs with the fingerprint of the data they belong to."""
    temporary = workdir / f"tmp.{_TABLE}"
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, fingerprint=np.asarray(fingerprint), **tables)
    temporary.replace(workdir / _TABLE)


def load_table(workdir: Path, fingerprint: str) -> dict[str, Float[np.ndarray, "_ _"]]:
    """Reads what `save_table` stored.

    Raises:
      UserError: there is no table, or it belongs to other data.
    """
    path = workdir / _TABLE
    if not path.exists():
        raise UserError(f"{path}: the precomputed reference of this run is missing.")
    with np.load(path) as stored:
        tables = dict(stored)
    if (there := str(tables.pop("fingerprint"))) != fingerprint:
        raise UserError(
            f"{path}: precomputed for data with fingerprint {there}; this data has {fingerprint}."
        )
    return tables
