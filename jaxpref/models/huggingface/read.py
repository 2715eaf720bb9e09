"""Models from Hugging Face directories, and back into them.

Each of our parameters is a view of one of their tensors, transposed and reshaped, so that
one function, `as_ours`, serves both ways: reading takes what the view holds, writing
fills a tensor through it.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpref import sharding
from jaxpref.errors import UserError
from jaxpref.models.classifiers import SCALAR_HEAD, features, with_padding
from jaxpref.models.decoder import Decoder, DecoderConfig
from jaxpref.models.huggingface import safetensors
from jaxpref.models.huggingface.families import FAMILIES, SCORE, Family, Reader
from jaxpref.models.huggingface.safetensors import TensorFiles
from jaxpref.trainable import path_of

# Leading axes of a matrix that are inputs; what is not here is no matrix.
_INPUTS = {"out": 2} | dict.fromkeys(
    ("query", "key", "value", "gate", "up", "down", "router", "project_in", "project_out"), 1
)
_TENSORS = "tensors.json"
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "chat_template*")
# A template's file wins over what the tokenizer's own config says.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
)
_NOT_COPIED = {safetensors.INDEX, "pytorch_model.bin.index.json", _TENSORS}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The Hugging Face directory that a model was read from, or a copy without the weights.

    Attributes:
      architecture: a key of `FAMILIES`.
      directory: holds `config.json`, tokenizer files, and the weights or `tensors.json`;
        empty for a model with random weights.
      config: the text of `config.json`, for a model without a directory.
    """

    architecture: str
    directory: str = ""
    config: str = ""

    @property
    def family(self) -> Family:
        """The family of the model."""
        return FAMILIES[self.architecture]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor, by name and in the files' order; empty if unknown."""
        if not self.directory:
            return {}
        kept = Path(self.directory) / _TENSORS
        if kept.exists():
            return {
                name: (tuple(shape), dtype)
                for name, (shape, dtype) in json.loads(kept.read_text()).items()
            }
        stored = TensorFiles(Path(self.directory)).stored
        return {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}

    def copy(self, directory: Path, *, tensors: bool) -> "Origin":
        """Copies everything but the weights.

        Args:
          directory: receives the files; may be the origin's own.
          tensors: write what the weights' headers say too, so that the copy is an origin.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if not self.directory:
            (directory / "config.json").write_text(self.config)
            return self
        if tensors:
            (directory / _TENSORS).write_text(json.dumps(self.tensors(), indent=1))
        copy_small_files(Path(self.directory), directory)
        return dataclasses.replace(self, directory=str(directory))


def copy_small_files(source: Path, directory: Path, *, but: Collection[str] = ()) -> None:
    """Copies the files of a model that are no weights: configs, tokenizer, templates."""
    for pattern in _SMALL_FILES:
        for path in source.glob(pattern):
            if path.name not in {*_NOT_COPIED, *but} and path.parent != directory:
                shutil.copyfile(path, directory / path.name)


def remove_tokenizer(directory: Path) -> None:
    """Removes the files of a tokenizer, so that none of another one's is left beside them."""
    for pattern in _TOKENIZER_FILES:
        for path in directory.glob(pattern):
            path.unlink()


