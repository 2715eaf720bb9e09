"""The reference's log-probs, computed once and kept with what they were computed from."""

import io
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpref import processes, sharding, workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.packing import PackedBatch
from jaxpref.workdir import AnyPath

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
        parts.append(np.asarray(sharding.fetch(logps(batch))))
        progress(min(sum(map(len, parts)), examples))
    return np.concatenate(parts)[:examples]


def digest(params: Any) -> str:
    """A fingerprint of parameters, bit for bit, computed where they lie."""

    @jax.jit
    def sums(params: Any) -> list[jax.Array]:
        return [_sum_of_bits(x) for x in jax.tree.leaves(params)]

    return "".join(f"{int(x):08x}" for x in sums(params))


def _sum_of_bits(x: jax.Array) -> jax.Array:
    # The weights are positions, so that a permutation shows; integers wrap, whatever the order.
    bits = jax.lax.bitcast_convert_type(x.ravel(), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    weights = 2 * jnp.arange(x.size, dtype=jnp.uint32) + 1
    return (bits.astype(jnp.uint32) * weights).sum(dtype=jnp.uint32)


def save_table(
    workdir: AnyPath,
    tables: dict[str, Float[np.ndarray, "_ _"]],
    data_fingerprint: str,
    reference_digest: str,
) -> None:
    """Stores precomputed log-probs with what they were computed from."""
    if jax.process_index():
        return
    archive = io.BytesIO()
    np.savez(
        archive,
        allow_pickle=False,
        **tables,
        data_fingerprint=np.asarray(data_fingerprint),
        reference_digest=np.asarray(reference_digest),
    )
    workdir_lib.write(workdir / _TABLE, archive.getvalue())


def load_table(
    workdir: AnyPath, data_fingerprint: str, reference_digest: str | None
) -> dict[str, Float[np.ndarray, "_ _"]] | None:
    """Reads what `save_table` stored.

    Args:
      workdir: where.
      data_fingerprint: of the data that the log-probs are needed for.
      reference_digest: of the reference; None for a run that resumes, whose reference is
        the one that the table was computed from.

    Returns:
      The tables, or None if there are none.

    Raises:
      UserError: they belong to other data or to another reference, or are damaged.
    """
    path, tables = workdir / _TABLE, _read(workdir)
    if tables is None:
        return None
    wanted = {"data_fingerprint": data_fingerprint, "reference_digest": reference_digest}
    for name, value in wanted.items():
        if value is not None and (there := str(tables.get(name))) != value:
            advice = (
                "Remove the file to compute the reference's log-probs anew, or give another "
                "--workdir."
                if reference_digest
                else "Put back the held-out data that the run began with."
            )
            raise UserError(
                f"{path}: {name.replace('_', ' ')} {there}, but this run's is {value}. {advice}"
            )
    return {name: table for name, table in tables.items() if name not in wanted}


def stored_digest(workdir: AnyPath) -> str | None:
    """Of the reference that a workdir's table was computed from; None without a table.

    It begins with the reference's `digest`.

    Raises:
      UserError: the table is damaged.
    """
    tables = _read(workdir)
    return None if tables is None else str(tables.get("reference_digest"))


def _read(workdir: AnyPath) -> dict[str, np.ndarray] | None:
    path = workdir / _TABLE
    content = workdir_lib.read(path)
    # All together compute what is not there, so the first one says whether it is.
    if not processes.in_first(lambda: content is not None):
        return None
    if content is None:
        raise workdir_lib.not_shared(path)
    try:
        # The format has a check sum of each array, which is compared as it is read.
        with np.load(io.BytesIO(content)) as stored:
            return dict(stored)
    except Exception as error:  # A damaged archive may raise anything.
        raise UserError(
            f"{path}: the reference's log-probs are damaged ({error}). Put a copy of the file "
            "back; or, if no checkpoint was saved yet, remove it to compute them anew."
        ) from error
