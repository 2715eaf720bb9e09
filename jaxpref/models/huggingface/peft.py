"""Adapters in PEFT's format: written for `peft`, and read to be merged into their base."""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxpref.errors import UserError
from jaxpref.models.adapters import ADAPTERS, without_adapters
from jaxpref.models.config import Lora
from jaxpref.models.decoder import Decoder
from jaxpref.models.huggingface import safetensors
from jaxpref.models.huggingface.families import SCORE
from jaxpref.models.huggingface.origin import small_files
from jaxpref.models.huggingface.places import (
    Place,
    as_ours,
    leaves_by_path,
    places,
    weight_of,
)
from jaxpref.models.huggingface.safetensors import TensorFiles
from jaxpref.trainable import partition, path_of
from jaxpref.workdir import AnyPath, as_path

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def save_adapters(model: Decoder, params: Any, directory: str | Path, base: str = "") -> None:
    """Writes the adapters as `peft` reads them: `PeftModel.from_pretrained(base, directory)`.

    The scalar head of a reward or value model is written whole.

    Where one module of Hugging Face computes several of our products (GPT-2's `c_attn`), its
    adapter's rank is the sum of our adapters' ranks, with zeros between one product's inputs
    and another's outputs; the function is the same.

    Args:
      model: with adapters, from a Hugging Face directory.
      params: of the model. Only the adapters are needed, and the scalar head if there is one.
      directory: receives `adapter_model.safetensors` and `adapter_config.json`.
      base: name or path of the base model, for the config; by default the model's origin.

    Raises:
      UserError: the model has no adapters, or belongs to no family.
    """
    lora, origin = model.config.lora, model.origin
    if lora is None or origin is None:
        raise UserError("save_adapters: the model has no adapters, or no origin.")
    adapters, _ = partition(params, ADAPTERS)
    layers = {name: np.asarray(x, np.float32) for name, x in adapters["layers"].items()}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for place in places(without_adapters(model), origin.family):
        parts = [p for p in place.parts if f"{weight_of(p.path)}_lora_a" in layers]
        if not parts or not place.name.endswith(".weight"):
            continue
        (layer,) = place.entry
        module, rank = place.name.removesuffix(".weight"), lora.rank * len(parts)
        down = [layers[f"{weight_of(p.path)}_lora_a"][layer].reshape(-1, lora.rank) for p in parts]
        up = np.zeros((parts[0].total, rank), np.float32)
        for i, part in enumerate(parts):
            b = layers[f"{weight_of(part.path)}_lora_b"][layer]
            block = slice(i * lora.rank, (i + 1) * lora.rank)
            # B has the shape of a weight whose inputs are the rank.
            slot = part._replace(shape=b.shape, inputs=1, transposed=True)
            as_ours(up[:, block], slot)[...] = b
        name = f"{_PEFT_PREFIX}{module}"
        tensors[f"{name}.lora_A.weight"] = np.concatenate(down, axis=1).T
        tensors[f"{name}.lora_B.weight"] = up
        # The last two names of the module, because GPT-2 has a `c_proj` in its attention and
        # another one in its feed-forward.
        ranks[".".join(module.split(".")[-2:])] = rank
    if model.config.scalar_head:
        tensors[_PEFT_PREFIX + SCORE["score"]] = np.asarray(params["score"], np.float32)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    described = {name: (x.shape, "F32") for name, x in tensors.items()}
    safetensors.write_file(directory / PEFT_WEIGHTS, described, tensors.__getitem__)
    config = _peft_config(lora, ranks, origin.family.conv1d, base or origin.directory)
    if model.config.scalar_head:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


class _Change(NamedTuple):
    """What saved adapters do to one tensor of the base.

    Attributes:
      names: the tensors of the adapters that say it.
      value: in the shape of the base's tensor.
      replaces: whether the value takes the tensor's place; else it is added to the tensor.
    """

    names: set[str]
    value: np.ndarray
    replaces: bool


