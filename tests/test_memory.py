"""Weights stream: host memory holds the parameters, one tensor, and a constant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref.models.huggingface import safetensors

WIDTH, FEED_FORWARD, LAYERS = 2048, 8192, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": WIDTH,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
LARGEST = WIDTH * FEED_FORWARD * 4

# Prints the growth of the process's peak memory while it reads, and while it writes.
SCRIPT = """
import sys
from pathlib import Path
import jax
from jaxpref import models, sharding

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def grown(function):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = function()
    return result, status("VmHWM") - before

mesh = sharding.make_mesh(1, -1, 1) if len(sys.argv) > 3 else None
models.huggingface.read_model(Path(sys.argv[1]))  # Loads the libraries.
(model, params), read = grown(
    lambda: jax.block_until_ready(models.from_pretrained(sys.argv[1], mesh=mesh))
)
_, written = grown(lambda: models.save_pretrained(model, params, sys.argv[2]))
print(sum(x.nbytes for x in jax.tree.leaves(params)), read, written)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 4])
def test_two_gigabytes_are_read_and_written_within_the_largest_tensor(tmp_path, devices):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    # Holes instead of weights: files of their size that take no room.
    tensors = {
        "model.embed_tokens.weight": ((1000, WIDTH), "F32"),
        "model.norm.weight": ((WIDTH,), "F32"),
    }
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}{name}.weight"] = ((WIDTH,), "F32")
        for name in "qkvo":
            tensors[f"{place}self_attn.{name}_proj.weight"] = ((WIDTH, WIDTH), "F32")
        for name in ("gate", "up"):
            tensors[f"{place}mlp.{name}_proj.weight"] = ((FEED_FORWARD, WIDTH), "F32")
        tensors[f"{place}mlp.down_proj.weight"] = ((WIDTH, FEED_FORWARD), "F32")
    write_holes(tmp_path / safetensors.SINGLE, tensors)
    flags = ["sharded"] if devices > 1 else []
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "out"), *flags],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
        check=True,
    )
    size, read, written = map(int, done.stdout.split())
    assert size > 2e9
    # The view of a tensor in the file and its copy; the compiler, and what the allocator keeps.
    constant = 4e8
    assert read < size + 2 * LARGEST + constant, (read - size) / LARGEST
    assert written < 2 * LARGEST + constant, written / LARGEST


def write_holes(path, tensors):
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
