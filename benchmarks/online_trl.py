"""A GRPO step here and in TRL: seconds of sampling, scoring and the update.

    python benchmarks/online_trl.py

Needs, beside jaxpref, what TRL's trainer needs: `pip install torch trl accelerate`.

The 17M-parameter Llama of `decoding.py` in float32 on the CPU; 8 prompts of 64 tokens, 8 samples
each of 64 new tokens at temperature 1, a reward function in Python, no reference, and one update
with AdamW over all 64 responses at once. Each side is its trainer as users start it, from the same
directory with model and tokenizer and the same prompts. TRL is set to be fast: no gradient
checkpointing, no logging beside its own. The sides take turns; times are medians over the steps
of all turns but the first step of each, which compiles.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_machine
from decoding import VOCABULARY, build, in_transformers

from jaxpref import config as base, train

PROMPTS, SAMPLES, PROMPT_LENGTH, NEW_TOKENS = 8, 8, 64, 64
STEPS, TURNS, LEARNING_RATE = 4, 2, 1e-6
# Not numbers, since a special token is found inside of words too.
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
PHASES = ("generate", "score", "update")

# Seconds of each phase, one number a step.
Times = dict[str, list[float]]


def reward(ids: Sequence[int]) -> float:
    """The share of odd tokens: cheap, and other for each response."""
    return sum(i % 2 for i in ids) / len(ids)


def rewards(completion_ids: list[Sequence[int]], **_: Any) -> list[float]:
    """The rewards of responses, as both sides ask for them."""
    return [reward(ids) for ids in completion_ids]


def run_jaxpref(folder: Path, prompts: np.ndarray) -> Times:
    """Steps of a run of `python -m jaxpref.main`."""
    with tempfile.TemporaryDirectory() as root:
        lines = [json.dumps({"prompt": text}) for text in _texts(prompts)]
        path = Path(root, "prompts.jsonl")
        path.write_text("\n".join(lines))
        config = base.default("grpo")
        config.model.init_from = str(folder)
        config.data.path = str(path)
        config.data.eval_fraction = 0.0
        config.data.batch_size = PROMPTS
        config.data.max_prompt_length = PROMPT_LENGTH
        config.data.max_length = PROMPT_LENGTH + NEW_TOKENS
        config.data.row_length = PROMPT_LENGTH + SAMPLES * NEW_TOKENS
        config.sampling.samples = SAMPLES
        config.sampling.max_new_tokens = NEW_TOKENS
        config.reward.function = "online_trl:rewards"
        config.reference.mode = "free"
        config.algorithm.beta = 0.0
        config.optimizer.learning_rate = LEARNING_RATE
        config.train.steps = len(prompts)
        config.train.log_every = 1
        train.run(config, Path(root, "run"))
        lines = Path(root, "run", "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "perf/step_seconds" in line]
    found = {
        "generate": [line["perf/generate_seconds"] for line in steps],
        "score": [line["perf/reward_seconds"] for line in steps],
    }
    whole = [line["perf/step_seconds"] for line in steps]
    parts = zip(whole, found["generate"], found["score"], strict=True)
    return {**found, "update": [all_of - made - scored for all_of, made, scored in parts]}


def run_trl(folder: Path, prompts: np.ndarray) -> Times:
    """Steps of TRL's `GRPOTrainer`.

    Args:
      folder: with model and tokenizer.
      prompts: token ids, of shape steps, prompts, tokens.
    """
    import datasets
    import transformers
    import trl

    times: Times = defaultdict(list)

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        times[phase].append(time.perf_counter() - began)

    class Timed(trl.GRPOTrainer):
        def _generate(self, *args: Any) -> Any:
            with timed("generate"):
                made = super()._generate(*args)
            assert made[0] == np.repeat(prompts[len(times["score"])], SAMPLES, axis=0).tolist()
            return made

        def _calculate_rewards(self, *args: Any) -> Any:
            with timed("score"):
                return super()._calculate_rewards(*args)

    class Whole(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["whole"].append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as root:
        settings = trl.GRPOConfig(
            root,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            beta=0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=len(prompts),
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Timed(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder),
            args=settings,
            reward_funcs=rewards,
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            train_dataset=datasets.Dataset.from_dict({"prompt": _texts(prompts)}),
            callbacks=[Whole()],
        )
        trainer.train()
    # What is neither of the two: log-probs, the loss, its gradient, and AdamW.
    whole = times.pop("whole")
    parts = zip(whole, times["generate"], times["score"], strict=True)
    return {**times, "update": [all_of - made - scored for all_of, made, scored in parts]}


def _texts(prompts: np.ndarray) -> list[str]:
    return [" ".join(map(str, ids)) for ids in prompts.reshape(-1, prompts.shape[-1])]


def _tokenizer() -> Any:
    """One word a token id, so that a prompt's ids are its text."""
    import tokenizers
    import transformers

    words = [*SPECIAL.values(), *map(str, range(len(SPECIAL), VOCABULARY))]
    numbers = {word: i for i, word in enumerate(words)}
    of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, SPECIAL["unk_token"]))
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, **SPECIAL)


def report(sides: dict[str, Times]) -> None:
    """Prints a row a side, the median of each phase, and how much faster ours is."""
    print("| side | " + " | ".join(f"{phase} s" for phase in PHASES) + " | step s |")
    print("|" + "---|" * (len(PHASES) + 2))
    steps = {}
    for side, times in sides.items():
        medians = [statistics.median(times[phase]) for phase in PHASES]
        steps[side] = statistics.median(map(sum, zip(*(times[p] for p in PHASES), strict=True)))
        print(f"| {side} | " + " | ".join(f"{x:.2f}" for x in (*medians, steps[side])) + " |")
    print(f"a step of TRL takes {steps['TRL'] / steps['jaxpref']:.2f} times as long as ours")


# What is measured; all sides get the same directory and prompts.
SIDES: dict[str, Callable[[Path, np.ndarray], Times]] = {"jaxpref": run_jaxpref, "TRL": run_trl}


def main() -> None:
    print(describe_machine())
    # The reward function is found by the name of this module.
    sys.path.insert(0, str(Path(__file__).parent))
    shape = (STEPS, PROMPTS, PROMPT_LENGTH)
    prompts = np.random.default_rng(0).integers(len(SPECIAL), VOCABULARY, shape, dtype=np.int32)
    found: dict[str, Times] = {side: defaultdict(list) for side in SIDES}
    with tempfile.TemporaryDirectory() as root:
        in_transformers(build()[1]).save_pretrained(root)
        _tokenizer().save_pretrained(root)
        for _ in range(TURNS):
            for side, run in SIDES.items():
                for phase, seconds in run(Path(root), prompts).items():
                    found[side][phase] += seconds[1:]
    report(found)


if __name__ == "__main__":
    main()
