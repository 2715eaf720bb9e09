"""How the reference of each mode starts, for a run that begins and for one that is resumed.

Before the first update its parameters come from the policy that training starts from, or from
another policy, and are kept in the workdir; a run that is resumed has them from there, so that
nothing else has to be where it was.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import checkpoint, config as config_lib, data as data_lib, identity, sharding
from jaxpref.algorithms import Algorithm
from jaxpref.data import Data
from jaxpref.errors import UserError
from jaxpref.models import Decoder, packed, without_adapters
from jaxpref.models.protocol import Model
from jaxpref.packing import PackedBatch, sum_micro_batches
from jaxpref.reference import table
from jaxpref.reference.another import Another
from jaxpref.reference.modes import Free, Live, Mode, Precomputed, Reference, Synced
from jaxpref.terminal import progress
from jaxpref.trainable import as_abstract, merge, partition
from jaxpref.workdir import AnyPath

# The key of `run.json` that says whether the reference has parameters of its own, beside those
# that are frozen.
_OWN = "reference.own_parameters"


class Start(NamedTuple):
    """What a reference starts from.

    Attributes:
      config: a checked config.
      workdir: of the run.
      mesh: where arrays go.
      decoder: the policy's model.
      another: the policy that `reference.init_from` names, if any.
      policy: the policy's trained parameters: the first ones, or those that a run that is
        resumed has reached.
      frozen: the policy's other parameters.
      resuming: whether the run is resumed.
      algorithm: the method, which says what is read of the reference; None where no log-probs are
        computed beforehand.
      data: the examples, whose log-probs may be computed beforehand.
    """

    config: ConfigDict
    workdir: AnyPath
    mesh: Mesh
    decoder: Decoder
    another: Another | None
    policy: Any
    frozen: Any
    resuming: bool
    algorithm: Algorithm | None = None
    data: Data | None = None


def start(given: Start) -> Reference:
    """The reference that the config asks for.

    It is called outside `sharding.use`: where parameters go is said by their own shardings.

    Raises:
      UserError: it cannot be had.
    """
    return _STARTS[given.config.reference.mode](given)


def abstract(given: Start) -> tuple[Mode, Any]:
    """How a reference gives log-probs, and the shapes and shardings of its own parameters.

    Args:
      given: of a run that has not begun, with shapes and shardings in place of parameters. Its
        adapters are taken to be fresh ones.
    """
    knobs = given.config.reference
    if knobs.mode == "live":
        return _live_mode(given), _live_abstract(given)
    modes: dict[str, Callable[[], Mode]] = {
        "free": Free,
        "precomputed": Precomputed,
        "adapter": lambda: Live(_model(given, without_adapters(given.decoder))),
        "synced": lambda: Synced(_model(given), mix=knobs.sync_mix, every=knobs.sync_every),
    }
    return modes[knobs.mode](), {}


def moves(config: ConfigDict) -> bool:
    """Whether the train state will have the reference's parameters."""
    return config.reference.mode == "synced"


def describe(reference: Reference) -> dict[str, bool]:
    """What `run.json` keeps of a reference that has started."""
    return {_OWN: bool(reference.params)}


def _model(given: Start, decoder: Decoder | None = None) -> Model:
    """A reference's model, by default of the policy's shape, at the temperature of sampling."""
    return packed(decoder or given.decoder, temperature=config_lib.temperature(given.config))


def _free(given: Start) -> Reference:
    return Reference(Free())


def _live(given: Start) -> Reference:
    dtype, another, mode = given.config.reference.dtype, given.another, _live_mode(given)
    if given.resuming:
        own = _live_abstract(given)
        return Reference(mode, checkpoint.restore_reference(given.workdir, own))
    if another is not None:
        params = another.load(given.mesh, dtype)
        another.keep(given.workdir)
    else:
        # This is a copy, since the update takes over the policy's buffers.
        params = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), given.policy)
    checkpoint.save_reference(given.workdir, params)
    return Reference(mode, params)