class SavedAdapters:
    """Adapters in PEFT's format.

    Attributes:
      directory: where they are.
      base: name or path of the model that they adapt.
      scalar_head: whether they bring the scalar head of a reward or value model.
    """

    def __init__(self, directory: str | AnyPath):
        """Reads the config and the headers of the weights.

        Args:
          directory: a folder of a disk or of a bucket.

        Raises:
          UserError: the adapters are of a kind that cannot be merged exactly.
        """
        self.directory = as_path(directory)
        path = self.directory / PEFT_CONFIG
        try:
            config = json.loads((small_files(self.directory) / PEFT_CONFIG).read_text())
        except ValueError as error:
            raise UserError(f"{path}: is no JSON ({error}).") from error
        if not isinstance(config, dict):
            raise UserError(f"{path}: should be a JSON object; got {type(config).__name__}.")
        self._config: dict[str, Any] = config
        unknown = {
            key: config[key]
            for key, plain in _PLAIN.items()
            if config.get(key) not in (*plain, None, False, [], {})
        }
        if unknown:
            raise UserError(
                f"{path}: sets {', '.join(f'{k}={v!r}' for k, v in unknown.items())}, which "
                "jaxpref does not know; merge the adapters with peft (merge_and_unload) and "
                "begin with the result."
            )
        self.base = str(self._config.get("base_model_name_or_path") or "")
        self._files = TensorFiles(self.directory, PEFT_WEIGHTS)
        self.scalar_head = _PEFT_PREFIX + SCORE["score"] in self._files.stored

    def merge(self, model: Decoder, params: Any) -> Any:
        """The parameters with the adapters merged into them: `W + scale * B A` for each `W`.

        Args:
          model: the base, without adapters.
          params: of the base. Adapters of parameters that are not in it are not merged.

        Raises:
          UserError: the adapters do not fit the model.
        """
        family = model.origin.family
        leaves = leaves_by_path(params)
        left = set(self._files.stored) - self._tied_head(model)
        for place in places(model, family):
            change = self._change(place, family.conv1d)
            if change is None or not all(part.path in leaves for part in place.parts):
                continue
            left -= change.names
            if change.value.shape != place.shape:
                raise UserError(
                    f"{self.directory}: the adapter of {place.name} makes {change.value.shape}, "
                    f"but the model has {place.shape} there; the base ({self.base}) is another "
                    "model."
                )
            for part in place.parts:
                value = np.ascontiguousarray(as_ours(change.value, part))
                leaf = leaves[part.path]
                index = np.asarray(place.entry, np.int32)
                leaves[part.path] = _changed(leaf.sharding, change.replaces)(leaf, value, index)
        if left:
            raise UserError(
                f"{self.directory}: has {', '.join(sorted(left)[:3])}, which belongs to no part of "
                f"the model of {self.base}."
            )
        return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_of(path)], params)

    def _tied_head(self, model: Decoder) -> set[str]:
        """The name of a tied head, if the adapters hold it beside an embedding equal to it.

        Raises:
          UserError: the adapters hold an embedding, but no head equal to it.
        """
        tensors = model.origin.family.tensors
        embedding, head = (_PEFT_PREFIX + tensors[name] for name in ("embedding", "head"))
        stored = self._files.stored
        if embedding not in stored or not model.config.tied_head or model.config.scalar_head:
            return set()
        if head in stored and np.array_equal(self._files.read(embedding), self._files.read(head)):
            return {head}
        raise UserError(
            f"{self.directory}: brings an embedding of its own, which peft unties from the head of "
            f"{self.base}; a model with a tied head cannot hold both. Merge the adapters with peft "
            "(merge_and_unload) and begin with the result."
        )

    def _change(self, place: Place, conv1d: bool) -> _Change | None:
        """What the adapters do to a tensor of the base; None if nothing."""
        name = _PEFT_PREFIX + place.name
        if name in self._files.stored:
            return _Change({name}, np.asarray(self._files.read(name), np.float32), replaces=True)
        module = name.removesuffix(".weight")
        names = {f"{module}.lora_{side}.weight" for side in "AB"}
        if not names <= set(self._files.stored):
            return None
        a, b = (
            np.asarray(self._files.read(f"{module}.lora_{side}.weight"), np.float32)
            for side in "AB"
        )
        alpha = self._of_module("alpha_pattern", module, self._config.get("lora_alpha", 8))
        rank = len(a)
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        change = scale * (b @ a)
        if conv1d and place.parts[0].inputs:
            change = change.T
        return _Change(names, change, replaces=False)

    def _of_module(self, patterns: str, module: str, default: float) -> float:
        """The value for a module in a table of patterns, which match the end of its name."""
        for pattern, value in (self._config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module.removeprefix(_PEFT_PREFIX)):
                return float(value)
        return float(default)


# The keys of PEFT's config that may change what an adapter computes, each with the values that
# change nothing. Null, false and what is empty change nothing either.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Every other value moves a part of the base into the adapter at the beginning.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora"), ()),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "target_parameters"), ()),
}


@functools.cache
def _changed(
    sharding: Sharding, replaces: bool
) -> Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]:
    """A function that replaces an entry of a stack, or adds to it, in the stack's own memory."""

    def change(stacked: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
        at = stacked.at[tuple(index)]
        value = value if replaces else at.get().astype(jnp.float32) + value
        return at.set(value.astype(stacked.dtype))

    return jax.jit(change, donate_argnums=0, out_shardings=sharding)


def _peft_config(lora: Lora, ranks: dict[str, int], conv1d: bool, base: str) -> dict[str, Any]:
    wider = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        # With these, alpha divided by the rank is the same for the wider modules too.
        "alpha_pattern": {name: lora.alpha * rank / lora.rank for name, rank in wider.items()},
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "inference_mode": True,
    }
