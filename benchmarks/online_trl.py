"""A GRPO step in TRL: seconds of sampling, scoring and the update.

    python benchmarks/online_trl.py

Needs, beside jaxpref, what TRL's trainer needs: `pip install torch trl accelerate`.

The 17M-parameter Llama of `decoding.py` in float32 on the CPU; 8 prompts of 64 tokens, 8 samples
each of 64 new tokens at temperature 1, a reward function in Python, no reference, and one update
with AdamW over all 64 responses at once. TRL is set to be fast: no gradient checkpointing, no
logging beside its own. Times are medians of 3 steps after a first one.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from common import describe_machine
from decoding import VOCABULARY, build, in_transformers

PROMPTS, SAMPLES, PROMPT_LENGTH, NEW_TOKENS = 8, 8, 64, 64
STEPS, LEARNING_RATE = 4, 1e-6
# Not numbers, since a special token is found inside of words too.
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
PHASES = ("generate", "score", "update")

# Seconds of each phase, one number a step.
Times = dict[str, list[float]]


def reward(ids: Sequence[int]) -> float:
    """The share of odd tokens: cheap, and other for each response."""
    return sum(i % 2 for i in ids) / len(ids)


def run_trl(params: Any, prompts: np.ndarray) -> Times:
    """Steps of TRL's `GRPOTrainer`.

    Args:
      params: of the model.
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

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [reward(ids) for ids in completion_ids]

    texts = [" ".join(map(str, ids)) for ids in prompts.reshape(-1, prompts.shape[-1])]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            folder,
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
            model=in_transformers(params),
            args=settings,
            reward_funcs=rewards,
            processing_class=_tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            callbacks=[Whole()],
        )
        trainer.train()
    # What is neither of the two: log-probs, the loss, its gradient, and AdamW.
    whole = times.pop("whole")
    parts = zip(whole, times["generate"], times["score"], strict=True)
    return {**times, "update": [all_of - made - scored for all_of, made, scored in parts]}


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
    """Prints a row a side: the median of each phase, without the first step."""
    print("| side | " + " | ".join(f"{phase} s" for phase in PHASES) + " | step s |")
    print("|" + "---|" * (len(PHASES) + 2))
    for side, times in sides.items():
        medians = [statistics.median(times[phase][1:]) for phase in PHASES]
        whole = statistics.median(map(sum, zip(*(times[p][1:] for p in PHASES), strict=True)))
        print(f"| {side} | " + " | ".join(f"{x:.2f}" for x in (*medians, whole)) + " |")


# What is measured; all sides get the same parameters and prompts.
SIDES: dict[str, Callable[[Any, np.ndarray], Times]] = {"TRL": run_trl}


def main() -> None:
    print(describe_machine())
    _, params = build()
    shape = (STEPS, PROMPTS, PROMPT_LENGTH)
    prompts = np.random.default_rng(0).integers(len(SPECIAL), VOCABULARY, shape, dtype=np.int32)
    report({side: run(params, prompts) for side, run in SIDES.items()})


if __name__ == "__main__":
    main()
