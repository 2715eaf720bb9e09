"""Low-rank adapters (LoRA, arXiv 2106.09685): merged into the weights, and in PEFT's format."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.errors import UserError
from jaxpref.losses.inputs import in_float32
from jaxpref.models import safetensors
from jaxpref.models.decoder import Decoder, Lora
from jaxpref.models.huggingface import as_ours, places, weight_of
from jaxpref.nf4 import Nf4
from jaxpref.trainable import partition

ADAPTERS = r"_lora_[ab]$"


def without_adapters(model: Decoder) -> Decoder:
    """The model that the adapters adapt."""
    return model.clone(config=dataclasses.replace(model.config, lora=None))


def merge_adapters(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The same function without adapters: `W + alpha / rank * A B` in place of each `W`.

    Args:
      model: with adapters.
      params: of the model.
    """
    lora = model.config.lora
    if lora is None:
        return model, params
    adapters, base = partition(params, ADAPTERS)
    base = dequantize(base)
    layers = dict(base["layers"])
    for name in _adapted(adapters):
        weight = layers[name]
        change = jax.jit(_product)(
            adapters["layers"][f"{name}_lora_a"], adapters["layers"][f"{name}_lora_b"]
        )
        change = change.reshape(weight.shape) * lora.scale
        layers[name] = (in_float32(weight) + change).astype(weight.dtype)
    return without_adapters(model), {**base, "layers": layers}


def dequantize(params: Any) -> Any:
    """Parameters without four-bit ones, which become float32."""
    return jax.tree.map(
        lambda x: jax.jit(x.dequantize, static_argnums=0)("float32") if isinstance(x, Nf4) else x,
        params,
        is_leaf=lambda x: isinstance(x, Nf4),
    )


def _adapted(adapters: Any) -> list[str]:
    names = adapters.get("layers", {})
    return sorted(name.removesuffix("_lora_a") for name in names if name.endswith("_lora_a"))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    layers, rank = a.shape[0], a.shape[-1]
    a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
    return jnp.einsum("lir,lro->lio", in_float32(a), in_float32(b))


def save_adapters(model: Decoder, params: Any, directory: str | Path, base: str = "") -> None:
    """Writes the adapters as `peft` reads them: `PeftModel.from_pretrained(base, directory)`.

    The scalar head of a reward or value model goes along whole.

    Where Hugging Face's module computes several of our products at once (GPT-2's
    `c_attn`), its adapter has their ranks added up, with zeros where they do not meet;
    the function is the same.

    Args:
      model: with adapters, from a Hugging Face directory.
      params: of the model; the adapters, and the scalar head if it has one, suffice.
      directory: receives `adapter_model.safetensors` and `adapter_config.json`.
      base: name or path of the base model, for the config.

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
        parts = [p for p in place.parts if f"{weight_of(p)}_lora_a" in layers]
        if not parts or not place.name.endswith(".weight"):
            continue
        (layer,) = place.entry
        module, rank = place.name.removesuffix(".weight"), lora.rank * len(parts)
        down = [layers[f"{weight_of(part)}_lora_a"][layer].reshape(-1, lora.rank) for part in parts]
        up = np.zeros((parts[0].total, rank), np.float32)
        for i, part in enumerate(parts):
            b = layers[f"{weight_of(part)}_lora_b"][layer]
            block = slice(i * lora.rank, (i + 1) * lora.rank)
            # Of the shape of a product's weight, with the rank for its inputs.
            slot = part._replace(path="layers/up", shape=b.shape)
            family = origin.family._replace(conv1d=False)
            as_ours(up[:, block], slot, family)[...] = b
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = np.concatenate(down, axis=1).T
        tensors[f"{name}.lora_B.weight"] = up
        # Two levels, since GPT-2 has a `c_proj` in attention and one in the feed-forward.
        ranks[".".join(module.split(".")[-2:])] = rank
    if model.config.scalar_head:
        tensors["base_model.model.score.weight"] = np.asarray(params["score"], np.float32)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    described = {name: (x.shape, "F32") for name, x in tensors.items()}
    safetensors.write_file(directory / "adapter_model.safetensors", described, tensors.__getitem__)
    config = _peft_config(lora, ranks, origin.family.conv1d, base or origin.directory)
    if model.config.scalar_head:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


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
        # So that alpha over rank stays what it is.
        "alpha_pattern": {name: lora.alpha * rank / lora.rank for name, rank in wider.items()},
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "inference_mode": True,
    }