def from_pretrained(
    source: str | Path,
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
      source: a directory with `config.json` and safetensors files, or a hub name.
      dtype: of activations and products.
      param_dtype: of the parameters; by default `dtype`.
      mesh: shards the parameters over this mesh (`jaxpref.sharding.make_mesh`); by
        default they go to the first device.
      max_length: of the sequences that the model will see; it only matters to models whose
        positions are scaled for long ones (LongRoPE, dynamic).
      ignore: keys of `config.json` to ignore where this library does not know them.
      numerics: other fields of `DecoderConfig`: `remat`, `attention_block`.

    Raises:
      UserError: the model cannot be found, is of a family that is not known, asks for
        something that is not supported, or its weights do not fit its config.
    """
    numerics = {"dtype": dtype, "param_dtype": param_dtype or dtype, **numerics}
    model = read_model(locate(source), max_length=max_length, ignore=ignore, **numerics)
    return model, load_params(model, abstract_params(model, mesh))


def abstract_params(model: Decoder, mesh: Mesh | None = None) -> Any:
    """Shapes, dtypes and shardings of the parameters; without a mesh, on the first device."""
    boxed = _boxed(model)
    unboxed = nn.meta.unbox(boxed)
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        where = jax.tree.map(lambda _: device, unboxed)
    else:
        where = sharding.shardings(mesh, boxed)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), unboxed, where
    )


def _boxed(model: Decoder) -> Any:
    """Shapes of the parameters, in boxes with their logical axis names."""
    init = partial(model.init, method="hidden_states")
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def locate(source: str | Path) -> Path:
    """The directory itself, or the local copy of what the hub has under that name.

    Raises:
      UserError: it is neither.
    """
    path = Path(source)
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: is no Hugging Face model: it has no config.json.")
        return path
    if path.is_absolute() or str(source).count("/") != 1 or path.exists():
        raise UserError(f"{source}: is neither a directory nor a hub name (owner/model).")
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            str(source),
            allow_patterns=[*_SMALL_FILES, "*.safetensors"],
            # The same weights once more, in other layouts.
            ignore_patterns=["original/*", "consolidated*"],
        )
        return Path(folder)
    except Exception as error:  # The hub's client raises many kinds, none of them ours.
        raise UserError(
            f"{source}: no such directory here, and the hub could not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Without a network, download "
            "the model elsewhere and give the path of its directory."
        ) from error


def read_model(
    directory: Path, *, max_length: int = 0, ignore: Sequence[str] = (), **numerics: Any
) -> Decoder:
    """The model that a directory's `config.json` describes; no weights are read.

    Raises:
      UserError: the family or a feature is not supported.
    """
    try:
        raw = json.loads((directory / "config.json").read_text())
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


def _with_defaults(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config with what it leaves out, in transformers' newest spelling, and its defaults."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        return config.to_dict(), type(config)().to_dict()
    except Exception as error:  # Its checks raise many kinds.
        raise UserError(f"{directory}/config.json: transformers cannot read it: {error}") from error


class Part(NamedTuple):
    """A parameter in a tensor.

    Attributes:
      path: of our parameter.
      shape: its shape, without the stack.
      begin: where its outputs begin among the tensor's.
      total: the outputs of all parameters in the tensor.
    """

    path: str
    shape: tuple[int, ...]
    begin: int
    total: int

    @property
    def inputs(self) -> int:
        """Leading axes that are inputs of a product."""
        return _INPUTS.get(weight_of(self), 0)

    @property
    def outputs(self) -> int:
        """Size of what is output."""
        return int(np.prod(self.shape[self.inputs :]))


class Place(NamedTuple):
    """A tensor of theirs: its name, its shape, the parameters in it, and where in the stack."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    entry: tuple[int, ...]


def weight_of(part: Part) -> str:
    """The name of a parameter without the folders it is in."""
    return part.path.rpartition("/")[2]


def places(model: Decoder, family: Family) -> Iterator[Place]:
    """Every tensor that the model's parameters lie in."""
    config = model.config
    leaves = {path_of(path): leaf for path, leaf in _leaves(_boxed(model))}
    seen = set()
    for paths, name in (*family.tensors.items(), *SCORE.items()):
        paths = (paths,) if isinstance(paths, str) else paths
        if not set(paths) <= set(leaves):
            continue
        seen |= set(paths)
        stack = name.count("{")
        sizes = [config.layers, config.experts][:stack]
        total, parts = 0, []
        for path in paths:
            part = Part(path, leaves[path].value.shape[stack:], total, 0)
            total += part.outputs
            parts.append(part)
        parts = [part._replace(total=total) for part in parts]
        shape = _their_shape(parts[0], family)
        for index in np.ndindex(*sizes):
            numbers = dict(zip(("layer", "expert"), index, strict=False))
            yield Place(name.format(**numbers), shape, tuple(parts), index)
    assert seen == set(leaves), f"{family.architecture} has no tensors for {set(leaves) - seen}"


def _their_shape(part: Part, family: Family) -> tuple[int, ...]:
    if not part.inputs:
        return (part.total,) if part.path.endswith("bias") else part.shape
    inputs = int(np.prod(part.shape[: part.inputs]))
    return (inputs, part.total) if family.conv1d else (part.total, inputs)


def as_ours(tensor: np.ndarray, part: Part, family: Family) -> np.ndarray:
    """The view of their tensor that has the shape and order of our parameter."""
    if not part.inputs and tensor.shape == part.shape:
        return tensor
    inputs, outputs = part.shape[: part.inputs], part.shape[part.inputs :]
    if part.inputs and not family.conv1d:
        tensor = tensor.T
    tensor = tensor.reshape(*inputs, part.total)
    if family.interleaved and part.total > part.outputs:
        # Head by head the parts lie side by side.
        heads, head_dim = outputs
        tensor = tensor.reshape(*inputs, heads, part.total // heads)
        begin = part.begin // heads
        return tensor[..., begin : begin + head_dim]
    return tensor[..., part.begin : part.begin + part.outputs].reshape(*inputs, *outputs)


def load_params(model: Decoder, abstract: Any) -> Any:
    """The parameters of the model's origin, into the shapes and shardings of abstract arrays.

    Every process reads what its devices hold; one tensor is in host memory at a time. What
    `abstract` lacks is not read.

    Raises:
      UserError: tensors are missing, too many or of another shape, or a file is damaged.
    """
    family, files = model.origin.family, TensorFiles(Path(model.origin.directory))
    leaves = {path_of(path): leaf for path, leaf in _leaves(abstract)}
    needed = [
        place for place in places(model, family) if all(p.path in leaves for p in place.parts)
    ]
    names = _match(needed, set(files.stored), family, model)
    wrong = [
        f"{names[place.name]} is {files.stored[names[place.name]].shape}, not {place.shape}"
        for place in needed
        if files.stored[names[place.name]].shape != place.shape
    ]
    if wrong:
        raise UserError(
            f"{model.origin.directory}: the weights do not fit config.json: {_some(wrong)}."
        )
    params: dict[str, jax.Array] = {}
    for place in sorted(needed, key=lambda place: files.stored[names[place.name]].place):
        tensor = files.view(names[place.name])
        for part in place.parts:
            leaf = leaves[part.path]
            value = _read(as_ours(tensor, part, family), leaf, len(place.entry))
            if not place.entry:
                params[part.path] = value
                continue
            if part.path not in params:
                params[part.path] = _zeros(leaf.shape, leaf.dtype, leaf.sharding)
            index = np.asarray(place.entry, np.int32)
            # Awaited, since what is on its way to a device is in host memory.
            params[part.path] = jax.block_until_ready(
                _put(leaf.sharding)(params[part.path], value, index)
            )
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_of(path)], abstract)


