"""Memory of reading and restoring weights, and how long the loop waits for a checkpoint.

    python benchmarks/weights.py        # writes about 12 GB to --folder, and removes them

A Llama with random weights in bfloat16 is read from safetensors onto 8 fake devices, saved, and
restored, each in a process of its own. On CPUs the devices' memory is the host's, so what counts is
the peak above the arrays themselves: of anonymous memory, sampled each millisecond, because pages
of files are the kernel's to take back. The wanted bound is 1.5 times the largest shard, and 1 GB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import ml_dtypes
import numpy as np
from common import describe_machine

from jaxpref import sharding
from jaxpref.checkpoint import POLICY, Checkpoints
from jaxpref.models import huggingface
from jaxpref.models.huggingface import safetensors

WIDTH, FEED_FORWARD, VOCABULARY, HEADS, KV_HEADS = 3072, 8192, 32_000, 24, 8
MESH = (1, 8, 1)


def write_model(folder: Path, gigabytes: float) -> None:
    """A Llama in Hugging Face's layout, with as many layers as make so many gigabytes."""
    kv = WIDTH // HEADS * KV_HEADS
    layer = {
        **{
            f"self_attn.{name}_proj": (size, WIDTH)
            for name, size in {"q": WIDTH, "k": kv, "v": kv, "o": WIDTH}.items()
        },
        **{f"mlp.{name}_proj": (FEED_FORWARD, WIDTH) for name in ("gate", "up")},
        "mlp.down_proj": (WIDTH, FEED_FORWARD),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    tables = 2 * VOCABULARY * WIDTH
    layers = max(1, round((gigabytes * 5e8 - tables) / sum(map(np.prod, layer.values()))))
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    shapes["model.norm.weight"] = (WIDTH,)
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def get(name: str) -> np.ndarray:
        return (0.02 * rng.standard_normal(shapes[name], np.float32)).astype(ml_dtypes.bfloat16)

    tensors = {name: (shape, "BF16") for name, shape in shapes.items()}
    safetensors.write_file(folder / safetensors.SINGLE, tensors, get)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def peak_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and how far its memory grew at most."""
    before, peak, over = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(1e-3):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = jax.block_until_ready(function())
    over.set()
    watcher.join()
    return result, max(peak[0], anonymous_bytes()) - before


def child(what: str, folder: Path, rounds: int) -> None:
    """One side, in a process of its own; prints what it measured as JSON."""
    mesh = sharding.make_mesh(*MESH)
    model = huggingface.read_model(folder, dtype="bfloat16", param_dtype="bfloat16")
    abstract = huggingface.abstract_params(model, mesh)
    number = jax.numpy.zeros((), jax.numpy.int32)
    began = time.perf_counter()
    if what == "read":
        params, peak = peak_of(lambda: huggingface.load_params(model, abstract))
    else:
        with Checkpoints(folder, keep=1) as checkpoints:
            if what == "save":
                params = huggingface.load_params(model, abstract)
                print(json.dumps(saves(checkpoints, {POLICY: params}, {"step": number}, rounds)))
                return
            latest = checkpoints.latest
            assert latest is not None
            step = jax.ShapeDtypeStruct((), number.dtype, sharding=number.sharding)
            (params, _), peak = peak_of(
                lambda: checkpoints.restore(latest, {POLICY: abstract}, {"step": step})
            )
    seconds = time.perf_counter() - began
    leaves = jax.tree.leaves(params)
    shard = max(x.addressable_shards[0].data.nbytes for x in leaves)
    print(json.dumps([seconds, sum(x.nbytes for x in leaves), peak, shard]))


def saves(checkpoints: Checkpoints, params: Any, rest: Any, rounds: int) -> list[list[float]]:
    """Seconds until a save returns, and of one that is waited for, in turns."""
    found = []
    for number in range(2 * rounds):
        began = time.perf_counter()
        checkpoints.save(number, params, rest)
        returned = time.perf_counter() - began
        checkpoints.wait()
        whole = time.perf_counter() - began
        if number % 2:
            found[-1].append(whole)
        else:
            found.append([returned])
    return found


def run(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="turns of saving")
    parser.add_argument("--folder", help="for what is written, which is removed in the end")
    parser.add_argument("--child", help="for this script itself: what to do in --folder")
    flags = parser.parse_args()
    if flags.child:
        child(flags.child, Path(flags.folder), flags.rounds)
        return
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        write_model(Path(name), flags.gigabytes)
        waits = None
        print("| | seconds | arrays GB | peak above them GB | largest shard GB | bound GB |")
        print("|---|---|---|---|---|---|", flush=True)
        for what in ("read", "save", "restore"):
            found = run(f"--child={what}", f"--folder={name}", f"--rounds={flags.rounds}")
            if what == "save":
                waits = found
                continue
            seconds, arrays, peak, shard = found
            sizes = (arrays, peak - arrays, shard, 1.5 * shard + 1e9)
            print(
                f"| {what} | {seconds:.1f} | {' | '.join(f'{x / 1e9:.2f}' for x in sizes)} |",
                flush=True,
            )
    returned, whole = (statistics.median(side) for side in zip(*waits, strict=True))
    ratio = statistics.median(a / b for a, b in waits)
    print(f"save returns after {returned:.2f} s; waited for {whole:.2f} s; ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
