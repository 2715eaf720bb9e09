"""The generated task: how often policies beat what was preferred there, by the true reward.

Every run begins from one SFT run, which has seen both responses of the pairs. Preferred-FT learns
the chosen ones, DPO the pairs, PPO from a reward model of the pairs; best-of-N samples from SFT and
takes what the reward model likes. A response wins against the chosen response of a test pair if its
true reward is higher.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jaxpref import rewards
from jaxpref.data import synthetic
from jaxpref.evaluation import best_of_n
from jaxpref.experiments.points import Job, Label, Point, check_counts, shown
from jaxpref.experiments.policies import Answers, Policy, Runs
from jaxpref.rewards import Rewards
from jaxpref.sampling import Sampling

# The seeds of the data that runs train on, and of the test pairs.
_TRAINING, _TEST = 0, 1
# What the shifted prompts are called, and those that are as in training.
USUAL, SHIFTED = "as in training", "other words and topics"
BEST_OF = "best of n"


class Recipes(NamedTuple):
    """The configs of the runs, but for where they begin from and what they read.

    Attributes:
      sft: the start.
      preferred_ft: SFT on the chosen responses.
      dpo: DPO.
      reward: the reward model.
      ppo: PPO.
    """

    sft: ConfigDict
    preferred_ft: ConfigDict
    dpo: ConfigDict
    reward: ConfigDict
    ppo: ConfigDict


class Settings(NamedTuple):
    """What all measurements have in common.

    Attributes:
      prompts: test prompts.
      samples: of a policy, to each of them.
      best_of: samples among which the best is chosen.
      best_of_prompts: test prompts for that, the first ones.
      max_new_tokens: of a response.
      seed: of the random numbers.
    """

    prompts: int
    samples: int
    best_of: int
    best_of_prompts: int
    max_new_tokens: int
    seed: int


class Study:
    """Jobs that share their runs."""

    def __init__(self, recipes: Recipes, workdir: str | Path, **settings: Any):
        """Takes the configs of the runs, the experiment's workdir, and `Settings`.

        Raises:
          UserError: a number is below 1.
        """
        self._recipes, self._runs = recipes, Runs(workdir)
        self._settings = Settings(**settings)
        check_counts(**{k: v for k, v in settings.items() if k != "seed"})

    def at_temperatures(
        self, method: str, temperatures: Sequence[float], *, shifted: bool = False, steps: int = 0
    ) -> Job:
        """How often a method wins at each temperature, against the chosen responses.

        Args:
          method: a field of `Recipes`, or `BEST_OF`.
          temperatures: of sampling.
          shifted: whether guests ask in other words, about other dishes.
          steps: of the method's run; 0 for all of them.
        """
        labels: dict[str, Label] = {
            "method": method,
            "prompts": SHIFTED if shifted else USUAL,
            "step": steps or "all",
        }

        def points() -> list[Point]:
            policy = self._policy("sft" if method == BEST_OF else method, steps)
            measure = self._best if method == BEST_OF else self._mean
            return [
                Point({**labels, "temperature": temperature}, values, "prompts")
                for temperature, values in measure(policy, temperatures, shifted).items()
            ]

        return self._job(labels, {"temperatures": tuple(temperatures)}, points, [method])

    def over_n(self, numbers: Sequence[int]) -> Job:
        """What best-of-N is worth, chosen by the reward model and by the true reward.

        Args:
          numbers: of samples; the largest is `Settings.best_of`.
        """
        labels: dict[str, Label] = {"method": BEST_OF}

        def points() -> list[Point]:
            policy = self._policy("sft")
            answers = self._answers(
                policy, (1.0,) * self._settings.best_of, False, self._settings.best_of_prompts
            )
            true, wins = self._judged(answers, shifted=False)
            learned = answers.by_prompt(self._learned(policy)(answers.sampled).total)
            found = []
            for n in numbers:
                for name, proxy in (("reward model", learned), ("true reward", true)):
                    worth = {
                        "reward": best_of_n.expected_best(true, n, proxy),
                        "win_rate": best_of_n.expected_best(wins, n, proxy),
                        "learned_reward": best_of_n.expected_best(learned, n, proxy),
                        "kl_bound": np.full(len(true), best_of_n.kl_bound(n)),
                    }
                    found.append(Point({**labels, "chosen by": name, "n": n}, worth, "prompts"))
            return found

        return self._job(labels, {"n": tuple(numbers)}, points, [BEST_OF])

    def _job(
        self,
        labels: Mapping[str, Label],
        settings: Mapping[str, Any],
        points: Callable[[], list[Point]],
        methods: Sequence[str],
    ) -> Job:
        # A job is another one where a run that it needs has other settings.
        needs = {BEST_OF: ("sft", "reward"), "ppo": ("sft", "reward", "ppo")}
        names = dict.fromkeys(name for m in methods for name in needs.get(m, ("sft", m)))
        folders = {f"run {name}": self._folder(name) for name in names}
        everything = {**labels, **settings, **folders, **self._settings._asdict()}
        return Job(shown(labels), everything, points)

    def _folder(self, name: str) -> str:
        return f"{self._runs.folder(name, self._config(name)).name}, {self._steps(name)} steps"

    def _steps(self, name: str) -> int:
        return int(getattr(self._recipes, name).train.steps)

    def _config(self, name: str) -> ConfigDict:
        """The config of a run, with the folders of those that it begins from."""
        config = getattr(self._recipes, name).copy_and_resolve_references()
        config.train.log_every = 20
        if name == "sft":
            config.data.format = "sft"
            config.data.path = str(self._runs.workdir / "data" / "sft.jsonl")
            return config
        config.model.init_from = str(self._runs.folder("sft", self._config("sft")))
        if name == "ppo":
            config.reward.path = str(self._runs.folder("reward", self._config("reward")))
        return config

    def _trained(self, name: str, steps: int = 0) -> Path:
        """Trains a run and those before it."""
        if name == "sft":
            self._write_sft()
        else:
            self._trained("sft")
        if name == "ppo":
            self._trained("reward")
        config = self._config(name)
        config.train.steps = steps or config.train.steps
        return self._runs.train(name, config)

    def _write_sft(self) -> None:
        """Both responses of every pair: SFT is to know the task, not which response is better."""
        config = self._config("sft")
        path = Path(config.data.path)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = synthetic.generate(config.data.synthetic_pairs, _TRAINING)
        lines = [
            json.dumps({"prompt": pair.prompt, "completion": response})
            for pair in pairs
            for response in pair.responses
        ]
        path.write_text("".join(f"{line}\n" for line in lines))

    def _policy(self, name: str, steps: int = 0) -> Policy:
        return Policy(self._trained(name, steps))

    def _learned(self, policy: Policy) -> Rewards:
        config = self._config("ppo").reward
        self._trained("reward")
        return rewards.build(config, policy.tokenizer, max_length=policy.config.data.max_length)

    @cached_property
    def _test(self) -> dict[bool, list[Any]]:
        count = self._settings.prompts
        return {s: synthetic.generate(count, _TEST, shifted=s) for s in (False, True)}

    def _answers(
        self, policy: Policy, temperatures: Sequence[float], shifted: bool, prompts: int
    ) -> Answers:
        """Responses to the first test prompts, one for each of the temperatures."""
        pairs = self._test[shifted][:prompts]
        sampling = Sampling(
            samples=len(temperatures),
            max_new_tokens=self._settings.max_new_tokens,
            temperature=tuple(map(float, temperatures)),
        )
        texts = policy.prompts([pair.prompt for pair in pairs])
        return policy.answers(texts, sampling, seed=self._settings.seed)

    def _judged(
        self, answers: Answers, *, shifted: bool
    ) -> tuple[Float[np.ndarray, "prompts samples"], Float[np.ndarray, "prompts samples"]]:
        """The true rewards, and which responses win against the chosen one; a tie is a half."""
        sampled = answers.sampled
        true = answers.by_prompt(
            synthetic.true_rewards(list(map(str, sampled.prompts)), sampled.responses)
        )
        pairs = self._test[shifted][: len(true)]
        chosen = np.array([pair.true_rewards[0] for pair in pairs])
        return true, (1 + np.sign(np.round(true - chosen[:, None], 6))) / 2

    def _mean(
        self, policy: Policy, temperatures: Sequence[float], shifted: bool
    ) -> dict[float, dict[str, np.ndarray]]:
        """Means over the samples of a prompt, at each temperature."""
        # At temperature 0 all samples are alike.
        each = [t for t in temperatures for _ in range(self._settings.samples if t else 1)]
        answers = self._answers(policy, each, shifted, self._settings.prompts)
        true, wins = self._judged(answers, shifted=shifted)
        lengths = answers.by_prompt(answers.sampled.lengths)
        log_ratios = answers.logps - self._policy("sft").logps(answers)
        found = {}
        for temperature in temperatures:
            own = np.array(each) == temperature
            measured = {"win_rate": wins, "reward": true, "length": lengths}
            if temperature == 1:
                measured["kl"] = log_ratios
            found[temperature] = {name: x[:, own].mean(1) for name, x in measured.items()}
        lowest = found[min(temperatures)]["win_rate"]
        return {t: {**of, "fall": lowest - of["win_rate"]} for t, of in found.items()}

    def _best(
        self, policy: Policy, temperatures: Sequence[float], shifted: bool
    ) -> dict[float, dict[str, np.ndarray]]:
        """The best of many samples, as the reward model has it, at each temperature above 0."""
        n, reward = self._settings.best_of, self._learned(policy)
        found = {}
        for temperature in filter(None, temperatures):
            each = (temperature,) * n
            answers = self._answers(policy, each, shifted, self._settings.best_of_prompts)
            true, wins = self._judged(answers, shifted=shifted)
            learned = answers.by_prompt(reward(answers.sampled).total)
            best = partial(best_of_n.expected_best, n=n, proxy=learned)
            found[temperature] = {"win_rate": best(wins), "reward": best(true)}
        return found
