"""jaxpref against TRL: the same DPO run from one Hugging Face directory, loss by loss.

    python benchmarks/trl_parity.py --data=hh-harmless.jsonl.gz

Needs, beside jaxpref, what TRL's trainer needs: `pip install torch trl accelerate`.

In a temporary folder it makes a small model with random weights (a Llama, or with
`--family=gpt_neox` a GPT-NeoX) and a BPE tokenizer, as transformers saves them. Both sides
then start from that directory, each in a process of its own, on the CPU, in float32:
`jaxpref.train.run` with a live reference, and TRL's `DPOTrainer`. Both take 25 steps of 8
pairs, five passes over 40 pairs, with AdamW at a constant rate, weight decay, clipping by
the global norm, and no dropout.

jaxpref draws the order of the pairs from its seed; TRL gets the pairs in that order. TRL
tokenises prompt and response together, jaxpref apart, so only pairs are taken for which
both give the same ids (nearly all do), and that need no truncation. Before any number is
compared, the ids in every batch that TRL trained on are compared with jaxpref's.

Exits with 1 if the losses of any step differ by more than 1e-3, relative to the larger one.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3
STEPS, BATCH_SIZE, PAIRS, MAX_LENGTH, SEED = 25, 8, 40, 256, 0
BETA = 0.1
LEARNING_RATE, B1, B2, EPSILON, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.9, 0.999, 1e-8, 0.1, 1.0
VOCABULARY, EOS, PAD = 4096, "<eos>", "<pad>"
# Untied heads; larger weights than usual, so that attention and the loss have something to do.
SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 512,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}
FAMILIES = {"llama": {"num_key_value_heads": 2}, "gpt_neox": {}}

SIDES = ("chosen", "rejected")
METRICS = (
    *("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen"),
    *("rewards/rejected", "rewards/margins", "rewards/accuracies"),
)

# Of every step the pairs in order, each as the ids of prompt, chosen and rejected.
Batches = list[list[list[list[int]]]]


def prepare(data_path: str, folder: Path, family: str) -> dict[str, Any]:
    """Writes the Hugging Face directory and the pairs that both sides train on."""
    import tokenizers
    import torch
    import transformers

    from jaxpref.data import read_examples

    examples, _ = read_examples(data_path, "hh", on_divergent="skip", on_empty="skip")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((t for e in examples for t in (e.prompt, *e.responses)), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD
    )
    tokenizer.save_pretrained(folder / "model")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    pairs, merged = [], 0
    for example in examples:
        prompt, responses = ids(example.prompt), [ids(text) for text in example.responses]
        if len(prompt) + max(map(len, responses)) >= MAX_LENGTH:  # EOS needs a place too.
            continue
        texts = (example.prompt + text for text in example.responses)
        if [ids(text) for text in texts] != [prompt + response for response in responses]:
            merged += 1
            continue
        pairs.append({"prompt": example.prompt, **dict(zip(SIDES, example.responses, strict=True))})
        if len(pairs) == PAIRS:
            break
    lines = (json.dumps(pair) + "\n" for pair in pairs)
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")

    torch.manual_seed(SEED)
    config = transformers.AutoConfig.for_model(
        family,
        **{**SHAPE, **FAMILIES[family], "vocab_size": len(tokenizer)},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # Norms and biases, which begin at 1 and 0.
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    return {
        "family": family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pairs": len(pairs),
        "merged": merged,
    }


def run_jaxpref(folder: Path) -> dict[str, Any]:
    """The real train loop; also says which pairs its stream puts into every batch."""
    from jaxpref import config as config_lib, data, metrics, packing, train
    from jaxpref.tokenizer import load_tokenizer

    config = config_lib.default("dpo")
    config.seed = SEED
    config.model.init_from = str(folder / "model")
    config.data.update(path=str(folder / "pairs.jsonl"), format="explicit", eval_fraction=0.0)
    config.data.update(batch_size=BATCH_SIZE, max_length=MAX_LENGTH)
    config.data.max_prompt_length = MAX_LENGTH // 2
    config.algorithm.beta = BETA
    config.optimizer.update(name="adamw", schedule="constant", warmup_steps=0)
    config.optimizer.update(b1=B1, b2=B2, epsilon=EPSILON, clip_norm=CLIP_NORM)
    config.optimizer.update(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    config.train.update(steps=STEPS, log_every=1)
    train.run(config, folder / "run")

    tokenizer = load_tokenizer(config.model.init_from)
    dataset = data.load(config, tokenizer, "pairs").train
    if dataset.counts.total():
        raise SystemExit(f"jaxpref cut something: {dict(dataset.counts)}.")
    budget = packing.Budget(MAX_LENGTH, MAX_LENGTH)  # The order does not depend on it.
    stream = data.BatchStream(dataset, batch_size=BATCH_SIZE, budget=budget, seed=SEED)
    order = [stream.indices(step) for step in range(STEPS)]
    groups = {index: dataset.group(index) for batch in order for index in batch}
    pieces = {i: [x.tolist() for x in (g.prompt, *g.responses)] for i, g in groups.items()}
    logged = [line for line in metrics.read(folder / "run" / "metrics.jsonl") if line["step"]]
    return {
        "order": order,
        "batches": [[pieces[index] for index in batch] for batch in order],
        "metrics": logged,
        # Steps that compiled have no time.
        "seconds": [x["perf/step_seconds"] for x in logged if "perf/step_seconds" in x],
    }


def run_trl(folder: Path, order: list[list[int]]) -> dict[str, Any]:
    """TRL's `DPOTrainer` on the pairs in the given order."""
    import datasets
    import torch
    import transformers
    import trl

    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    ends: list[float] = []
    batches: Batches = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    args = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=B1,
        adam_beta2=B2,
        adam_epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = trl.DPOTrainer(
        model=str(folder / "model"),
        args=args,
        train_dataset=datasets.Dataset.from_list([pairs[i] for batch in order for i in batch]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
    )
    weights = [*trainer.model.parameters(), *trainer.ref_model.parameters()]
    if any(weight.dtype != torch.float32 for weight in weights):
        raise SystemExit("TRL's models are not in float32.")
    collate = trainer.data_collator

    def recording(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        batches.append(_ids(batch))
        return batch

    trainer.data_collator = recording
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    seconds = [after - before for before, after in zip(ends[:-1], ends[1:], strict=True)]
    return {"batches": batches, "metrics": logged, "seconds": seconds}


def _ids(batch: dict[str, Any]) -> list[list[list[int]]]:
    """The pairs of a padded batch, whose second half has the rejected responses."""
    rows = []
    for tokens, real, response in zip(
        batch["input_ids"], batch["attention_mask"] > 0, batch["completion_mask"] > 0, strict=True
    ):
        rows.append((tokens[real & ~response].tolist(), tokens[real & response].tolist()))
    half = len(rows) // 2
    pairs = list(zip(rows[:half], rows[half:], strict=True))
    if any(chosen[0] != rejected[0] for chosen, rejected in pairs):
        raise SystemExit("the prompts of a pair differ in TRL's batch.")
    return [[*chosen, rejected[1]] for chosen, rejected in pairs]


def compare_ids(ours: Batches, theirs: Batches) -> int:
    """The number of ids in all batches, which must be the same on both sides."""
    if len(ours) != len(theirs):
        raise SystemExit(f"jaxpref made {len(ours)} batches, TRL {len(theirs)}.")
    count = 0
    for step, (our_batch, their_batch) in enumerate(zip(ours, theirs, strict=True), start=1):
        if len(our_batch) != len(their_batch):
            raise SystemExit(f"step {step}: {len(our_batch)} pairs here, {len(their_batch)} there.")
        for place, (our_pair, their_pair) in enumerate(zip(our_batch, their_batch, strict=True)):
            for name, a, b in zip(("prompt", *SIDES), our_pair, their_pair, strict=True):
                if a != b:
                    raise SystemExit(
                        f"step {step}, pair {place}: the ids of {name} differ: {len(a)} ids here, "
                        f"{len(b)} there, {sum(map(int.__ne__, a, b))} of them different."
                    )
                count += len(a)
    return count


def report(made: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Prints both curves and the differences; returns the largest one of the loss."""
    ids = compare_ids(ours["batches"], theirs["batches"])
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "accelerate")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(", ".join([f"Python {platform.python_version()}", *versions]))
    print(
        f"{made['family']}, {made['parameters']:,} parameters; {made['pairs']} pairs "
        f"({made['merged']} passed over, whose prompt and response merge into one token); "
        f"{ids:,} ids in {STEPS} batches, the same on both sides\n"
    )
    curves = [
        {name: [line.get(name) for line in side["metrics"]] for name in METRICS}
        for side in (ours, theirs)
    ]
    if {len(values) for curve in curves for values in curve.values()} != {STEPS}:
        raise SystemExit(f"a side did not log {STEPS} steps.")
    print("| step | loss, jaxpref | loss, TRL | relative difference |\n|---|---|---|---|")
    for step, (a, b) in enumerate(zip(*(curve["loss"] for curve in curves), strict=True), start=1):
        print(f"| {step} | {a:.6f} | {b:.6f} | {_relative(a, b):.1e} |")
    print("\n| metric | from | to (TRL) | largest difference | relative |\n|---|---|---|---|---|")
    for name in METRICS:
        a, b = (curve[name] for curve in curves)
        if name.startswith("rewards/"):
            # Before the first update they are 0, and every pair is a tie: half a pair here,
            # none in TRL.
            a, b = a[1:], b[1:]
        relative = max(map(_relative, a, b))
        absolute = max(abs(x - y) for x, y in zip(a, b, strict=True))
        print(f"| {name} | {b[0]:.4f} | {b[-1]:.4f} | {absolute:.1e} | {relative:.1e} |")
    print(
        "\nRewards cross 0, where a relative difference says little. Before step 2 they are 0 and "
        f"left out.\n\nSeconds a step on {os.cpu_count()} CPU cores, median (fastest): jaxpref "
        f"{_seconds(ours)} over the {len(ours['seconds'])} steps that compiled nothing; TRL "
        f"{_seconds(theirs)} over {len(theirs['seconds'])} steps, without gradient checkpointing. "
        "From the end of a step to the end of the next, so with batches and logging. The model is "
        "tiny, and the sides ran once, one after the other: on a machine that does anything else "
        "meanwhile these figures mean nothing."
    )
    return max(map(_relative, *(curve["loss"] for curve in curves)))


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    difference = abs(a - b) / max(abs(a), abs(b))
    return difference if math.isfinite(difference) else math.inf


def _seconds(side: dict[str, Any]) -> str:
    return f"{statistics.median(side['seconds']):.2f} ({min(side['seconds']):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="HH dialogues (.jsonl or .jsonl.gz)")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="of the model")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    missing = [x for x in ("torch", "trl", "accelerate") if importlib.util.find_spec(x) is None]
    if missing:
        print(
            f"trl_parity.py compares with TRL and needs {', '.join(missing)}: "
            "pip install torch trl accelerate",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if args.stage:
        stages = {
            "prepare": lambda: prepare(args.data, args.folder, args.family),
            "jaxpref": lambda: run_jaxpref(args.folder),
            "trl": lambda: run_trl(args.folder, _result(args.folder, "jaxpref")["order"]),
        }
        (args.folder / f"{args.stage}.json").write_text(json.dumps(stages[args.stage]()))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = [_in_own_process(x, args, Path(folder)) for x in ("prepare", "jaxpref", "trl")]
    worst = report(*results)
    print(f"\nLargest relative difference of the loss: {worst:.1e}; allowed: {TOLERANCE:.0e}.")
    raise SystemExit(int(worst > TOLERANCE))


def _in_own_process(stage: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    print(f"{stage} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, f"--data={args.data}", f"--family={args.family}"]
    command += [f"--stage={stage}", f"--folder={folder}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        raise SystemExit(f"the stage {stage!r} failed (exit status {done.returncode}).")
    return _result(folder, stage)


def _result(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / f"{stage}.json").read_text())


if __name__ == "__main__":
    main()
