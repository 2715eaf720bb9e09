"""Which part of which tensor of a checkpoint is which of our parameters.

Each of our parameters is a view of one of Hugging Face's tensors, transposed and reshaped.
So one function, `as_ours`, serves both directions: reading takes what the view holds, and
writing fills a tensor through the view.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models.decoder import Decoder
from jaxpref.models.huggingface.families import SCORE
from jaxpref.models.huggingface.family import Family
from jaxpref.models.params import abstract_params
from jaxpref.trainable import path_of

_Array = TypeVar("_Array", np.ndarray, jax.Array)
# How many leading axes of each of our matrices are its inputs. A parameter that is not listed
# is no matrix.
_INPUTS = {"out": 2} | dict.fromkeys(
    ("query", "key", "value", "gate", "up", "down", "router", "project_in", "project_out"), 1
)


class Part(NamedTuple):
    """One of our parameters, as a part of a tensor.

    Attributes:
      path: its path, as in `layers/query`.
      shape: its shape, without the leading axes along which layers and experts are stacked.
      inputs: how many leading axes are inputs of a product; 0 for what is no matrix.
      begin: where its outputs begin among the tensor's outputs.
      total: how many outputs all parameters in the tensor have together.
      transposed: whether the tensor is [outputs, inputs].
      interleaved: whether the parameters in the tensor alternate head by head.
    """

    path: str
    shape: tuple[int, ...]
    inputs: int
    begin: int
    total: int
    transposed: bool
    interleaved: bool

    @property
    def outputs(self) -> int:
        """How many outputs the parameter has."""
        return int(np.prod(self.shape[self.inputs :]))


class Place(NamedTuple):
    """A tensor of a checkpoint, and what it holds.

    Attributes:
      name: of the tensor.
      shape: of the tensor.
      parts: our parameters in it.
      entry: the place of these parameters in our stacks: (layer,), (layer, expert), or () for
        parameters that are not stacked.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    entry: tuple[int, ...]


def weight_of(path: str) -> str:
    """The name of a parameter without the folders it is in."""
    return path.rpartition("/")[2]


def places(model: Decoder, family: Family) -> Iterator[Place]:
    """Every tensor that the model's parameters lie in.

    Args:
      model: without adapters.
      family: of the model.
    """
    config = model.config
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(abstract_params(model)).items()}
    seen = set()
    for paths, name in (*family.tensors.items(), *SCORE.items()):
        paths = (paths,) if isinstance(paths, str) else paths
        if not set(paths) <= set(shapes):
            continue
        seen |= set(paths)
        stack = name.count("{")
        sizes = [config.layers, config.experts][:stack]
        total, parts = 0, []
        for path in paths:
            inputs = _INPUTS.get(weight_of(path), 0)
            part = Part(
                path,
                shapes[path][stack:],
                inputs,
                begin=total,
                total=0,
                transposed=inputs > 0 and not family.conv1d,
                interleaved=family.interleaved and len(paths) > 1,
            )
            total += part.outputs
            parts.append(part)
        parts = [part._replace(total=total) for part in parts]
        shape = _tensor_shape(parts[0])
        for index in np.ndindex(*sizes):
            numbers = dict(zip(("layer", "expert"), index, strict=False))
            yield Place(name.format(**numbers), shape, tuple(parts), index)
    assert seen == set(shapes), f"{family.architecture} has no tensors for {set(shapes) - seen}"


def _tensor_shape(part: Part) -> tuple[int, ...]:
    """The shape of the tensor that a part lies in."""
    if not part.inputs:
        return (part.total,) if part.path.endswith("bias") else part.shape
    inputs = int(np.prod(part.shape[: part.inputs]))
    return (part.total, inputs) if part.transposed else (inputs, part.total)


def as_ours(tensor: _Array, part: Part) -> _Array:
    """A checkpoint's tensor in the shape and order of our parameter.

    Of a NumPy array it is a view; of a JAX array it is computed where the tensor is.
    """
    if not part.inputs and tensor.shape == part.shape:
        return tensor
    inputs, outputs = part.shape[: part.inputs], part.shape[part.inputs :]
    if part.transposed:
        tensor = tensor.T
    tensor = tensor.reshape(*inputs, part.total)
    if part.interleaved:
        # The tensor holds, for each head in turn, that head's outputs of every part.
        heads, head_dim = outputs
        tensor = tensor.reshape(*inputs, heads, part.total // heads)
        begin = part.begin // heads
        return tensor[..., begin : begin + head_dim]
    return tensor[..., part.begin : part.begin + part.outputs].reshape(*inputs, *outputs)


def match(
    needed: Sequence[Place], stored: set[str], family: Family, model: Decoder
) -> dict[str, str]:
    """The name in a checkpoint's files of every tensor that is needed.

    Args:
      needed: the tensors that the model has parameters in.
      stored: names in the files.
      family: of the model.
      model: the model.

    Returns:
      From the name of each place to the name in the files.

    Raises:
      UserError: the files lack a tensor, or have one that the model has no use for.
    """
    # Checkpoints of the bare model lack the prefix.
    bare = not any(name.startswith(family.prefix) for name in stored)
    names = {
        place.name: place.name.removeprefix(family.prefix) if bare else place.name
        for place in needed
    }
    missing = sorted(set(names.values()) - stored)
    # A tied head may be stored a second time, as the embedding that it is. A scalar head takes
    # the place of a language model's head, with its bias.
    heads = {family.tensors["head"]} if model.config.tied_head else set()
    if model.config.scalar_head:
        heads |= {family.tensors.get("head_bias", "")}
    extra = sorted(
        name
        for name in stored - set(names.values()) - heads
        if not any(part in name for part in family.buffers)
    )
    if missing or extra:
        parts = [f"lacks {some(missing)}"] if missing else []
        parts += [f"has {some(extra)} that its config.json does not call for"] if extra else []
        raise UserError(f"{model.origin.directory}: {' and '.join(parts)}.")
    return names


def leaves_by_path(params: Any) -> dict[str, Any]:
    """The leaves of nested dictionaries by their paths, as in `layers/query`."""
    return {path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def some(things: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(things[:5])
    return shown if len(things) <= 5 else f"{shown} and {len(things) - 5} more"
