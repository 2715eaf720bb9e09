"""Offline steps: one batch with as many rows as it needs, or micro-batches of one shape.

    python benchmarks/micro_batches.py

DPO at `configs/quickstart.py:dpo`. A batch as it is now compiles once for each number of rows;
micro-batches of `--rows` rows compile once, and a step has as many as its groups need. Both sides
train on the same pairs and take turns; steps are timed after all is compiled.
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

RECIPE = Path(__file__).parent.parent / "configs" / "quickstart.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16], help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="batches that each side trains on")
    args = parser.parse_args()
    config = runpy.run_path(str(RECIPE))["get_config"]("dpo")
    config.model.init_from = ""
    config_lib.check(config)
    tokenizer = load_tokenizer("bytes")
    model = models.build(config.model, len(tokenizer))
    dataset = data.load(config, tokenizer, "pairs").train
    scored = packing.scored_budget(
        dataset.prompt_lengths, dataset.response_lengths, config.data.row_length
    )
    budget = packing.Budget(config.data.row_length, scored)
    stream = data.BatchStream(dataset, batch_size=config.data.batch_size, budget=budget)
    steps = [[dataset.group(index) for index in stream.indices(step)] for step in range(args.steps)]
    sides: dict[str, list[Any]] = {"one batch": [stream.batch(s) for s in range(args.steps)]}
    for rows in args.rows:
        found = [packing.pack_micro_batches(groups, budget, rows=rows) for groups in steps]
        # As many as the longest step needs; those at the end that are empty are not computed.
        most = max(len(batch.tokens) for batch in found)
        sides[f"{rows} rows"] = [
            packing.pack_micro_batches(groups, budget, rows=rows, micro_batches=most)
            for groups in steps
        ]

    mesh = sharding.make_mesh()
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
