"""The input pipeline: does it ever make the device wait, and does its memory grow?

    python benchmarks/pipeline.py --data=hh-harmless.jsonl.gz

Four figures, each in a process of its own:

  speed    steps per second of the pipeline alone (plan and materialise, prefetched, HH at 8
           pairs a step in rows of 512), against those of training the 17M-parameter decoder of
           `layouts.py` on the same batches
  memory   resident memory after 100 and after 2,000 steps of the pipeline
  epoch    planning an epoch of a million examples (lengths only, 64 a step, rows of 1,024)
  fill     share of the rows' places that hold a token, HH at 64 pairs a step, rows of 1,024
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLES, BATCH_SIZE = 1_000_000, 64


def stream_of(data_path: str, folder: Path, batch_size: int, row_length: int) -> Any:
    """The batches of DPO on the file, as a run would make them."""
    import layouts

    from jaxpref import config as config_lib, data, sharding
    from jaxpref.tokenizer import load_tokenizer

    config = config_lib.default("dpo")
    config.data.update(
        format="hh", path=data_path, on_divergent="skip", on_empty="skip", on_long_prompt="truncate"
    )
    config.data.update(max_length=layouts.MAX_LENGTH, max_prompt_length=layouts.MAX_PROMPT)
    config.data.update(batch_size=batch_size, row_length=row_length)
    tokenizer = load_tokenizer(str(folder))
    loaded = data.load(config, tokenizer, "pairs")
    return data.stream_of(config, loaded, "train", sharding.make_mesh(), training=True)


def speed(data_path: str, folder: Path) -> dict[str, float]:
    """Steps per second of the pipeline and of training."""
    import layouts

    trained = layouts.measure(layouts.Case("tree", 512, "live"), data_path, folder, 4)
    stream = stream_of(data_path, folder, layouts.BATCH_SIZE, 512)
    steps = 1000
    began = time.perf_counter()
    for _ in stream.batches(0, steps):
        pass
    alone = steps / (time.perf_counter() - began)
    training = trained["pairs_per_second"] / layouts.BATCH_SIZE
    return {
        "pipeline_steps_per_second": alone,
        "training_steps_per_second": training,
        "ratio": alone / training,
    }


def memory(data_path: str, folder: Path) -> dict[str, float]:
    """Resident megabytes after 100 and after 2,000 steps."""
    from common import resident_bytes

    stream = stream_of(data_path, folder, 8, 512)
    found = {}
    for step, _ in enumerate(stream.batches(0, 2000), start=1):
        if step in (100, 2000):
            found[f"resident_mb_after_{step}"] = resident_bytes() / 1e6
    return found


def epoch(data_path: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of planning an epoch of a million examples on one core."""
    import os

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import numpy as np
    from common import peak_bytes

    from jaxpref import packing

    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(4.5, 0.8, EXAMPLES), 1, 512).astype(np.int32)
    responses = np.clip(rng.lognormal(4.2, 0.9, (EXAMPLES, 2)), 1, 256).astype(np.int32)
    budget = packing.Budget(1024, packing.scored_budget(prompts, responses, 1024))
    order = rng.permutation(EXAMPLES)
    rows = 0
    began = time.perf_counter()
    for first in range(0, EXAMPLES, BATCH_SIZE):
        part = order[first : first + BATCH_SIZE]
        rows += len(packing.plan_tree(prompts[part].tolist(), responses[part].tolist(), budget))
    seconds = time.perf_counter() - began
    filled = (int(prompts.sum()) + int(responses.sum())) / (rows * 1024)
    return {"seconds": seconds, "peak_mb": peak_bytes() / 1e6, "fill": filled}


def fill(data_path: str, folder: Path) -> dict[str, float]:
    """How full the rows are."""
    from jaxpref.data import statistics

    stream = stream_of(data_path, folder, 64, 1024)
    found = statistics.fill(stream.batch(step) for step in range(26))
    return {"tokens": found.tokens, "scored": found.scored}


MEASURES = {"speed": speed, "memory": memory, "epoch": epoch, "fill": fill}


def main() -> None:
    """Measures everything and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="HH, .jsonl or .jsonl.gz")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        found = MEASURES[arguments.measure](arguments.data, Path(arguments.folder))
        print(json.dumps(found))
        return
    import layouts

    with tempfile.TemporaryDirectory() as folder:
        layouts.prepare(arguments.data, Path(folder))
        for name in MEASURES:
            command = [sys.executable, __file__, f"--data={arguments.data}", f"--measure={name}"]
            done = subprocess.run(
                [*command, f"--folder={folder}"], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:8}", ", ".join(f"{key} {value:,.3f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
