"""Where a run's model, its tokenizer and its first weights come from.

`model.init_from` names nothing (random weights), a jaxpref workdir, or a Hugging Face
directory or hub name, which may hold a model or PEFT adapters for one. A run that goes back
to Hugging Face, at once or through other workdirs, keeps the model's small files in
`workdir/huggingface/`, so that neither resuming nor exporting needs anything but the workdir.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import checkpoint, config as config_lib, identity, models, workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.models import Decoder, huggingface, without_adapters
from jaxpref.models.adapters import ADAPTERS
from jaxpref.models.huggingface import PEFT_CONFIG, SavedAdapters
from jaxpref.terminal import console
from jaxpref.tokenizer import load_tokenizer
from jaxpref.trainable import as_abstract, as_array, merge, partition, path_of, store_frozen
from jaxpref.workdir import AnyPath, as_path, is_address

_KEPT = "huggingface"
# These knobs shape a model with random weights; any other model has a shape of its own.
_SHAPE = (
    *("vocabulary_size", "width", "layers", "heads", "kv_heads", "head_dim", "feed_forward"),
    *("rope_theta", "norm_epsilon", "tied_head"),
)


class Source(NamedTuple):
    """Where a run begins.

    Attributes:
      workdir: the jaxpref workdir that the first weights come from, if any.
      pretrained: the directory with the Hugging Face model's files, if any, which may be in a
        bucket.
      adapters: what is merged into the weights of that directory, if anything.
    """

    workdir: AnyPath | None
    pretrained: AnyPath | None
    adapters: SavedAdapters | None = None

    @property
    def tokenizer(self) -> str:
        """What `tokenizer.name` "auto" means."""
        if self.adapters and (self.adapters.directory / "tokenizer_config.json").exists():
            return str(self.adapters.directory)
        return str(self.pretrained) if self.pretrained else "bytes"

    def has_scalar_head(self, model: Decoder) -> bool:
        """Whether the weights bring a scalar head; for a source other than a workdir."""
        grown = self.adapters is not None and self.adapters.scalar_head
        return grown or huggingface.has_scalar_head(model)


class Opened(NamedTuple):
    """A run's model and tokenizer, before any weights or data are read.

    Attributes:
      source: where the first weights come from.
      tokenizer: a `transformers` tokenizer.
      model: the policy's or the reward model's.
    """

    source: Source
    tokenizer: Any
    model: Decoder


def open_run(config: ConfigDict, workdir: AnyPath) -> Opened:
    """Opens a run, whether it begins, has begun, or is over.

    Raises:
      UserError: see `find`, `load_tokenizer` and `build_model`.
    """
    return _open(config, find(config, workdir))


def open_first(config: ConfigDict, platform: str = "") -> Opened:
    """Opens a run as it began, whatever has become of it since.

    Args:
      config: checked.
      platform: see `build_model`.

    Raises:
      UserError: see `open_run`.
    """
    return _open(config, _first(config), platform)


def _open(config: ConfigDict, source: Source, platform: str = "") -> Opened:
    name = config.tokenizer.name
    tokenizer = load_tokenizer(
        source.tokenizer if name == "auto" else name, config.tokenizer.chat_template
    )
    model = build_model(config, source, len(tokenizer), platform)
    return Opened(source, tokenizer, model)


def find(config: ConfigDict, workdir: AnyPath) -> Source:
    """Where this run begins; a run that has begun needs only its workdir.

    Raises:
      UserError: the weights cannot be loaded, or belong to a model of another shape.
    """
    if checkpoint.latest_step(workdir) is None:
        return _first(config)
    source = kept(workdir)
    if source.pretrained:
        _refuse_shape(config)
    return source


def _first(config: ConfigDict) -> Source:
    """Where a run with this config begins."""
    if not config.model.init_from:
        source = Source(None, None)
    elif (there := identity.read(as_path(config.model.init_from))) is not None:
        source = _workdir(config, there)
    else:
        source = _hugging_face(config.model.init_from)
    if source.pretrained:
        _refuse_shape(config)
    return source


def kept(workdir: AnyPath) -> Source:
    """What `keep` left in a workdir: enough for the model, without its weights."""
    return Source(None, workdir_lib.get(workdir / _KEPT))


def _hugging_face(name: str) -> Source:
    directory = huggingface.locate(name)
    if (directory / "config.json").exists():
        return Source(None, directory)
    adapters = SavedAdapters(directory)
    try:
        base = huggingface.locate(adapters.base)
        if not (base / "config.json").exists():
            raise UserError(f"{base} holds adapters, too.")
    except UserError as error:
        raise UserError(
            f"model.init_from={name}: holds adapters for the model {adapters.base!r}, which cannot "
            f"be had: {error} Put it there, or say where it is as base_model_name_or_path in "
            f"{directory / PEFT_CONFIG}."
        ) from error
    return Source(None, base, adapters)


def _workdir(config: ConfigDict, there: dict[str, Any]) -> Source:
    path = as_path(config.model.init_from)
    if there["algorithm.name"] == "reward":
        _refuse_scalar_head(config)
    if checkpoint.latest_step(path) is None:
        raise UserError(f"model.init_from={path}: that run has no complete checkpoint yet.")
    pretrained = workdir_lib.get(path / _KEPT)
    shape = [] if pretrained else [f"model.{name}" for name in _SHAPE]
    if there.get("model.lora.rank"):
        # The adapters of that run are trained on here; exporting it first would merge them.
        shape += ["model.lora.rank", "model.lora.alpha", "model.lora.targets"]
    ours = identity.describe(config)
    for key in ["tokenizer.name", *shape]:
        if there.get(key) != ours[key]:
            raise UserError(
                f"model.init_from={path}: {key} is {there.get(key)!r} there and "
                f"{ours[key]!r} here; give --config.{key}={there.get(key)}."
            )
    return Source(path, pretrained)


def _refuse_scalar_head(config: ConfigDict) -> None:
    if config.algorithm.name != "reward":
        raise UserError(
            f"model.init_from={config.model.init_from}: is a reward model or a classifier, whose "
            f"head gives no words; {config.algorithm.name} begins with a language model."
        )


def _refuse_shape(config: ConfigDict) -> None:
    default = config_lib.default(config.algorithm.name).model
    changed = [name for name in _SHAPE if config.model[name] != default[name]]
    if changed:
        raise UserError(
            f"model.{changed[0]} is {config.model[changed[0]]!r}, but the model of "
            f"model.init_from={config.model.init_from} has a shape of its own; leave it out."
        )


def build_model(
    config: ConfigDict, source: Source, tokenizer_size: int, platform: str = ""
) -> Decoder:
    """The model, before any weights are read.

    Args:
      config: a whole config.
      source: from `find`.
      tokenizer_size: ids that the tokenizer can give.
      platform: of the devices that it is for, as JAX names it; empty: of those here.

    Raises:
      UserError: its shape or attention is impossible, or it is too small for the tokenizer or
        for the data's lengths.
    """
    model = _build_model(config, source, tokenizer_size)
    attention = models.attention_of(config, platform or jax.devices()[0].platform)
    model = model.clone(config=dataclasses.replace(model.config, attention=attention))
    return models.as_scalar(model) if config.algorithm.name == "reward" else model


def _build_model(config: ConfigDict, source: Source, tokenizer_size: int) -> Decoder:
    if source.pretrained is None:
        return models.build(config.model, tokenizer_size)
    numerics = ("dtype", "param_dtype", "remat", "attention_block")
    model = huggingface.read_model(
        source.pretrained,
        max_length=config.data.max_length,
        ignore=config.model.ignore_keys,
        lora=models.lora(config.model),
        **{name: config.model[name] for name in numerics},
    )
    if source.adapters is not None and source.adapters.scalar_head and not model.config.scalar_head:
        model = models.as_scalar(model)
        pad = huggingface.pad_token_id(as_path(source.tokenizer))
        model = model.clone(config=dataclasses.replace(model.config, pad_token_id=pad))
    if model.config.scalar_head:
        _refuse_scalar_head(config)
    rows, longest = model.config.vocabulary_size, model.config.max_length
    if rows < tokenizer_size:
        raise UserError(
            f"{source.pretrained}: its embedding has {rows} rows, but the tokenizer gives ids up "
            f"to {tokenizer_size - 1} ({tokenizer_size} in all): they do not belong together."
        )
    if longest and longest < config.data.max_length:
        raise UserError(
            f"data.max_length is {config.data.max_length}, but {source.pretrained} knows only "
            f"{longest} positions."
        )
    original = huggingface.read_model(source.pretrained, ignore=config.model.ignore_keys)
    if 0 < original.config.max_length < config.data.max_length:
        console.print(
            f"positions: data.max_length ({config.data.max_length}) is beyond the "
            f"{original.config.max_length} that {source.pretrained} was made for, so they are "
            "scaled for long texts, and for short ones too; transformers scales them only in "
            "calls with a long text"
        )
    return model


def keep(source: Source, model: Decoder, workdir: AnyPath) -> None:
    """Keeps the small files of a Hugging Face model in the workdir."""
    if source.pretrained is not None and jax.process_index() == 0:
        place = workdir / _KEPT
        # A folder of a bucket is made here first.
        kept = place if isinstance(place, Path) else workdir_lib.temporary_folder()
        model.origin.copy(kept, tensors=True)
        if source.adapters is not None:
            if source.tokenizer != str(source.pretrained):
                huggingface.remove_tokenizer(kept)
            huggingface.copy_small_files(source.adapters.directory, kept, but={PEFT_CONFIG})
            if source.adapters.scalar_head:
                huggingface.say_classifier(kept, model)
        if kept != place:
            workdir_lib.put(kept, place)


def config_of(path: AnyPath) -> ConfigDict | None:
    """The config of the run whose workdir this is; None if it is not a workdir.

    Raises:
      UserError: the run has no complete checkpoint yet.
    """
    described = identity.read(path)
    if described is None:
        return None
    if checkpoint.latest_step(path) is None:
        raise UserError(f"{path}: that run has no complete checkpoint yet.")
    return config_lib.from_flat(described)


def load_finished(path: AnyPath, opened: Opened, mesh: Mesh, dtype: str = "float32") -> Any:
    """The parameters of a model that is not trained here.

    Args:
      path: a run's workdir, whose last checkpoint is read; else what `opened.source` names.
      opened: from `open_run`, of the same.
      mesh: shards the parameters.
      dtype: of the parameters, but for those that the run keeps in four bits.
    """
    abstract = huggingface.abstract_params(opened.model, mesh)
    abstract = jax.tree.map(lambda x: as_abstract(x, dtype), abstract)
    run = config_of(path)
    if run is None:
        return read(opened.source, opened.model, abstract)
    params, _ = checkpoint.restore_params(path, abstract)
    if dtype == "float32" or run.model.frozen_dtype == "nf4":
        return params
    # What the run does not train it may keep in another dtype.
    return jax.tree.map(lambda x: x.astype(dtype), params)


def base_of(workdir: AnyPath) -> str:
    """The Hugging Face directory or hub name whose weights a run's adapters adapt.

    Raises:
      UserError: there is none, or it is not where it was; the message says what to export.
    """
    run = identity.read(workdir) or {}
    begun = run.get("model.init_from", "")
    merged = "export without --adapters, which merges them."
    if not run.get("model.lora.rank"):
        raise UserError(f"{workdir}: that run has no adapters (model.lora.rank is 0).")
    if run["train.trainable"]:
        raise UserError(
            f"{workdir}: train.trainable is {run['train.trainable']!r}, so that more than adapters "
            f"may have been trained; {merged}"
        )
    if not begun:
        raise UserError(f"{workdir}: its adapters belong to random weights; {merged}")
    there = identity.read(as_path(begun))
    if there is not None and there.get("model.lora.rank"):
        # The adapters of that run were trained on here, on the same base.
        return base_of(as_path(begun))
    if there is not None:
        raise UserError(
            f"{workdir}: its adapters belong to the weights of the workdir {begun}, which others "
            f"cannot read. Export those first (python -m jaxpref.export --workdir={begun} "
            "--output=BASE), then give --base=BASE here."
        )
    if (as_path(begun) / PEFT_CONFIG).exists():
        raise UserError(f"{workdir}: began with the adapters of {begun}, merged; {merged}")
    if is_address(begun):
        raise UserError(
            f"{workdir}: its adapters belong to the model of {begun}, where peft cannot read it; "
            "say where else it is with --base=DIR_OR_HUB_NAME."
        )
    if Path(begun).is_dir():
        return str(Path(begun).resolve())
    if Path(begun).is_absolute() or begun.count("/") != 1:
        raise UserError(
            f"{workdir}: its adapters belong to the model of {begun}, which is not there any more; "
            "say where it is with --base=DIR_OR_HUB_NAME."
        )
    return begun


def load(config: ConfigDict, source: Source, model: Decoder, abstract: Any) -> Any:
    """The first weights, into the shapes and shardings of abstract arrays."""
    if source.workdir is None and source.pretrained is None:
        return _random(config, model, abstract)
    new, base = partition(abstract, _new(source, model))
    if source.workdir is not None:
        params, step = checkpoint.restore_params(source.workdir, base)
        params = models.dequantize(params)
        console.print(f"weights from {source.workdir}, step {step}")
    else:
        console.print(f"weights from {config.model.init_from}")
        params = read(source, without_adapters(model), base)
    return merge(params, _random(config, model, new)) if new else params


def load_first(
    config: ConfigDict, opened: Opened, abstract: Any, abstract_frozen: Any
) -> tuple[Any, Any]:
    """The parameters that a run begins with.

    Args:
      config: of the run.
      opened: as it begins.
      abstract: shapes and shardings of the parameters that are trained.
      abstract_frozen: those of the others.

    Returns:
      The parameters that are trained, and the others as the run keeps them.
    """
    dtype = config.model.frozen_dtype
    read_as = "float32" if dtype == "float32" else "bfloat16"
    whole = merge(abstract, store_frozen(abstract_frozen, read_as, convert=as_abstract))
    params, frozen = partition(
        load(config, opened.source, opened.model, whole), config_lib.trainable(config)
    )
    return params, store_frozen(frozen, dtype, convert=as_array)


def read(source: Source, model: Decoder, abstract: Any) -> Any:
    """The weights of a Hugging Face directory, with the source's adapters merged into them.

    Args:
      source: one that is no workdir.
      model: without adapters of its own.
      abstract: shapes and shardings of what is wanted.
    """
    if source.adapters is None:
        return huggingface.load_params(model, abstract)
    # A language model's scalar head comes with the adapters.
    grown = source.adapters.scalar_head and not huggingface.has_scalar_head(model)
    head, base = partition(abstract, "^score$" if grown else "^$")
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), head)
    return source.adapters.merge(model, merge(huggingface.load_params(model, base), zeros))


def _new(source: Source, model: Decoder) -> str:
    """A regular expression for the paths of parameters that the source does not have."""
    if source.workdir is not None:
        there = identity.read(source.workdir) or {}
        adapted, scored = bool(there.get("model.lora.rank")), there["algorithm.name"] == "reward"
    else:
        adapted, scored = False, source.has_scalar_head(model)
    parts = [] if adapted else [ADAPTERS]
    return (
        "|".join(parts if scored or not model.config.scalar_head else [*parts, "^score$"]) or "^$"
    )


def _random(config: ConfigDict, model: Decoder, abstract: Any) -> Any:
    """Random values for those parameters that are in `abstract`."""
    wanted = {path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    pattern = "^(" + "|".join(map(re.escape, sorted(wanted))) + ")$"
    init = jax.jit(
        lambda key: partition(models.init_params(model, key), pattern)[0],
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )
    return init(jax.random.key(config.seed))
