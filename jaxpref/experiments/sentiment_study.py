"""Controlled sentiment: begun sentences of movie reviews are to become positive ones.

The true reward is the mean log-odds of two classifiers, which were trained on one half of the
sentences. The other half trains the language model and gives the prompts; naive Bayes, fitted to
its labels, judges independently. All policies begin as the language model. The pairs, on which
some learn, are its own responses: four to a prompt, all six pairs of which the true reward labels.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jaxpref import config as config_lib, metrics, rewards
from jaxpref.data.records import read_records
from jaxpref.data.sources import imdb
from jaxpref.errors import UserError
from jaxpref.evaluation import best_of_n
from jaxpref.evaluation.ngrams import NaiveBayes
from jaxpref.experiments.points import Job, Label, Point, check_counts, shown
from jaxpref.experiments.policies import Answers, Policy, Runs
from jaxpref.methods import METHODS
from jaxpref.rewards import Sampled
from jaxpref.sampling import Sampling

# The language model, the classifiers of the true reward, the reward model of the pairs.
START, CLASSIFIER, REWARD = "start", "classifier", "reward"
CLASSIFIERS = 2
_SAMPLES_A_PROMPT = 4
# Of a run, of each of which the gradients' norms are drawn as one point.
_PARTS = 10


class Recipes(NamedTuple):
    """Where the configs of the runs come from.

    Attributes:
      prepare: from the sentences' path and a folder, writes `reward.jsonl` and `policy.jsonl`,
        halves of the sentences, `tokenizer` and `classifier_tokenizer`.
      config: from a method, or `START` or `CLASSIFIER`, to a config without paths.
    """

    prepare: Callable[[str, Path], None]
    config: Callable[[str], ConfigDict]


class Settings(NamedTuple):
    """What all runs and measurements have in common.

    Attributes:
      sentences: path of records with `text` and `label`.
      train_prompts: whose responses are compared.
      prompts: held-out prompts, on which all is measured.
      max_new_tokens: of a response.
      best_of: samples among which the best is chosen.
      seed: of the random numbers.
    """

    sentences: str
    train_prompts: int
    prompts: int
    max_new_tokens: int
    best_of: int
    seed: int


class Study:
    """Jobs that share their runs."""

    def __init__(self, recipes: Recipes, workdir: str | Path, **settings: Any):
        """Takes the recipes, the experiment's workdir, and `Settings`.

        Raises:
          UserError: there are no sentences, or a number is below 1.
        """
        self._recipes, self._runs = recipes, Runs(workdir)
        self._settings = Settings(**settings)
        numbers = ("train_prompts", "prompts", "max_new_tokens", "best_of")
        check_counts(**{name: settings[name] for name in numbers})
        if not Path(self._settings.sentences).is_file():
            raise UserError(
                f"--config.settings.sentences={self._settings.sentences}: should be a file of "
                "labelled sentences, a .jsonl.gz file of records with 'text' and 'label' (1 is "
                "positive), such as Pang and Lee's sentence polarity data."
            )
        self._data = self._runs.workdir / "data"

    def classifiers(self) -> Job:
        """How often the true reward is right about the sentences of the other half."""

        def points() -> list[Point]:
            texts, labels = self._labelled
            sampled = self._as_sampled(texts)
            right = (self._true(sampled) > 0) == labels
            naive = (self._naive.log_odds(texts) > 0) == labels
            return [
                Point({"method": "true reward"}, {"accuracy": right}, "sentences"),
                Point({"method": "naive Bayes, on its own data"}, {"accuracy": naive}, "sentences"),
            ]

        return self._job({"method": "true reward"}, {}, points)

    def policy(self, method: str, labels: Mapping[str, Label] | None = None, **knobs: Any) -> Job:
        """What a method's policy is worth on held-out prompts.

        Args:
          method: of the algorithm; `START` for the language model, "preferred_ft" for SFT on
            chosen responses.
          labels: further ones.
          knobs: of the config, with "__" for dots; `on="learned"` has methods that sample learn
            from the reward model of the pairs, otherwise from the true reward.

        Raises:
          UserError: the run's config cannot be used.
        """
        config_lib.check(self._config(method, knobs))
        known: dict[str, Label] = {"method": method, **(labels or {})}

        def points() -> list[Point]:
            folder = self._trained(method, knobs)
            values = self._worth(Policy(folder))
            return [Point(known, values, "prompts"), *self._norms(known, folder)]

        return self._job(known, {**knobs, "recipe": self._digest(method, knobs)}, points)

    def best_of(self) -> Job:
        """Best-of-N of the language model, chosen by the true reward."""

        def points() -> list[Point]:
            settings = self._settings
            answers = self._answers(self._start, settings.best_of, self._held_out)
            values = self._values(answers)
            before = self._worth_of_start["reward"]
            found = []
            for n in (2**k for k in range(1, 8) if 2**k <= settings.best_of):
                worth = {
                    name: best_of_n.expected_best(x, n, values["reward"])
                    for name, x in values.items()
                }
                worth["kl"] = np.full(len(before), best_of_n.kl_bound(n))
                worth["efficiency"] = efficiency(worth["reward"] - before, worth["kl"])
                found.append(Point({"method": "best of n", "n": n}, worth, "prompts"))
            return found

        return self._job({"method": "best of n"}, {}, points)

    def _job(
        self,
        labels: Mapping[str, Label],
        settings: Mapping[str, Any],
        points: Callable[[], list[Point]],
    ) -> Job:
        bases = {f"run {name}": self._digest(name, {}) for name in (START, CLASSIFIER, REWARD)}
        common = self._settings._replace(sentences=Path(self._settings.sentences).name)._asdict()
        return Job(shown(labels), {**labels, **settings, **bases, **common}, points)

    def _digest(self, method: str, knobs: Mapping[str, Any]) -> str:
        return self._runs.folder(method, self._config(method, knobs)).name

    def _config(self, method: str, knobs: Mapping[str, Any]) -> ConfigDict:
        """The config of a run, with all paths."""
        knobs = dict(knobs)
        learned = knobs.pop("on", "true") == "learned"
        config = self._recipes.config("sft" if method == "preferred_ft" else method)
        config.tokenizer.name = str(self._data / "tokenizer")
        if method == START:
            config.data.path = str(self._data / "policy.jsonl")
        elif method == CLASSIFIER:
            config.data.path = str(self._data / "reward.jsonl")
            config.tokenizer.name = str(self._data / "classifier_tokenizer")
        else:
            self._set_paths(config, "sft" if method == "preferred_ft" else method, learned)
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in knobs.items()})
        return config

    def _set_paths(self, config: ConfigDict, method: str, learned: bool) -> None:
        config.model.init_from = str(self._runs.folder(START, self._config(START, {})))
        pairs = self._pairs_folder
        name = "ranked" if method == "rrhf" else "pairs"
        config.data.path = str(pairs / f"{name}.jsonl")
        config.data.format = "ranked" if method == "rrhf" else "explicit"
        if METHODS[method].samples:
            config.data.path = str(pairs / "prompts.jsonl")
            config.data.format = "prompts"
            if learned:
                config.reward.path = str(self._runs.folder(REWARD, self._config(REWARD, {})))
            else:
                config.reward.mixture = tuple(
                    {"path": str(folder), "weight": 1 / CLASSIFIERS, "name": f"classifier {i}"}
                    for i, folder in enumerate(self._classifier_folders)
                )

    @property
    def _classifier_folders(self) -> list[Path]:
        return [
            self._runs.folder(CLASSIFIER, self._config(CLASSIFIER, {"seed": seed}))
            for seed in range(CLASSIFIERS)
        ]

    @property
    def _pairs_folder(self) -> Path:
        settings = self._settings
        return self._data / f"pairs-{settings.train_prompts}-{settings.max_new_tokens}"

    def _trained(self, method: str, knobs: Mapping[str, Any]) -> Path:
        """Trains a run and those before it."""
        self._prepare()
        if method not in (START, CLASSIFIER):
            self._write_pairs()
        if knobs.get("on") == "learned":
            self._trained(REWARD, {})
        return self._runs.train(method, self._config(method, knobs))

    def _prepare(self) -> None:
        if not (self._data / "classifier_tokenizer").exists():
            self._recipes.prepare(self._settings.sentences, self._data)

    @cached_property
    def _labelled(self) -> tuple[list[str], np.ndarray]:
        """The sentences of the language model's half, and whether they are positive."""
        self._prepare()
        records = [r for r, _ in read_records(str(self._data / "policy.jsonl"))]
        return [r["text"] for r in records], np.array([bool(r["label"]) for r in records])

    @cached_property
    def _prompts(self) -> list[str]:
        """First words of the language model's half, no two alike."""
        found = (str(imdb({"text": text}, "").prompt) for text in self._labelled[0])
        return list(dict.fromkeys(prompt for prompt in found if prompt))

    @property
    def _held_out(self) -> list[str]:
        settings = self._settings
        room = len(self._prompts) - settings.train_prompts
        if room < settings.prompts:
            raise UserError(
                f"there are {len(self._prompts):,} prompts, and {settings.train_prompts:,} to "
                f"train with and {settings.prompts:,} held out are asked for."
            )
        return self._prompts[-settings.prompts :]

    @cached_property
    def _naive(self) -> NaiveBayes:
        return NaiveBayes(self._labelled[0], self._labelled[1].tolist())

    @cached_property
    def _start(self) -> Policy:
        return Policy(self._trained(START, {}))

    @cached_property
    def _true(self) -> Callable[[Sampled], Float[np.ndarray, " responses"]]:
        """The true reward."""
        for seed in range(CLASSIFIERS):
            self._trained(CLASSIFIER, {"seed": seed})
        return self._reward("true")

    @cached_property
    def _learned(self) -> Callable[[Sampled], Float[np.ndarray, " responses"]]:
        """The reward model of the pairs."""
        self._trained(REWARD, {})
        return self._reward("learned")

    def _reward(self, on: str) -> Callable[[Sampled], Float[np.ndarray, " responses"]]:
        config = self._config("rloo", {"on": on})
        found = rewards.build(
            config.reward, self._start.tokenizer, max_length=config.data.max_length
        )
        return lambda sampled: found(sampled).total

    def _as_sampled(self, texts: list[str]) -> Sampled:
        """Sentences as if they had been sampled, in their two parts."""
        parts = [imdb({"text": text}, "") for text in texts]
        nothing = [np.zeros(1, np.int32)] * len(texts)
        prompts = [str(part.prompt) for part in parts]
        responses = [str(part.responses[0]) for part in parts]
        return Sampled(
            prompts, responses, nothing, nothing, np.ones(len(texts), bool), [{}] * len(texts)
        )

    def _answers(self, policy: Policy, samples: int, prompts: list[str]) -> Answers:
        sampling = Sampling(samples=samples, max_new_tokens=self._settings.max_new_tokens)
        return policy.answers(policy.prompts(prompts), sampling, seed=self._settings.seed)

    def _values(self, answers: Answers) -> dict[str, Float[np.ndarray, "prompts samples"]]:
        """What judges say of responses."""
        sampled = answers.sampled
        reward = self._true(sampled)
        texts = [f"{a}{b}" for a, b in zip(sampled.prompts, sampled.responses, strict=True)]
        naive = self._naive.log_odds(texts) > 0
        found = {
            "reward": reward,
            "learned_reward": self._learned(sampled),
            "positive": reward > 0,
            "positive, naive Bayes": naive,
            "disagreement": (reward > 0).astype(float) - naive,
            "length": sampled.lengths,
        }
        return {name: answers.by_prompt(values) for name, values in found.items()}

    def _measured(self, policy: Policy) -> dict[str, Float[np.ndarray, " prompts"]]:
        answers = self._answers(policy, 1, self._held_out)
        found = {name: x.mean(1) for name, x in self._values(answers).items()}
        return {**found, "kl": (answers.logps - self._start.logps(answers)).mean(1)}

    @cached_property
    def _worth_of_start(self) -> dict[str, Float[np.ndarray, " prompts"]]:
        return self._measured(self._start)

    def _worth(self, policy: Policy) -> dict[str, Float[np.ndarray, " prompts"]]:
        found = self._measured(policy)
        gained = found["reward"] - self._worth_of_start["reward"]
        if found["kl"].mean() > 0.01:
            found["efficiency"] = efficiency(gained, found["kl"])
        return found

    def _norms(self, labels: Mapping[str, Label], folder: Path) -> list[Point]:
        """The norms of the gradients of all steps, if they were all logged."""
        lines = metrics.read(folder / "metrics.jsonl")
        norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
        if labels["method"] not in ("reinforce", "remax"):
            return []
        # All of them for what is claimed, and parts of the run for what is drawn.
        found = [Point({**labels, "of": "steps"}, {"gradient_norm": norms}, "steps")]
        parts = np.array_split(np.arange(len(norms)), min(_PARTS, len(norms)))
        return found + [
            Point(
                {**labels, "of": "part of the steps", "step": int(part[-1]) + 1},
                {"gradient_norm": np.asarray(norms)[part]},
                "steps",
            )
            for part in parts
        ]

    def _write_pairs(self) -> None:
        """Samples from the language model, and labels all pairs by the true reward."""
        folder = self._pairs_folder
        if (folder / "pairs.jsonl").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        prompts = self._prompts[: self._settings.train_prompts]
        answers = self._answers(self._start, _SAMPLES_A_PROMPT, prompts)
        scores = answers.by_prompt(self._true(answers.sampled))
        ranked, pairs = [], []
        for place, prompt in enumerate(prompts):
            first = place * _SAMPLES_A_PROMPT
            said = answers.sampled.responses[first : first + _SAMPLES_A_PROMPT]
            # The best one first. A response without words cannot be learned from, and of two that
            # are worth the same neither is preferred.
            order = [i for i in np.argsort(-scores[place], kind="stable") if said[i].strip()]
            worth = {round(float(scores[place][i]), 4): said[i] for i in order}
            if len(worth) < 2:
                continue
            values, texts = list(worth), list(worth.values())
            ranked.append({"prompt": prompt, "responses": texts, "scores": values})
            pairs += [
                {"prompt": prompt, "chosen": better, "rejected": worse}
                for better, worse in itertools.combinations(texts, 2)
            ]
        _write(folder / "ranked.jsonl", ranked)
        _write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
        _write(folder / "pairs.jsonl", pairs)


def efficiency(
    gained: Float[np.ndarray, " prompts"], kl: Float[np.ndarray, " prompts"]
) -> Float[np.ndarray, " prompts"]:
    """The mean reward gained per root of the mean KL, as pseudo-values of the jackknife.

    On a frontier of small KL the reward grows with the root of the KL, so that policies of
    different KL can be compared. The mean of the pseudo-values is the jackknife's estimate of the
    ratio, and their standard error is that of it.

    Args:
      gained: reward of each prompt above that of the reference.
      kl: of each prompt, an estimate; its mean is above 0.
    """
    count = len(gained)

    def ratio(reward: Any, divergence: Any) -> Any:
        return reward / np.sqrt(np.maximum(divergence, 1e-9))

    whole = ratio(gained.mean(), kl.mean())
    others = ratio((gained.sum() - gained) / (count - 1), (kl.sum() - kl) / (count - 1))
    return count * whole - (count - 1) * others


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
