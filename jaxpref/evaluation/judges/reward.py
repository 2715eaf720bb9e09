"""A trained reward model as a judge: the response with the higher reward is the better one."""

from collections.abc import Sequence

import numpy as np

from jaxpref import data as data_lib
from jaxpref.data import Example
from jaxpref.evaluation.judges.base import Comparison, Judge, Verdicts
from jaxpref.evaluation.rewards import score_examples
from jaxpref.rewards import RewardModel
from jaxpref.terminal import console, listed
from jaxpref.workdir import AnyPath

# A response, and whether it came to its end.
_Said = tuple[str, bool]


def from_reward_model(
    path: str | AnyPath, *, batch_size: int = 16, max_length: int = 0, chat_template: str = ""
) -> Judge:
    """A judge who is a reward model. Each response is scored once, whatever it is compared with.

    Args:
      path: see `evaluation.score_file`.
      batch_size: rows of tokens scored at a time.
      max_length: tokens of a prompt with a response, see `evaluation.score_file`.
      chat_template: see `tokenizer.chat_template`; empty for the run's own.

    Raises:
      UserError: there is no reward model.
    """
    model = RewardModel(path, max_length=max_length, chat_template=chat_template)

    def judge(comparisons: Sequence[Comparison]) -> Verdicts:
        prompts = {x.number: x for x in comparisons}
        said: dict[int, dict[_Said, float]] = {number: {} for number in prompts}
        for comparison in comparisons:
            said[comparison.number].update(dict.fromkeys(_both(comparison), np.nan))
        examples = [
            Example(
                prompts[number].prompt,
                tuple(text for text, _ in responses),
                where=prompts[number].where,
                ordered=False,
                finished=tuple(ended for _, ended in responses),
            )
            for number, responses in said.items()
        ]
        dataset = data_lib.tokenize(
            examples,
            model.tokenizer,
            data_lib.limits_of(model.config, model.tokenizer),
            parse_special_tokens=model.config.tokenizer.parse_special_tokens,
        )
        rewards = score_examples(model, examples, dataset, batch_size=batch_size)
        for responses, values in zip(said.values(), rewards, strict=True):
            responses.update(zip(responses, values.tolist(), strict=True))
        pairs = np.array([[said[x.number][one] for one in _both(x)] for x in comparisons])
        count = sum(len(example.responses) for example in examples)
        console.print(f"{path}: {count:,} responses scored{listed(dataset.counts)}")
        return Verdicts((1 + np.sign(pairs[:, 0] - pairs[:, 1])) / 2, told=dataset.counts)

    return judge


def _both(comparison: Comparison) -> tuple[_Said, _Said]:
    return (comparison.a, comparison.finished[0]), (comparison.b, comparison.finished[1])
