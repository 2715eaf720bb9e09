"""The preference tree against the padded layout: pairs per second and peak memory of DPO.

    python benchmarks/layouts.py --data=hh-harmless.jsonl.gz

A 17M-parameter decoder (384 wide, 6 layers, 6 heads, feed-forward 1024, a BPE vocabulary
of 16,384 trained on the file) in float32, 8 pairs a step, at most 512 tokens a sequence.
Every case trains on the same batches, in a process of its own so that its peak memory is
its own, and the cases take turns over several rounds; figures are medians over rounds.

  padded          one response a row of 512, every position through the LM head: full logits
  padded+chunked  the same rows, with this library's log-probs of the scored positions only
  tree N          the preference tree in rows of N tokens

with a live reference and the library's default `model.remat` ("dots": the backward pass
computes again what is cheap), and the first and the best tree also with a precomputed
reference and with nothing computed again.

Memory is given three times: the process's peak resident memory while it trains; the part
of it beyond Python with its libraries loaded, which is the run's own (data, compiled code,
state, temporary arrays); and what XLA plans for the step alone (state, batch and temporary
arrays), which is what counts on an accelerator.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

BATCH_SIZE, MAX_LENGTH, MAX_PROMPT, VOCABULARY = 8, 512, 256, 16_384
WIDTH, LAYERS, HEADS, FEED_FORWARD = 384, 6, 6, 1024


class Case(NamedTuple):
    """A layout, the tokens of its rows, where the reference comes from, and `model.remat`."""

    layout: str
    row_length: int
    reference: str
    remat: str = "dots"

    def __str__(self) -> str:
        rows = f" {self.row_length}" if self.layout == "tree" else ""
        remat = "" if self.remat == "dots" else f", remat {self.remat}"
        return f"{self.layout}{rows}, {self.reference}{remat}"


CASES = [
    Case("padded", 512, "live"),
    Case("padded+chunked", 512, "live"),
    Case("tree", 512, "live"),
    Case("tree", 768, "live"),
    Case("tree", 1024, "live"),
    Case("padded", 512, "precomputed"),
    Case("tree", 512, "precomputed"),
    Case("padded", 512, "live", "none"),
    Case("tree", 512, "live", "none"),
]


def prepare(data_path: str, folder: Path) -> None:
    """Trains the tokenizer on the file and stores it."""
    import tokenizers
    import transformers

    from jaxpref.data import read_examples

    examples, dropped = read_examples(data_path, "hh", on_divergent="skip", on_empty="skip")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((t for e in examples for t in (e.prompt, *e.responses)), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(
        folder
    )
    print(f"{len(examples)} pairs, {dict(dropped)}; vocabulary {bpe.get_vocab_size()}")


def measure(case: Case, data_path: str, folder: Path, steps: int) -> dict[str, Any]:
    """Trains `steps` steps of one case, compiled ahead, and returns its figures."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from common import forget_peak, matmul_flops_per_second, peak_bytes, resident_bytes

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
    from jaxpref.reference import Live, Precomputed
    from jaxpref.tokenizer import load_tokenizer

    config = config_lib.default("dpo")
    config.reference.mode = case.reference
    config.model.update(
        width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim=WIDTH // HEADS
    )
    config.model.update(feed_forward=FEED_FORWARD, remat=case.remat)
    config.data.update(
        format="hh", path=data_path, on_divergent="skip", on_empty="skip", on_long_prompt="truncate"
    )
    config.data.update(batch_size=BATCH_SIZE, max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT)
    config_lib.check(config)

    tokenizer = load_tokenizer(str(folder))
    jax.devices()  # Starts the backend, which is one of the libraries.
    libraries = resident_bytes()
    model = models.build(config.model, len(tokenizer))
    algorithm, forward = algorithms.build(config), models.packed(model)
    if case.layout == "padded":
        algorithm, forward = _with_full_logits(algorithm, model)
    dataset = data.load(config, tokenizer, "pairs").train
    tree = case.layout == "tree"
    scored = packing.scored_budget(
        dataset.prompt_lengths, dataset.response_lengths, case.row_length
    )
    budget = packing.Budget(case.row_length, scored if tree else case.row_length)
    planner = packing.plan_tree if tree else packing.plan_padded

    stream = data.BatchStream(dataset, batch_size=BATCH_SIZE, budget=budget, planner=planner)
    mesh = sharding.make_mesh()
    optimizer, schedule = optimizer_lib.build(config.optimizer, steps)
    abstract, _ = train.abstract_state(model, optimizer, mesh)
    params = weights.load(config, weights.Source(None, None), model, abstract.policy)
    state = train.initial_state(params, optimizer, abstract=abstract)
    with sharding.use(mesh):
        reference, mode = jax.tree.map(jnp.copy, state.policy), Live(forward)
        batches = [stream.batch(step) for step in range(steps)]
        if case.reference == "precomputed":
            # Paid once, before training, and so not part of a step.
            batches = _with_reference(forward, reference, batches)
            reference, mode = {}, Precomputed()
        update = train.make_update(algorithm, forward, optimizer, schedule, reference=mode)
        put = [sharding.put_batch(mesh, batch) for batch in batches]
        compiled = {}
        for batch in put:
            if batch.tokens.shape not in compiled:
                compiled[batch.tokens.shape] = update.lower(state, {}, reference, batch).compile()
        forget_peak()
        # Warm up on the first batch, then time every batch once.
        state, first = compiled[put[0].tokens.shape](state, {}, reference, put[0])
        jax.block_until_ready(state)
        elapsed = 0.0
        for batch in put:
            began = time.perf_counter()
            state, _ = compiled[batch.tokens.shape](state, {}, reference, batch)
            jax.block_until_ready(state)
            elapsed += time.perf_counter() - began
    peak = peak_bytes()
    return {
        "pairs_per_second": steps * BATCH_SIZE / elapsed,
        "peak_bytes": peak,
        "run_bytes": peak - libraries,
        "step_bytes": max(
            m.argument_size_in_bytes
            + m.temp_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes
            for m in (c.memory_analysis() for c in compiled.values())
        ),
        "first_loss": float(first["loss"].values / first["loss"].weights),
        "fill": float(np.mean([(b.group > 0).mean() for b in batches])),
        "rows": float(np.mean([b.tokens.shape[1] for b in batches])),
        "flops": sum(_unavoidable_flops(b, case.reference == "live") for b in batches) / steps,
        "matmul_flops_per_second": matmul_flops_per_second(),
    }


