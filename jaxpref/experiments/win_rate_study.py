"""How often policies beat a baseline: over temperatures, over steps, on other prompts, by N.

Every run begins from one start, an SFT run. Methods that sample learn from a reward model, and
best-of-N samples from the start and takes what the reward model likes. Who says what wins is the
`baselines.Baseline`: the true reward of the generated task, or a judge.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jaxpref import config as config_lib, data, rewards
from jaxpref.evaluation import best_of_n
from jaxpref.experiments.baselines import Baseline
from jaxpref.experiments.points import Job, Label, Point, check_counts, shown
from jaxpref.experiments.policies import Answers, Policy, Runs
from jaxpref.methods import METHODS
from jaxpref.rewards import Rewards
from jaxpref.sampling import Sampling

# What the prompts are called that are as in training, and a point's method for best-of-N.
USUAL = "as in training"
BEST_OF = "best of n"


class Recipes(NamedTuple):
    """The runs of a study.

    Attributes:
      configs: by name. A name is what a point's method is called; where a run begins, and its
        reward model, are set by the study.
      start: the name of the run that the others begin from.
      reward: the name of the reward model.
      prepare: writes the data that runs read, if it is not there.
    """

    configs: Mapping[str, ConfigDict]
    start: str = "sft"
    reward: str = "reward"
    prepare: Callable[[], None] = lambda: None


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

    def __init__(
        self,
        recipes: Recipes,
        workdir: str | Path,
        baselines: Mapping[str, Baseline],
        **settings: Any,
    ):
        """Takes the runs, the experiment's workdir, baselines by their names, and `Settings`.

        Raises:
          UserError: a number is below 1, or a run's config cannot be used.
        """
        self._recipes, self._runs, self._baselines = recipes, Runs(workdir), baselines
        self._settings = Settings(**settings)
        self._prepared = False
        for name in recipes.configs:
            config_lib.check(self._config(name))
        check_counts(**{k: v for k, v in settings.items() if k != "seed"})

    def at_temperatures(
        self, method: str, temperatures: Sequence[float], *, prompts: str = USUAL, steps: int = 0
    ) -> Job:
        """How often a method wins at each temperature.

        Args:
          method: the name of a run, or `BEST_OF`.
          temperatures: of sampling.
          prompts: the name of a baseline, with whose prompts.
          steps: of the method's run; 0 for all of them.
        """
        labels: dict[str, Label] = {"method": method, "prompts": prompts, "step": steps or "all"}

        def points() -> list[Point]:
            policy = self._policy(self._recipes.start if method == BEST_OF else method, steps)
            measure = self._best if method == BEST_OF else self._mean
            return [
                Point({**labels, "temperature": temperature}, values, "prompts")
                for temperature, values in measure(policy, temperatures, prompts).items()
            ]

        settings = {"temperatures": tuple(temperatures), **self._baselines[prompts].settings}
        return self._job(labels, settings, points)

    def over_n(self, numbers: Sequence[int]) -> Job:
        """What best-of-N is worth, chosen by the reward model and by the true reward.

        Args:
          numbers: of samples; the largest is `Settings.best_of`.
        """
        labels: dict[str, Label] = {"method": BEST_OF}

        def points() -> list[Point]:
            policy = self._policy(self._recipes.start)
            answers = self._samples(policy, 1.0, USUAL)
            values = self._values(answers, USUAL)
            true, wins = values["reward"], values["win_rate"]
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

        return self._job(labels, {"n": tuple(numbers), **self._baselines[USUAL].settings}, points)

    def _job(
        self, labels: dict[str, Label], settings: Mapping[str, Any], points: Callable[[], Any]
    ) -> Job:
        # A job is another one where a run that it needs has other settings.
        method = str(labels["method"])
        needed = [self._recipes.reward] if method == BEST_OF else [*self._before(method), method]
        runs = {f"run {n}": self._folder(n) for n in (self._recipes.start, *needed)}
        return Job(
            shown(labels), {**labels, **settings, **runs, **self._settings._asdict()}, points
        )

    def _folder(self, name: str) -> str:
        config = self._config(name)
        return f"{self._runs.folder(name, config).name}, {config.train.steps} steps"

    def _before(self, name: str) -> list[str]:
        """The runs that a run needs."""
        if name == self._recipes.start:
            return []
        samples = METHODS[self._recipes.configs[name].algorithm.name].samples
        return [self._recipes.start, *([self._recipes.reward] if samples else [])]

    def _config(self, name: str) -> ConfigDict:
        """The config of a run, with the folders of those that it begins from."""
        config = self._recipes.configs[name].copy_and_resolve_references()
        folders = {
            other: str(self._runs.folder(other, self._config(other)))
            for other in self._before(name)
        }
        if self._recipes.start in folders:
            config.model.init_from = folders[self._recipes.start]
        if self._recipes.reward in folders:
            config.reward.path = folders[self._recipes.reward]
            if "critic" in config and config.critic.init_from:
                config.critic.init_from = config.reward.path
        return config

    def _trained(self, name: str, steps: int = 0) -> Path:
        """Trains a run and those before it."""
        self._prepare()
        for other in self._before(name):
            self._trained(other)
        config = self._config(name)
        config.train.steps = steps or config.train.steps
        return self._runs.train(name, config)

    def _prepare(self) -> None:
        """Writes the data, and refuses it before anything is trained."""
        if not self._prepared:
            self._recipes.prepare()
            for config in self._recipes.configs.values():
                data.check(config)
            self._prepared = True

    def _policy(self, name: str, steps: int = 0) -> Policy:
        return Policy(self._trained(name, steps))

    def _learned(self, policy: Policy) -> Rewards:
        """The reward model."""
        config = config_lib.default("rloo").reward
        config.path = str(self._trained(self._recipes.reward))
        config.dtype = self._recipes.configs[self._recipes.reward].model.dtype
        return rewards.build(config, policy.tokenizer, max_length=policy.config.data.max_length)

    def _answers(
        self, policy: Policy, temperatures: Sequence[float], prompts: str, count: int
    ) -> Answers:
        """Responses to the first test prompts, one for each of the temperatures."""
        sampling = Sampling(
            samples=len(temperatures),
            max_new_tokens=self._settings.max_new_tokens,
            temperature=tuple(map(float, temperatures)),
        )
        asked = policy.prompts(self._baselines[prompts].prompts(count))
        return policy.answers(asked, sampling, seed=self._settings.seed)

    def _samples(self, policy: Policy, temperature: float, prompts: str) -> Answers:
        """As many as best-of-N chooses from."""
        each = (temperature,) * self._settings.best_of
        return self._answers(policy, each, prompts, self._settings.best_of_prompts)

    def _values(
        self, answers: Answers, prompts: str
    ) -> dict[str, Float[np.ndarray, "prompts samples"]]:
        """What the baseline says, and the responses' lengths in tokens."""
        count, samples = answers.logps.shape
        numbers = np.repeat(np.arange(count), samples).tolist()
        found = self._baselines[prompts].values(answers.sampled, numbers)
        found = {**found, "length": answers.sampled.lengths}
        return {name: answers.by_prompt(values) for name, values in found.items()}

    def _mean(
        self, policy: Policy, temperatures: Sequence[float], prompts: str
    ) -> dict[float, dict[str, np.ndarray]]:
        """Means over the samples of a prompt, at each temperature."""
        # At temperature 0 all samples are alike.
        each = [t for t in temperatures for _ in range(self._settings.samples if t else 1)]
        answers = self._answers(policy, each, prompts, self._settings.prompts)
        values = self._values(answers, prompts)
        log_ratios = answers.logps - self._policy(self._recipes.start).logps(answers)
        found = {}
        for temperature in temperatures:
            own = np.array(each) == temperature
            measured = {**values, **({"kl": log_ratios} if temperature == 1 else {})}
            found[temperature] = {name: x[:, own].mean(1) for name, x in measured.items()}
        lowest = found[min(temperatures)]["win_rate"]
        return {t: {**of, "fall": lowest - of["win_rate"]} for t, of in found.items()}

    def _best(
        self, policy: Policy, temperatures: Sequence[float], prompts: str
    ) -> dict[float, dict[str, np.ndarray]]:
        """The best of many samples, as the reward model has it, at each temperature above 0."""
        reward, found = self._learned(policy), {}
        for temperature in filter(None, temperatures):
            answers = self._samples(policy, temperature, prompts)
            learned = answers.by_prompt(reward(answers.sampled).total)
            # A judge is asked about the best one alone.
            best = answers.choose(learned.argmax(1))
            found[temperature] = {n: x[:, 0] for n, x in self._values(best, prompts).items()}
        return found
