"""Decoders in Flax Linen: pure functions of their parameters."""

from jaxpref.models.adapters import dequantize, merge_adapters, without_adapters
from jaxpref.models.cache import Cache, branch, widened
from jaxpref.models.classifiers import as_scalar, padding_beside_adapters, with_scalar_head
from jaxpref.models.config import DecoderConfig, Lora
from jaxpref.models.decoder import Decoder, rotary_table, unroll
from jaxpref.models.from_config import alignment, attention_of, build, lora
from jaxpref.models.huggingface import (
    from_pretrained,
    make_rope,
    save_adapters,
    save_pretrained,
)
from jaxpref.models.layers import Angles
from jaxpref.models.packed import packed
from jaxpref.models.params import abstract_params, init_params
from jaxpref.models.protocol import Model, ModelOutput, ScalarHead
from jaxpref.models.rotary import Rope

__all__ = [
    "Angles",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Lora",
    "Model",
    "ModelOutput",
    "Rope",
    "ScalarHead",
    "abstract_params",
    "alignment",
    "as_scalar",
    "attention_of",
    "branch",
    "build",
    "dequantize",
    "from_pretrained",
    "init_params",
    "lora",
    "make_rope",
    "merge_adapters",
    "packed",
    "padding_beside_adapters",
    "rotary_table",
    "save_adapters",
    "save_pretrained",
    "unroll",
    "widened",
    "with_scalar_head",
    "without_adapters",
]