def _with_reference(model: Any, params: Any, batches: list[Any]) -> list[Any]:
    """The batches with the reference's log-probs, computed beforehand."""
    import dataclasses

    import jax
    import numpy as np

    from jaxpref.algorithms import response_logps
    from jaxpref.reference import COLUMN

    @jax.jit
    def logps(batch: Any) -> Any:
        whole = jax.tree.map(lambda x: x[0], batch)
        return response_logps(model(params, whole), whole)

    return [dataclasses.replace(b, extras={COLUMN: np.asarray(logps(b))[None]}) for b in batches]


def _with_full_logits(algorithm: Any, decoder: Any) -> tuple[Any, Any]:
    """DPO as it is without this library's log-probs: all logits, then a mask."""
    import jax.numpy as jnp

    from jaxpref import losses, packing
    from jaxpref.algorithms import Objective
    from jaxpref.logprobs import from_logits
    from jaxpref.measurements import Metric
    from jaxpref.models import ModelOutput

    def model(params: Any, batch: Any, key: Any = None) -> Any:
        variables = {"params": params}
        logits = decoder.apply(variables, batch.tokens, batch.positions, batch.tree)
        # What is called hidden states here are the logits, and no head is left to read them.
        return ModelOutput(logits, None)

    def response_logps(output: Any, batch: Any) -> Any:
        # Each place's log-prob of the token after it; the last place has none.
        logps = from_logits(output.hidden[:, :-1], batch.tokens[:, 1:])
        logps = jnp.pad(logps, ((0, 0), (0, 1)))
        return packing.sum_by_response(logps.ravel()[batch.source], batch)

    def loss(output: Any, batch: Any, inputs: Any) -> Any:
        policy, reference = response_logps(output, batch), inputs.reference
        out = losses.dpo(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
        return Objective(Metric(out.losses, jnp.ones_like(out.losses)), {})

    return algorithm._replace(reference_logps=response_logps, loss=loss), model


def _unavoidable_flops(batch: Any, live_reference: bool) -> float:
    """Prompt once, responses once, head on scored tokens only; no padding, no recomputation."""
    import numpy as np

    forward_passes = 4 if live_reference else 3  # The backward pass is two forwards' work.
    group, branch = batch.group[0], batch.branch[0]
    tokens = int((group > 0).sum())
    per_token = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * FEED_FORWARD)
    index = np.arange(group.shape[1])
    visible = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] > 0)
    visible &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    visible &= index[:, None] >= index[None, :]
    attention = 4 * WIDTH * LAYERS * int(visible.sum())
    head = 2 * VOCABULARY * WIDTH * int(batch.lengths.sum())
    return forward_passes * (2.0 * per_token * tokens + attention + head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="HH dialogues (.jsonl or .jsonl.gz)")
    parser.add_argument("--steps", type=int, default=6, help="steps timed a case and round")
    parser.add_argument("--rounds", type=int, default=3, help="turns that every case takes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        case = Case(**json.loads(args.case))
        print(json.dumps(measure(case, args.data, Path(args.folder), args.steps)))
        return
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.data, Path(folder))
        for turn in range(args.rounds):
            for case in CASES:
                results[case].append(_in_own_process(case, args, folder))
                figures = results[case][-1]
                print(
                    f"round {turn + 1}: {case!s:24} {figures['pairs_per_second']:6.2f} pairs/s "
                    f"{figures['peak_bytes'] / 1e9:5.2f} GB  loss {figures['first_loss']:.6f}",
                    flush=True,
                )
    report(results)


