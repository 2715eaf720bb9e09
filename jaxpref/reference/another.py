"""Another policy as the reference: what `reference.init_from` names."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import (
    checkpoint,
    config as config_lib,
    identity,
    models,
    weights,
    workdir as workdir_lib,
)
from jaxpref.errors import UserError
from jaxpref.models import Decoder, huggingface, without_adapters
from jaxpref.terminal import console
from jaxpref.tokenizer import load_tokenizer
from jaxpref.trainable import as_abstract, store_frozen
from jaxpref.workdir import AnyPath, as_path

# The folder of a workdir that describes the model of a reference that is another policy.
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
        console.print(f"another policy: {self.config.model.init_from}")
        params = weights.load(self.config, self.source, self.adapted, abstract)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return models.merge_adapters(self.adapted, params)[1]

    def keep(self, workdir: AnyPath) -> None:
        """Describes the model in the workdir, so that resuming needs nothing else."""
        if jax.process_index():
            return
        folder = workdir / _ANOTHER
        workdir_lib.make(folder)
        config = self.config.copy_and_resolve_references()
        config.model.lora.rank = 0
        identity.write(folder, identity.describe(config))
        weights.keep(self.source, self.adapted, folder)


def find_another(
    config: ConfigDict, workdir: AnyPath, policy: Decoder, tokenizer: Any
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
        begun = (identity.read(workdir) or {}).get("reference.init_from")
        if not begun or config.reference.mode != "live":
            return None
        described = identity.read(workdir / _ANOTHER)
        if described is None:
            raise UserError(
                f"{workdir / _ANOTHER}: the description of this run's reference cannot be found; "
                "put the folder back, or start again in another --workdir."
            )
        other, source = config_lib.from_flat(described), weights.kept(workdir / _ANOTHER)
        return Another(other, source, weights.build_model(other, source, len(tokenizer)))
    if not config.reference.init_from:
        return None
    another = open_another(config, config.reference.init_from, "reference.init_from", tokenizer)
    if config.reference.mode == "synced" and another.model.config != policy.config:
        raise UserError(
            f"reference.init_from={config.reference.init_from}: is of another shape than the "
            "policy, with whose parameters reference.mode 'synced' mixes its own; use 'live'."
        )
    return another


def open_another(config: ConfigDict, path: str, knob: str, tokenizer: Any) -> Another:
    """Another policy with the same tokenizer.

    Args:
      config: a checked config.
      path: a jaxpref workdir, or a Hugging Face directory or hub name.
      knob: that names the path, for messages.
      tokenizer: the policy's.

    Raises:
      UserError: there is no such model, or its tokenizer gives other ids than the policy's.
    """
    other = _config_of_another(config, path)
    try:
        source = weights.find(other, Path(_ANOTHER))
        model = weights.build_model(other, source, len(tokenizer))
    except UserError as error:
        # These functions look for the first policy, so their messages name its knob.
        raise UserError(str(error).replace("model.init_from", knob)) from error
    name = other.tokenizer.name
    theirs = load_tokenizer(source.tokenizer if name == "auto" else name)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{knob}={path}: its tokenizer gives other ids than the policy's, so it cannot say how "
            "likely the policy's tokens are; give a model with the same tokenizer."
        )
    return Another(other, source, model)


def _config_of_another(config: ConfigDict, path: str) -> ConfigDict:
    other = config_lib.default(config.algorithm.name)
    described = identity.read(as_path(path))
    if described is not None:
        there = config_lib.from_flat(described)
        other.model.update(there.model)
        other.tokenizer.update(there.tokenizer)
    for name in ("dtype", "remat", "attention", "attention_block", "ignore_keys"):
        other.model[name] = config.model[name]
    for name in ("max_length", "max_prompt_length"):
        other.data[name] = config.data[name]
    other.model.init_from = path
    return other
