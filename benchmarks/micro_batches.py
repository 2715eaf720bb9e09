"""Offline steps: one batch with as many rows as it needs, or micro-batches of one shape.

    python benchmarks/micro_batches.py [--data_path=hh-harmless.jsonl.gz]

DPO at `configs/quickstart.py:dpo`, or on HH at `configs/dpo_hh.py:tiny` with random weights. A
whole batch compiles once for each number of rows; micro-batches of `--rows` rows (0: what
`data.rows` chooses) compile once, and a step has as many as its groups need. All sides train on the
same pairs and take turns; steps are timed after all is compiled.
"""

import argparse
import runpy
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import describe_machine

from jaxpref import (
    algorithms,
    config as config_lib,
    data,
    models,
    optimizer as optimizer_lib,
    packing,
    sharding,
    train,
    weights,
)
from jaxpref.reference import Live
from jaxpref.tokenizer import load_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 4, 16], help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="batches that each side trains on")
    parser.add_argument("--data_path", help="of HH")
    args = parser.parse_args()
    recipe, size = ("dpo_hh", "tiny") if args.data_path else ("quickstart", "dpo")
    config = runpy.run_path(str(CONFIGS / f"{recipe}.py"))["get_config"](size)
    if args.data_path:
        config.data.path = args.data_path
    config.model.init_from = ""
    config_lib.check(config)
    tokenizer = load_tokenizer("bytes")
    model = models.build(config.model, len(tokenizer))
    dataset = data.load(config, tokenizer, "pairs").train
    mesh = sharding.make_mesh()
    budget = data.budget_of(config, dataset, mesh)
    size = config.data.batch_size
    shapes: dict[str, Any] = {"one batch": None}
    for rows in args.rows:
        shape = packing.fixed_shape(
            dataset.prompt_lengths, dataset.response_lengths, budget, batch_size=size, rows=rows
        )
        shapes[f"{shape.rows} rows{'' if rows else ', chosen'}"] = shape
    sides: dict[str, list[Any]] = {}
    for side, shape in shapes.items():
        stream = data.BatchStream(dataset, batch_size=size, budget=budget, shape=shape)
        sides[side] = [stream.batch(step) for step in range(args.steps)]

    optimizer, schedule = optimizer_lib.build(config.optimizer, args.steps)
    abstract, _ = train.abstract_state(model, optimizer, mesh)
    params = weights.load(config, weights.Source(None, None), model, abstract.policy)
    forward, algorithm = models.packed(model), algorithms.build(config)
    times: dict[str, list[float]] = {side: [] for side in sides}
    compiling = dict.fromkeys(sides, 0.0)
    print(describe_machine())
    with sharding.use(mesh):
        reference = jax.tree.map(jnp.copy, params)
        state = train.initial_state(params, optimizer, abstract=abstract)
        update = train.make_update(algorithm, forward, optimizer, schedule, reference=Live(forward))
        put = {s: [sharding.put_batch(mesh, b) for b in batches] for s, batches in sides.items()}
        compiled: dict[Any, Any] = {}
        for side, batches in put.items():
            began = time.perf_counter()
            for batch in batches:
                shape = side, batch.tokens.shape
                if shape not in compiled:
                    compiled[shape] = update.lower(state, {}, reference, batch).compile()
            compiling[side] = time.perf_counter() - began
        for batches in zip(*put.values(), strict=True):
            for side, batch in zip(put, batches, strict=True):
                call = compiled[side, batch.tokens.shape]
                began = time.perf_counter()
                state, _ = jax.block_until_ready(call(state, {}, reference, batch))
                times[side].append(time.perf_counter() - began)
    print("| side | programs | compiling s | rows | step s | to one batch |")
    print("|---|---|---|---|---|---|")
    for side, batches in sides.items():
        programs = sum(1 for name, _ in compiled if name == side)
        held = [int((b.lengths > 0).any(axis=(1, 2)).sum()) * b.tokens.shape[1] for b in batches]
        ratios = [a / b for a, b in zip(times[side], times["one batch"], strict=True)]
        print(
            f"| {side} | {programs} | {compiling[side]:.1f} | {statistics.mean(held):.1f} | "
            f"{statistics.median(times[side]):.3f} | {statistics.median(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