def _in_own_process(case: Case, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--data={args.data}", f"--steps={args.steps}"]
    command += [f"--case={json.dumps(case._asdict())}", f"--folder={folder}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[Case, list[dict[str, Any]]]) -> None:
    """Medians over rounds, ratios to the padded layout, and the distance to the limit."""
    from common import describe_machine

    print(f"\n{describe_machine()}\n")
    print(
        "| case | pairs/s | x padded | resident GB | of padded | run GB | of padded | step GB "
        "| of padded | rows | fill | of the limit |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for case, rounds in results.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        padded = results[Case("padded", 512, case.reference, case.remat)]
        # Each round's own ratio, so that a slow minute weighs on both sides.
        speed = statistics.median(
            a["pairs_per_second"] / b["pairs_per_second"]
            for a, b in zip(rounds, padded, strict=True)
        )
        resident, own, planned = (
            statistics.median(a[key] / b[key] for a, b in zip(rounds, padded, strict=True))
            for key in ("peak_bytes", "run_bytes", "step_bytes")
        )
        # The unavoidable work is that of the tree that holds every group whole.
        whole = results[Case("tree", 1024, "live")][0]["flops"]
        flops = whole * (1 if case.reference == "live" else 3 / 4)
        limit = BATCH_SIZE * middle["matmul_flops_per_second"] / flops
        print(
            f"| {case} | {middle['pairs_per_second']:.2f} | {speed:.2f} "
            f"| {middle['peak_bytes'] / 1e9:.2f} | {resident:.2f} "
            f"| {middle['run_bytes'] / 1e9:.2f} | {own:.2f} "
            f"| {middle['step_bytes'] / 1e9:.2f} | {planned:.2f} | {middle['rows']:.1f} "
            f"| {middle['fill']:.2f} | {middle['pairs_per_second'] / limit:.2f} |"
        )
    rate = statistics.median(r["matmul_flops_per_second"] for rs in results.values() for r in rs)
    print(
        f"\nThe limit: the unavoidable operations ({whole / 1e9:.0f} GFLOP a step with a live "
        f"reference) at the rate of a matrix product measured beside ({rate / 1e9:.0f} GFLOP/s)."
    )


if __name__ == "__main__":
    main()
