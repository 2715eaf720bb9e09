"""A model and its parameters from a directory in Hugging Face's layout."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxpref.errors import UserError
from jaxpref.models.classifiers import SCALAR_HEAD
from jaxpref.models.config import DecoderConfig
from jaxpref.models.decoder import Decoder
from jaxpref.models.huggingface.families import FAMILIES, SCORE
from jaxpref.models.huggingface.family import Reader
from jaxpref.models.huggingface.origin import Origin, locate, small_files
from jaxpref.models.huggingface.places import Part, as_ours, leaves_by_path, match, places, some
from jaxpref.models.huggingface.safetensors import TensorFiles
from jaxpref.models.params import abstract_params
from jaxpref.trainable import path_of
from jaxpref.workdir import AnyPath, as_path


def from_pretrained(
    source: str | AnyPath,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    max_length: int = 0,
    ignore: Sequence[str] = (),
    **numerics: Any,
) -> tuple[Decoder, Any]:
    """A model and its parameters from a Hugging Face directory or hub name.

        model, params = jaxpref.models.from_pretrained("Qwen/Qwen3-0.6B")
        logits = model.apply({"params": params}, tokens)

    The weights go tensor by tensor from the files into their places on the devices.

    Args:
      source: a directory with `config.json` and safetensors files, which may be in a bucket
        (`gs://BUCKET/PATH`); or a hub name.
      dtype: of activations and products.
      param_dtype: of the parameters; by default `dtype`.
      mesh: shards the parameters over this mesh (`jaxpref.sharding.make_mesh`); by
        default they go to the first device.
      max_length: the longest sequence, in tokens, that the model will see. It only matters to
        models whose positions are scaled for long sequences (LongRoPE, dynamic).
      ignore: keys of `config.json` to ignore where this library does not know them.
      numerics: other fields of `DecoderConfig`: `remat`, `attention_block`.

    Raises:
      UserError: the model cannot be found, is of a family that is not known, asks for
        something that is not supported, or its weights do not fit its config.
    """
    numerics = {"dtype": dtype, "param_dtype": param_dtype or dtype, **numerics}
    model = read_model(locate(source), max_length=max_length, ignore=ignore, **numerics)
    return model, load_params(model, abstract_params(model, mesh))


def read_model(
    directory: AnyPath, *, max_length: int = 0, ignore: Sequence[str] = (), **numerics: Any
) -> Decoder:
    """The model that a directory's `config.json` describes; no weights are read.

    Args:
      directory: holds `config.json`.
      max_length: see `from_pretrained`.
      ignore: see `from_pretrained`.
      numerics: other fields of `DecoderConfig`, which win over what the file says.

    Raises:
      UserError: the family or a feature is not supported.
    """
    try:
        raw = json.loads((small_files(directory) / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{directory}/config.json: is no JSON ({error}).") from error
    classifiers = {family.classifier: name for name, family in FAMILIES.items()}
    given = raw.get("architectures") or []
    scalar = any(name in classifiers for name in given)
    names = [name for name in (classifiers.get(name, name) for name in given) if name in FAMILIES]
    if not names:
        raise UserError(
            f"{directory}: its architecture is {raw.get('architectures')}; jaxpref knows "
            f"{', '.join(FAMILIES)}, and the same ForSequenceClassification with one label."
        )
    origin = Origin(names[0], str(directory))
    values, defaults = _with_defaults(directory)
    read = Reader(values, defaults, f"{directory}/config.json", max_length)
    fields = origin.family.read(read)
    if scalar:
        labels = len(values.get("id2label") or {}) or values.get("num_labels", 2)
        if labels != 1:
            raise UserError(
                f"{directory}/config.json: is a classifier with {labels} labels; only one label, a "
                "reward or value model, is supported."
            )
        fields |= {**SCALAR_HEAD, "pad_token_id": values.get("pad_token_id")}
    read.finish(set(ignore))
    try:
        return Decoder(DecoderConfig(**{**fields, **numerics}), origin)
    except ValueError as error:
        raise UserError(f"{directory}/config.json: {error}") from error


def _with_defaults(directory: AnyPath) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole config of a model, and the defaults of its kind.

    Both are in the spelling of the newest transformers; what `config.json` leaves out is
    filled in.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(small_files(directory))
        return config.to_dict(), type(config)().to_dict()
    except Exception as error:  # The checks in transformers raise errors of many classes.
        raise UserError(f"{directory}/config.json: transformers cannot read it: {error}") from error


def load_params(model: Decoder, abstract: Any) -> Any:
    """The parameters that the model's origin holds.

    All devices share in reading: each of a tensor's bytes is read once, by the process of one
    device, and moved to the devices that need it by themselves. One tensor is in host memory at a
    time.

    Args:
      model: without adapters, and with an origin.
      abstract: the shapes, dtypes and shardings that the parameters shall have. A parameter
        that is not in it is not read.

    Raises:
      UserError: tensors are missing, too many or of another shape, or a file is damaged.
    """
    family, files = model.origin.family, TensorFiles(as_path(model.origin.directory))
    leaves = leaves_by_path(abstract)
    needed = [
        place for place in places(model, family) if all(p.path in leaves for p in place.parts)
    ]
    names = match(needed, set(files.stored), family, model)
    wrong = [
        f"{names[place.name]} is {files.stored[names[place.name]].shape}, not {place.shape}"
        for place in needed
        if files.stored[names[place.name]].shape != place.shape
    ]
    if wrong:
        raise UserError(
            f"{model.origin.directory}: the weights do not fit config.json: {some(wrong)}."
        )
    params: dict[str, jax.Array] = {}
    for place in sorted(needed, key=lambda place: files.stored[names[place.name]].place):
        first = place.parts[0]
        blocks = _in_blocks(first, leaves[first.path].sharding, len(place.entry))
        tensor = _read(files, names[place.name], blocks)
        index = np.asarray(place.entry, np.int32)
        for part in place.parts:
            leaf = leaves[part.path]
            if part.path not in params:
                params[part.path] = _zeros(leaf.shape, leaf.dtype, leaf.sharding)()
            put = _put(part._replace(path=""), place.shape[0], leaf.sharding)
            # This waits, because a tensor is in host memory until its devices have it.
            params[part.path] = jax.block_until_ready(put(params[part.path], tensor, index))
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_of(path)], abstract)


def _read(files: TensorFiles, name: str, sharding: Sharding) -> jax.Array:
    """A tensor as its file has it, in blocks of rows.

    Args:
      files: hold it.
      name: of the tensor.
      sharding: from `_in_blocks`.

    Returns:
      The tensor, and whatever rows behind its last one fill the blocks.
    """
    count, *row = files.stored[name].shape
    size = -(-count // sharding.num_devices)

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        rows = files.read(name, index[0])
        return rows if len(rows) == size else np.resize(rows, (size, *row))

    return jax.make_array_from_callback((size * sharding.num_devices, *row), sharding, block)


def _in_blocks(part: Part, sharding: Sharding, stack: int) -> Sharding:
    """A sharding that splits the rows of a tensor over all devices.

    A parameter's own shards may be parts of rows, and each host would read nearly the whole file.

    Args:
      part: of the tensor.
      sharding: of the part's stack.
      stack: how many leading axes of the stack the part lacks.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = [name for side in _sides(part, _spec(sharding, stack)) for name in side]
    # In this order what moves is gathered from replicas, and then goes from rows to columns.
    axes += [name for name in sharding.mesh.axis_names if name not in axes]
    return NamedSharding(sharding.mesh, PartitionSpec(tuple(axes)))


