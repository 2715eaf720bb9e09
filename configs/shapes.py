"""Models of published shapes with random weights, to plan for: `shapes.py:MODEL,METHOD`.

    python -m jaxpref.plan --config=configs/shapes.py:llama3_8b,dpo --topology=v5p:2x2x4 --rows=1 \
        --config.mesh.fsdp=16

MODEL is llama3_8b, llama3_70b or qwen3_32b, METHOD one of `algorithm.name`. The shapes are those of
the models' `config.json`; Qwen3's norms of queries and keys are left out, which are 256 numbers a
layer. With the weights at hand give `--config.model.init_from` to any other recipe in its place.

Rows have 2,048 tokens. Activations, products and the reference are in bfloat16, what is trained in
float32, and the backward pass computes all but a layer's input again.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of

SHAPES: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        "vocabulary_size": 128_256,
        "width": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "feed_forward": 14_336,
        "rope_theta": 500_000.0,
    },
    "llama3_70b": {
        "vocabulary_size": 128_256,
        "width": 8192,
        "layers": 80,
        "heads": 64,
        "kv_heads": 8,
        "head_dim": 128,
        "feed_forward": 28_672,
        "rope_theta": 500_000.0,
    },
    "qwen3_32b": {
        "vocabulary_size": 151_936,
        "width": 5120,
        "layers": 64,
        "heads": 64,
        "kv_heads": 8,
        "head_dim": 128,
        "feed_forward": 25_600,
        "rope_theta": 1_000_000.0,
    },
}


def get_config(argument: str = "llama3_8b,dpo") -> ConfigDict:
    """The recipe of a model's shape and a method, `MODEL,METHOD`."""
    model, _, method = argument.partition(",")
    if model not in SHAPES:
        raise ValueError(one_of("the recipe's model", model, tuple(SHAPES)))
    config = base.default(method or "dpo")
    config.model.update(SHAPES[model])
    config.model.tied_head = False
    config.model.norm_epsilon = 1e-5
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    if "dtype" in config.reference:
        config.reference.dtype = "bfloat16"
    config.data.format = "synthetic"
    config.data.max_length = config.data.row_length = 2048
    config.data.max_prompt_length = 1024
    config.data.batch_size = 64
    if base.method_of(config.algorithm.name).samples:
        # That of the generated data.
        config.reward.function = "jaxpref.data.synthetic:true_rewards"
    return config
