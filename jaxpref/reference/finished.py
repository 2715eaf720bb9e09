"""The reference of a run that is over, as a model that can be asked about any response."""

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import checkpoint, config as config_lib, weights
from jaxpref.errors import UserError
from jaxpref.models import huggingface, packed
from jaxpref.reference import table
from jaxpref.reference.another import find_another, open_another
from jaxpref.reference.modes import Live, Reference
from jaxpref.reference.start import Start, start
from jaxpref.trainable import as_abstract, merge, partition
from jaxpref.workdir import AnyPath


def finished(
    config: ConfigDict,
    workdir: AnyPath,
    mesh: Mesh,
    opened: weights.Opened,
    policy: Any,
    frozen: Any,
) -> Reference:
    """The reference that a finished run has compared its policy with.

    One that moves is where the last update has left it. Of one whose log-probs were precomputed
    the weights were not kept; they are read from where they were, and compared with what the
    log-probs were computed from.

    Args:
      config: of the run.
      workdir: of the run.
      mesh: where arrays go.
      opened: the run's model and tokenizer.
      policy: the policy's trained parameters, as the run has left them.
      frozen: the policy's other parameters.

    Returns:
      A mode that can be asked for log-probs of any batch, with its own parameters in `params`.

    Raises:
      UserError: the weights cannot be had any more.
    """
    another = find_another(config, workdir, opened.model, opened.tokenizer)
    given = Start(config, workdir, mesh, opened.model, another, policy, frozen, resuming=True)
    try:
        if config.reference.mode == "precomputed":
            return _from_where_it_was(given, opened.tokenizer)
        reference = start(given)
        if not reference.mode.moves:
            return reference
        abstract = jax.tree.map(lambda x: as_abstract(x, "float32"), policy)
        return Reference(reference.mode, checkpoint.restore_moving_reference(workdir, abstract))
    except UserError as error:
        raise UserError(
            f"{workdir}: the reference of this run, which its rewards are measured from, cannot be "
            f"had: {error}"
        ) from error


def _from_where_it_was(given: Start, tokenizer: Any) -> Reference:
    """The model whose log-probs were precomputed."""
    config, stored = given.config, table.stored_digest(given.workdir)
    named = config.reference.init_from
    if stored is None:
        raise UserError(
            f"{given.workdir}: holds no precomputed log-probs, which would say what they were "
            "computed from; put the file back."
        )
    if named:
        another = open_another(config, named, "reference.init_from", tokenizer)
        model, params = another.model, another.load(given.mesh, config.reference.dtype)
    else:
        first = weights.open_first(config)
        abstract = huggingface.abstract_params(first.model, given.mesh)
        parts = partition(abstract, config_lib.trainable(config))
        model, params = first.model, merge(*weights.load_first(config, first, *parts))
    if not stored.startswith(table.digest(params)):
        begun = f"model.init_from={config.model.init_from}"
        raise UserError(
            f"{f'reference.init_from={named}' if named else begun}: these are other weights than "
            "those that its log-probs were computed from (reference.mode 'precomputed'), and of "
            "those no copy was kept. Put them back there."
        )
    return Reference(Live(packed(model), shared=False), params)