def _spec(sharding: Sharding, stack: int) -> tuple[Any, ...]:
    """Along which axes of the mesh one entry of a stack lies."""
    return sharding.spec[stack:] if isinstance(sharding, NamedSharding) else ()


def _sides(part: Part, spec: tuple[Any, ...]) -> list[tuple[str, ...]]:
    """Along which axes of the mesh a tensor's rows and columns lie where the part lies so."""
    inputs = part.inputs or 1
    sides = [
        tuple(name for axis in side for name in ((axis,) if isinstance(axis, str) else axis or ()))
        for side in (spec[:inputs], spec[inputs:])
    ]
    return sides[::-1] if part.transposed else sides


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Callable[[], jax.Array]:
    """A function that makes an empty stack where it shall be; compiled once for its shape."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _put(
    part: Part, rows: int, sharding: Sharding
) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """A function that puts a part of a tensor into a stack, in the stack's own memory.

    Args:
      part: without its path, so that parts that are alike share a compiled function.
      rows: of the tensor, without those that fill its last blocks.
      sharding: of the stack.
    """

    def put(stacked: jax.Array, tensor: jax.Array, index: jax.Array) -> jax.Array:
        spec = _spec(sharding, len(index))
        sides = _sides(part, spec)
        # As integers: numbers would be converted before they move, often to twice the bytes. Step
        # by step: left to itself, the compiler gathers whole tensors, or even whole stacks.
        bits = tensor.view(f"uint{8 * tensor.itemsize}")
        for along in ([sum(sides, ())], sides):
            bits = _laid(bits, sharding, along[: tensor.ndim])
        value = _laid(as_ours(bits[:rows], part), sharding, spec)
        value = value.view(tensor.dtype).astype(stacked.dtype)
        # All indices must have one type, and Python's 0 is an int64 where that is enabled.
        starts = tuple(jnp.pad(index, (0, value.ndim)))
        return jax.lax.dynamic_update_slice(stacked, value[(None,) * len(index)], starts)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _laid(x: jax.Array, sharding: Sharding, spec: Sequence[Any]) -> jax.Array:
    """The same array along other axes of the mesh, if there is a mesh."""
    if not isinstance(sharding, NamedSharding):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def pad_token_id(directory: AnyPath) -> int | None:
    """The token that a reward model pads with, if it has one.

    A tokenizer in the directory wins over `config.json`: TRL gives the model the tokenizer's
    padding token, but beside adapters it saves only the tokenizer.
    """
    files = small_files(directory)
    if (files / "tokenizer_config.json").exists():
        import transformers

        return transformers.AutoTokenizer.from_pretrained(files).pad_token_id
    values, _ = _with_defaults(directory)
    return values.get("pad_token_id")


def has_scalar_head(model: Decoder) -> bool:
    """Whether the files that a model comes from hold the weights of a scalar head."""
    return SCORE["score"] in model.origin.tensors()