def _read(view: np.ndarray, leaf: jax.ShapeDtypeStruct, stack: int) -> jax.Array:
    """One entry of a stack, in the sharding of the stack without its leading axes."""
    return jax.make_array_from_callback(
        leaf.shape[stack:],
        _unstacked(leaf.sharding, stack),
        # A copy: the devices may take over the memory that they are given.
        lambda index: np.array(view[index], dtype=leaf.dtype, order="C"),
    )


def _unstacked(where: Sharding, stack: int) -> Sharding:
    if not isinstance(where, NamedSharding):
        return where
    return NamedSharding(where.mesh, PartitionSpec(*where.spec[stack:]))


def _zeros(shape: tuple[int, ...], dtype: Any, where: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()


@functools.cache
def _put(where: Sharding) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """Puts a value into a stack, in the stack's own memory."""

    def put(stacked: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
        # Of one type, also where Python's 0 is an int64.
        starts = tuple(jnp.pad(index, (0, value.ndim)))
        return jax.lax.dynamic_update_slice(stacked, value[(None,) * len(index)], starts)

    return jax.jit(put, donate_argnums=0, out_shardings=where)


def _match(
    needed: Sequence[Place], stored: set[str], family: Family, model: Decoder
) -> dict[str, str]:
    """The names in the files of the tensors that are needed; refuses missing and extra ones."""
    # Checkpoints of the bare model lack the prefix.
    bare = not any(name.startswith(family.prefix) for name in stored)
    names = {
        place.name: place.name.removeprefix(family.prefix) if bare else place.name
        for place in needed
    }
    missing = sorted(set(names.values()) - stored)
    # A scalar head takes the place of a language model's; a tied one may be stored twice.
    heads = {family.tensors["head"]} if model.config.tied_head else set()
    if model.config.scalar_head:
        heads |= {family.tensors.get("head_bias", "")}
    extra = sorted(
        name
        for name in stored - set(names.values()) - heads
        if not any(part in name for part in family.buffers)
    )
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(extra)} that its config.json does not call for"] if extra else []
        raise UserError(f"{model.origin.directory}: {' and '.join(parts)}.")
    return names


def save_pretrained(
    model: Decoder,
    params: Any,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str | None = None,
    stop_ids: Sequence[int] = (),
    **options: Any,
) -> None:
    """Writes the model in Hugging Face's layout, as transformers, vLLM and others read it.

    Tensors get the names and dtypes that they had where the model came from, and its
    config, generation config and tokenizer files go along, unchanged. A model with random
    weights is written as the Llama that it is. A reward or value model gives the same values
    in transformers; see `classifiers.with_padding` for what that may add to its tokenizer.

    Args:
      model: the model.
      params: its parameters, however they are sharded.
      directory: receives the files; made if needed.
      tokenizer: saved too; needed if the model's origin has no tokenizer, and for a reward or
        value model, which transformers else reads one at a time.
      dtype: of all tensors (float32, bfloat16, float16), instead of those of the origin.
      stop_ids: tokens that generation stops at, beside those that the tokenizer, or else the
        origin's generation config, says.
      options: `shard_bytes`, the size beyond which a file is split.

    Raises:
      UserError: the model belongs to no family, or the directory cannot be written.
    """
    directory, origin = Path(directory), model.origin
    if origin is None:
        raise UserError(
            "save_pretrained: the model has no origin that says which family it is of; make it "
            "with jaxpref.models.from_pretrained or jaxpref.models.build."
        )
    if model.config.lora is not None:
        raise UserError(
            "save_pretrained: the model has adapters; call jaxpref.models.merge_adapters first, or "
            "write them by themselves with jaxpref.models.save_adapters."
        )
    if model.config.scalar_head and model.config.pad_token_id is None and tokenizer is not None:
        model, params, tokenizer = with_padding(model, params, tokenizer)
    family = origin.family
    needed = list(places(model, family))
    there = origin.tensors() or {place.name: (place.shape, "F32") for place in needed}
    if model.config.scalar_head and SCORE["score"] not in there:
        # Grown on a language model: its head goes, this one comes, in the same dtype.
        head_names = (family.tensors["head"], family.tensors.get("head_bias"))
        there = {name: tensor for name, tensor in there.items() if name not in head_names}
        there[SCORE["score"]] = ((1, features(model)), next(iter(there.values()))[1])
    names = _match(needed, set(there), family, model)
    by_name = {names[place.name]: place for place in needed}
    head = family.tensors["head"]
    if head in there and head not in by_name:
        # Stored twice, though it is the embedding.
        by_name[head] = by_name[names[family.tensors["embedding"]]]
    all_dtype = None if dtype is None else safetensors.dtype_name(jnp.dtype(dtype))
    tensors = {
        name: (by_name[name].shape, all_dtype or stored)
        for name, (_, stored) in there.items()
        if name in by_name
    }
    leaves = {path_of(path): leaf for path, leaf in _leaves(params)}

    def get(name: str) -> np.ndarray:
        place = by_name[name]
        tensor = None
        for part in place.parts:
            value = _gather(leaves[part.path], place.entry)
            if tensor is None:
                tensor = np.empty(place.shape, value.dtype)
            as_ours(tensor, part, family)[...] = value
        assert tensor is not None
        return tensor

    writer = jax.process_index() == 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if writer:
            origin.copy(directory, tensors=False)
            if tokenizer is not None:
                remove_tokenizer(directory)
                tokenizer.save_pretrained(directory)
            if not model.config.scalar_head:
                _say_special_ids(directory, tokenizer, stop_ids)
            if all_dtype is not None:
                _say(directory / "config.json", dtype=jnp.dtype(dtype).name)
            if model.config.scalar_head:
                say_classifier(directory, model)
        safetensors.write(directory, tensors, get, writer=writer, **options)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}).") from error


