"""A model and its parameters to a directory in Hugging Face's layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpref.errors import UserError
from jaxpref.models.classifiers import features, with_padding
from jaxpref.models.decoder import Decoder
from jaxpref.models.huggingface import safetensors
from jaxpref.models.huggingface.families import SCORE
from jaxpref.models.huggingface.origin import known_stops, remove_tokenizer
from jaxpref.models.huggingface.places import as_ours, leaves_by_path, match, places


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
    config, generation config and tokenizer files are copied unchanged. A model with random
    weights is written as the Llama that it is. A reward or value model gives the same values
    in transformers; see `classifiers.with_padding` for what that may add to its tokenizer.

    Args:
      model: without adapters.
      params: its parameters, however they are sharded.
      directory: receives the files; it is made if needed.
      tokenizer: is saved too. It is needed if the model's origin has no tokenizer, and for a
        reward or value model, whose rewards transformers can otherwise only give for one text
        at a time.
      dtype: of all tensors (float32, bfloat16, float16); by default those of the origin.
      stop_ids: tokens at which generation stops, beside those of the tokenizer or, without a
        tokenizer, of the origin's generation config.
      options: `shard_bytes`, the size in bytes beyond which a file is split.

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
    described = origin.tensors() or {place.name: (place.shape, "F32") for place in needed}
    if model.config.scalar_head and SCORE["score"] not in described:
        # The scalar head was grown on a language model. It takes the place of the language
        # model's head and has the dtype of the other tensors.
        head_names = (family.tensors["head"], family.tensors.get("head_bias"))
        described = {name: tensor for name, tensor in described.items() if name not in head_names}
        described[SCORE["score"]] = ((1, features(model)), next(iter(described.values()))[1])
    names = match(needed, set(described), family, model)
    by_name = {names[place.name]: place for place in needed}
    head = family.tensors["head"]
    if head in described and head not in by_name:
        # The origin stores a tied head a second time, so it is written a second time.
        by_name[head] = by_name[names[family.tensors["embedding"]]]
    all_dtype = None if dtype is None else safetensors.dtype_name(jnp.dtype(dtype))
    tensors = {
        name: (by_name[name].shape, all_dtype or stored)
        for name, (_, stored) in described.items()
        if name in by_name
    }
    leaves = leaves_by_path(params)

    def get(name: str) -> np.ndarray:
        place = by_name[name]
        tensor = None
        for part in place.parts:
            value = _gather(leaves[part.path], place.entry)
            if tensor is None:
                tensor = np.empty(place.shape, value.dtype)
            as_ours(tensor, part)[...] = value
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


def say_classifier(directory: Path, model: Decoder) -> None:
    """Makes the `config.json` of a directory that of a classifier with one label.

    Args:
      directory: holds the `config.json` of the language model.
      model: with a scalar head.
    """
    _say(
        directory / "config.json",
        architectures=[model.origin.family.classifier],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        pad_token_id=model.config.pad_token_id,
        vocab_size=model.config.vocabulary_size,
    )


def _say(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; leaves the file as it is if they have these values already."""
    config = json.loads(path.read_text())
    if "dtype" in changes and "torch_dtype" in config:
        changes["torch_dtype"] = changes.pop("dtype")
    if any(config.get(key) != value for key, value in changes.items()):
        path.write_text(json.dumps({**config, **changes}, indent=2) + "\n")


def _say_special_ids(directory: Path, tokenizer: Any, stop_ids: Sequence[int]) -> None:
    """Writes a tokenizer's special tokens into the configs, and where generation stops.

    They are written even where there is none (null), because transformers fills in ids of its
    own for what a `config.json` leaves out.
    """
    generation = directory / "generation_config.json"
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
        _say(directory / "config.json", **ids)
        known = [i for i in (tokenizer.eos_token_id,) if i is not None]
    else:
        ids, known = {}, known_stops(directory)
    stops = list(dict.fromkeys([*known, *stop_ids]))
    if not stops or (tokenizer is None and set(stops) <= set(known)):
        return
    if not generation.exists():
        generation.write_text("{}")
    _say(generation, **{**ids, "eos_token_id": stops if len(stops) > 1 else stops[0]})


def _gather(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One entry of a stack, whole, in every process's host memory."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf[index])
    assert isinstance(leaf.sharding, NamedSharding)
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda x: x[index], out_shardings=whole)(leaf))