def _live_mode(given: Start) -> Mode:
    another = given.another
    return Live(_model(given, another.model if another else None), shared=another is None)


def _live_abstract(given: Start) -> Any:
    dtype, another = given.config.reference.dtype, given.another
    if another is not None:
        return another.abstract(given.mesh, dtype)
    return jax.tree.map(lambda x: as_abstract(x, dtype), given.policy)


def _adapter(given: Start) -> Reference:
    """The adapters that training starts with are on in it, if they say anything."""
    if given.resuming:
        adapted = (identity.read(given.workdir) or {}).get(_OWN, False)
    else:
        adapted = has_adapted(given.policy)
    # A reference without adapters needs the base alone, which the policy shares with it.
    return (
        _live(given) if adapted else Reference(Live(_model(given, without_adapters(given.decoder))))
    )


def _synced(given: Start) -> Reference:
    knobs = given.config.reference
    mode = Synced(_model(given), mix=knobs.sync_mix, every=knobs.sync_every)
    if given.resuming:
        return Reference(mode)
    if given.another is not None:
        return Reference(mode, moving=given.another.load(given.mesh, "float32"))
    # This is a copy, since the update takes over the policy's buffers.
    return Reference(mode, moving=jax.tree.map(jnp.copy, given.policy))


def _precomputed(given: Start) -> Reference:
    config, data, another = given.config, given.data, given.another
    assert data is not None
    # The sums also depend on these, beside the reference's parameters.
    settings = f"{given.decoder.config}, {config.algorithm.get('length_alpha', 1.0)}"
    sides = [side for side in (data.train, data.held_out) if side is not None]
    parts = [side.fingerprint() for side in sides]
    fingerprint = "-".join([*parts, hashlib.sha256(settings.encode()).hexdigest()[:16]])
    params, digest = None, None
    if not given.resuming:
        params = (
            another.load(given.mesh, config.reference.dtype)
            if another
            else merge(given.policy, given.frozen)
        )
        digest = table.digest(params)
        if another is not None:
            digest += hashlib.sha256(str(another.model.config).encode()).hexdigest()[:8]
    columns = table.load_table(given.workdir, fingerprint, digest)
    if columns is None and given.resuming:
        raise UserError(
            f"{given.workdir}: the precomputed log-probs of this run's reference are missing."
        )
    if columns is None:
        columns = _compute(given, packed(another.model if another else given.decoder), params)
        table.save_table(given.workdir, columns, fingerprint, str(digest))
    return Reference(Precomputed(), columns=columns)


def _compute(given: Start, model: Model, params: Any) -> dict[str, np.ndarray]:
    """The log-probs of all examples, by side of the data."""
    assert given.algorithm is not None
    assert given.data is not None
    read = given.algorithm.reference_logps
    assert read is not None

    @jax.jit
    def logps(params: Any, batch: PackedBatch) -> jax.Array:
        # A response is in one micro-batch; its log-prob is 0 in the others.
        return sum_micro_batches(lambda micro, _: read(model(params, micro), micro), batch)

    columns = {}
    for side in ("train", "held_out"):
        dataset = getattr(given.data, side)
        if dataset is None:
            continue
        stream = data_lib.stream_of(given.config, given.data, side, given.mesh, training=False)
        with sharding.use(given.mesh), progress("reference log-probs", "examples") as tell:
            columns[side] = table.precompute(
                lambda batch: logps(params, sharding.put_batch(given.mesh, batch)),
                stream.once(),
                len(dataset),
                tell,
            )
    return columns


def has_adapted(params: Any) -> bool:
    """Whether adapters say anything: fresh ones, whose second factor is 0, do not."""
    factors, _ = partition(params, r"_lora_b$")
    return any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(factors))


_STARTS: dict[str, Callable[[Start], Reference]] = {
    "free": _free,
    "live": _live,
    "adapter": _adapter,
    "synced": _synced,
    "precomputed": _precomputed,
}