def pad_token_id(directory: Path) -> int | None:
    """What a reward model pads with: the tokenizer in a directory, or else its `config.json`.

    TRL sets a model's from the tokenizer, and saves the tokenizer beside adapters.
    """
    if (directory / "tokenizer_config.json").exists():
        import transformers

        return transformers.AutoTokenizer.from_pretrained(directory).pad_token_id
    values, _ = _with_defaults(directory)
    return values.get("pad_token_id")


def has_scalar_head(model: Decoder) -> bool:
    """Whether the files that a model comes from have a scalar head's weights."""
    return SCORE["score"] in (model.origin.tensors() or {})


def say_classifier(directory: Path, model: Decoder) -> None:
    """Makes the `config.json` of a directory that of a model with a scalar head."""
    _say(
        directory / "config.json",
        architectures=[model.origin.family.classifier],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        pad_token_id=model.config.pad_token_id,
        vocab_size=model.config.vocabulary_size,
    )


def _say(path: Path, **changes: Any) -> None:
    """Changes what `config.json` says; writes nothing if it says so already."""
    config = json.loads(path.read_text())
    if "dtype" in changes and "torch_dtype" in config:
        changes["torch_dtype"] = changes.pop("dtype")
    if any(config.get(key) != value for key, value in changes.items()):
        path.write_text(json.dumps({**config, **changes}, indent=2) + "\n")


def _say_special_ids(directory: Path, tokenizer: Any, stop_ids: Sequence[int]) -> None:
    """Tells `generate` of a tokenizer's special tokens, and where to stop.

    What a `config.json` leaves out, transformers fills in with ids of its own.
    """
    generation = directory / "generation_config.json"
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(tokenizer, name) for name in names}
        _say(directory / "config.json", **ids)
    else:
        config = json.loads(
            (generation if generation.exists() else directory / "config.json").read_text()
        )
        ids = {"eos_token_id": config.get("eos_token_id")}
    known = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    stops = [i for i in dict.fromkeys([*known, *stop_ids]) if i is not None]
    if not stops or (tokenizer is None and set(stops) <= set(known)):
        return
    if not generation.exists():
        generation.write_text("{}")
    _say(generation, **{**ids, "eos_token_id": stops if len(stops) > 1 else stops[0]})


def _gather(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One entry of a stack, whole, on every process."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf[index])
    assert isinstance(leaf.sharding, NamedSharding)
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda x: x[index], out_shardings=whole)(leaf))


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    boxes = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=boxes)[0]


def _some(things: Sequence[str]) -> str:
    shown = ", ".join(things[:5])
    return shown if len(things) <= 5 else f"{shown} and {len(things) - 5} more"
