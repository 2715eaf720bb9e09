"""Test prompts with a response each that is to be beaten, and who says what beats it."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jaxpref.data import read_examples, synthetic
from jaxpref.data.chat import Chat
from jaxpref.data.examples import Example, last_turn
from jaxpref.data.records import check_source
from jaxpref.errors import UserError
from jaxpref.evaluation import judges
from jaxpref.experiments.points import Label
from jaxpref.rewards import Sampled
from jaxpref.terminal import console, listed
from jaxpref.workdir import as_path

# The seed of the generated test pairs; the data that runs train on has another one.
_TEST = 1
# How a judged data set is read, unless it is said otherwise.
_OPTIONS = {"format": "auto", "subset": "", "split": "train"}


@runtime_checkable
class Baseline(Protocol):
    """Test prompts, and what responses to them are worth.

    Attributes:
      settings: everything that this depends on.
    """

    settings: Mapping[str, Label]

    def prompts(self, count: int) -> Sequence[str | Chat]:
        """The first test prompts.

        Raises:
          UserError: there are not so many.
        """

    def values(
        self, sampled: Sampled, numbers: Sequence[int]
    ) -> dict[str, Float[np.ndarray, " responses"]]:
        """What responses are worth: `win_rate`, which is 1/2 for a tie, and others.

        Args:
          sampled: the responses.
          numbers: of the prompt of each, its place in `prompts`.
        """


class Generated:
    """The generated task's chosen responses; the true reward says what is better."""

    def __init__(self, shifted: bool = False):
        """Takes whether guests ask in other words, about other dishes."""
        self._shifted = shifted
        self.settings = {"shifted": shifted}

    def prompts(self, count: int) -> Sequence[str]:
        """See `Baseline`."""
        return [str(pair.prompt) for pair in self._pairs(count)]

    def values(
        self, sampled: Sampled, numbers: Sequence[int]
    ) -> dict[str, Float[np.ndarray, " responses"]]:
        """See `Baseline`; and the true `reward`."""
        true = np.asarray(
            synthetic.true_rewards(list(map(str, sampled.prompts)), sampled.responses)
        )
        pairs = self._pairs(max(numbers) + 1)
        chosen = np.array([pairs[number].true_rewards[0] for number in numbers])
        return {"win_rate": (1 + np.sign(np.round(true - chosen, 6))) / 2, "reward": true}

    def _pairs(self, count: int) -> list[Any]:
        return synthetic.generate(count, _TEST, shifted=self._shifted)


class Judged:
    """A data set's responses, and a judge who prefers what a policy says, or does not."""

    def __init__(
        self,
        workdir: str | Path,
        judge: Mapping[str, Any],
        test: Mapping[str, Any],
        keep: Callable[[Example], bool] = lambda example: True,
    ):
        """Opens the judge, before anything is trained.

        Args:
          workdir: where an endpoint's answers are kept.
          judge: `name`, see `evaluation.judge_files`, and fields of `judges.Asking`.
          test: `path` of the data, and `format`, `subset` and `split`, as in the knobs of data.
            Each prompt's first response is the baseline.
          keep: which examples are taken.

        Raises:
          UserError: the judge or the data cannot be used.
        """
        self._path, self._keep = test["path"], keep
        if not self._path:
            raise UserError(
                "--config.test.path is empty: it should be a file, a directory or a hub data set "
                "of prompts, each with a response that policies are compared with."
            )
        self._options = {name: test.get(name, usual) for name, usual in _OPTIONS.items()}
        check_source(
            self._path,
            "--config.test.path",
            subset=self._options["subset"],
            split=self._options["split"],
        )
        if not judge["name"]:
            raise UserError(
                "--config.judge.name is empty: it should be endpoint:MODEL, with "
                "--config.judge.base_url for an endpoint that is not OpenAI's; or another judge "
                "that python -m jaxpref.judge takes."
            )
        name, asking = judge["name"], {k: v for k, v in judge.items() if k != "name"}
        answers = Path(workdir) / "judge"
        answers.parent.mkdir(parents=True, exist_ok=True)
        self._decide = judges.open_judge(
            name, answers, judges.Asking(**asking), judges.Reading(), seed=0
        )
        # The address says nothing of what is there.
        of_judge = {k: v for k, v in judge.items() if k not in ("base_url", "max_requests")}
        file = as_path(self._path).exists()
        self.settings = {
            "judge": json.dumps(of_judge, sort_keys=True),
            "test": Path(self._path).name if file else self._path,
            **self._options,
        }

    def prompts(self, count: int) -> Sequence[str | Chat]:
        """See `Baseline`."""
        if len(self._examples) < count:
            raise UserError(
                f"{self._path}: has {len(self._examples):,} different prompts with a response to "
                f"compare with; {count:,} are asked for."
            )
        return [example.prompt or "" for example in self._examples[:count]]

    def values(
        self, sampled: Sampled, numbers: Sequence[int]
    ) -> dict[str, Float[np.ndarray, " responses"]]:
        """See `Baseline`; and `no_verdict`, 1 where the judge said nothing, which is a tie."""
        verdicts = judges.decide(self._comparisons(sampled, numbers), self._decide)
        missing = np.isnan(verdicts.scores)
        return {
            "win_rate": np.where(missing, 0.5, verdicts.scores),
            "no_verdict": missing.astype(float),
        }

    def _comparisons(self, sampled: Sampled, numbers: Sequence[int]) -> list[judges.Comparison]:
        found = []
        for place, number in enumerate(numbers):
            example = self._examples[number]
            assert example.prompt is not None
            found.append(
                judges.Comparison(
                    number,
                    example.where,
                    example.prompt,
                    judges.prompt_text(example.prompt),
                    sampled.responses[place].strip(),
                    judges.response_text(example.responses[0]).strip(),
                    (bool(sampled.finished[place]), True),
                )
            )
        return found

    @cached_property
    def _examples(self) -> list[Example]:
        """Those that have a prompt and a response of one text, no two with the same prompt."""
        examples, dropped = read_examples(
            self._path, **self._options, on_divergent="skip", on_empty="skip"
        )
        usable = [e for e in map(last_turn, examples) if e.prompt and e.responses]
        kept = [example for example in usable if self._keep(example)]
        first: dict[str, Example] = {}
        for example in kept:
            first.setdefault(judges.prompt_text(example.prompt or ""), example)
        different = list(first.values())
        counts = {
            **dropped,
            "no_prompt_or_response": len(examples) - len(usable),
            "not_kept": len(usable) - len(kept),
            "prompt_again": len(kept) - len(different),
        }
        console.print(f"{self._path}: {len(different):,} prompts{listed(counts)}")
        return different
