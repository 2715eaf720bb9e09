"""The frozen reference: which model it is, or its log-probs, computed once.

It is the policy that training starts from, or another one that `reference.init_from` names.
"""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import checkpoint, config as config_lib, data, models, sharding, weights
from jaxpref.errors import UserError
from jaxpref.metrics import console
from jaxpref.models import Decoder, huggingface, without_adapters
from jaxpref.packing import PackedBatch
from jaxpref.trainable import as_abstract, partition, store_frozen

_TABLE = "reference_logps.npz"
# In a workdir: what describes the model of a reference that is another policy.
_ANOTHER = "reference_model"


class Another(NamedTuple):
    """A policy as the reference that is not the one that training starts from.

    Attributes:
      config: of its model; what the policy's run says of data and numbers is the same.
      source: where its weights come from.
      adapted: its model, with adapters if it has some.
    """

    config: ConfigDict
    source: weights.Source
    adapted: Decoder

    @property
    def model(self) -> Decoder:
        """Its model with the adapters merged."""
        return without_adapters(self.adapted)

    def abstract(self, mesh: Mesh, dtype: str) -> Any:
        """Shapes and shardings of its parameters, in a dtype."""
        return store_frozen(
            huggingface.abstract_params(self.model, mesh), dtype, convert=as_abstract
        )

    def load(self, mesh: Mesh, dtype: str) -> Any:
        """Its parameters, all in a dtype, with the adapters merged."""
        abstract = huggingface.abstract_params(self.adapted, mesh)
        abstract = store_frozen(abstract, dtype, convert=as_abstract)
        console.print(f"reference: another policy, {self.config.model.init_from}")
        params = weights.load(self.config, self.source, self.adapted, abstract)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return models.merge_adapters(self.adapted, params)[1]

    def keep(self, workdir: Path) -> None:
        """Describes the model in the workdir, so that resuming needs nothing else."""
        if jax.process_index():
            return
        folder = workdir / _ANOTHER
        folder.mkdir(exist_ok=True)
        config = self.config.copy_and_resolve_references()
        config.model.lora.rank = 0
        checkpoint.write_run(folder, checkpoint.describe_run(config))
        weights.keep(self.source, self.adapted, folder)


def find_another(
    config: ConfigDict, workdir: Path, policy: Decoder, tokenizer: Any
) -> Another | None:
    """The policy that `reference.init_from` names; None if it names none, or is needed no more.

    Args:
      config: a checked config.
      workdir: of a run that begins, or of one that goes on with the reference it began with.
      policy: the model that is trained.
      tokenizer: the policy's.

    Raises:
      UserError: there is no such model, its tokenizer gives other ids than the policy's, or it is
        of another shape where the two are to be mixed.
    """
    if checkpoint.latest_step(workdir) is not None:
        begun = (checkpoint.read_run(workdir) or {}).get("reference.init_from")
        if not begun or config.reference.mode != "live":
            return None
        described = checkpoint.read_run(workdir / _ANOTHER)
        if described is None:
            raise UserError(
                f"{workdir / _ANOTHER}: the description of this run's reference cannot be found; "
                "put the folder back, or start again in another --workdir."
            )
        other, source = config_lib.from_flat(described), weights.kept(workdir / _ANOTHER)
        return Another(other, source, weights.build_model(other, source, len(tokenizer)))
    if not config.reference.init_from:
        return None
    other = _config_of_another(config)
    try:
        source = weights.find(other, workdir / _ANOTHER)
        model = weights.build_model(other, source, len(tokenizer))
    except UserError as error:
        # There it is the first policy that is looked for.
        message = str(error).replace("model.init_from", "reference.init_from")
        raise UserError(message) from error
    name = other.tokenizer.name
    theirs = data.load_tokenizer(source.tokenizer if name == "auto" else name)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"reference.init_from={config.reference.init_from}: its tokenizer gives other ids than "
            "the policy's, so it cannot say how likely the policy's tokens are; give a model with "
            "the same tokenizer."
        )
    another = Another(other, source, model)
    if config.reference.mode == "synced" and another.model.config != policy.config:
        raise UserError(
            f"reference.init_from={config.reference.init_from}: is of another shape than the "
            "policy, with whose parameters reference.mode 'synced' mixes its own; use 'live'."
        )
    return another


def _config_of_another(config: ConfigDict) -> ConfigDict:
    other = config_lib.default(config.algorithm.name)
    described = checkpoint.read_run(Path(config.reference.init_from))
    if described is not None:
        there = config_lib.from_flat(described)
        other.model.update(there.model)
        other.tokenizer.update(there.tokenizer)
    for name in ("dtype", "remat", "attention_block", "ignore_keys"):
        other.model[name] = config.model[name]
    for name in ("max_length", "max_prompt_length"):
        other.data[name] = config.data[name]
    other.model.init_from = config.reference.init_from
    return other


def has_adapted(params: Any) -> bool:
    """Whether adapters say anything: fresh ones, whose second factor is 0, do not."""
    factors, _ = partition(params, r"_lora_b$")
    return any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(factors))


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
    # Weighted by position, so that a permutation shows; integers wrap, whatever the order.
    bits = jax.lax.bitcast_convert_type(x.ravel(), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    weights = 2 * jnp.arange(x.size, dtype=jnp.uint32) + 1
    return (bits.astype(jnp.uint32) * weights).sum(dtype=jnp.uint32)


def save_table(
    workdir: Path,
    tables: dict[str, Float[np.ndarray, "_ _"]],
    data_fingerprint: str,
    reference_digest: str,
) -> None:
    """Stores precomputed log-probs with what they were computed from."""
    if jax.process_index():
        return
    temporary = workdir / f"tmp.{_TABLE}"
    with temporary.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            **tables,
            data_fingerprint=np.asarray(data_fingerprint),
            reference_digest=np.asarray(reference_digest),
        )
    temporary.replace(workdir / _TABLE)


def load_table(
    workdir: Path, data_fingerprint: str, reference_digest: str | None
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
    path = workdir / _TABLE
    if not path.exists():
        return None
    try:
        # The format has a check sum of each array, which is compared as it is read.
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            tables = dict(stored)
    except Exception as error:  # A damaged archive may raise anything.
        raise UserError(
            f"{path}: the reference's log-probs are damaged ({error}). Put a copy of the file "
            "back; or, if no checkpoint was saved yet, remove it to compute them anew."
        ) from error
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
