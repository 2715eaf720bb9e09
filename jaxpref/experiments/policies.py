"""Runs of an experiment, and what their policies say to its prompts."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from jaxpref import config as config_lib, data as data_lib, train, weights
from jaxpref.algorithms import response_logps
from jaxpref.data.chat import Chat
from jaxpref.data.examples import Example
from jaxpref.errors import UserError
from jaxpref.experience.parts import Prompts
from jaxpref.models import packed
from jaxpref.packing import Group, PackedBatch
from jaxpref.rewards import Sampled, Scorer
from jaxpref.sampling import Sampler, Sampling, prompt_keys
from jaxpref.terminal import console
from jaxpref.workdir import as_folder

# Rows whose log-probs are computed at a time, and responses that are sampled at a time.
_ROWS, _AT_ONCE = 16, 1_024
# In a run's folder, with the steps that were asked for: the run has them.
_DONE = "done"


class Runs:
    """The runs of an experiment, each in a folder of its own.

    A folder is named by the run and by a digest of its config, so that a run with other settings is
    another run.
    """

    def __init__(self, workdir: str | Path):
        """Takes the experiment's workdir."""
        self.workdir = as_folder(workdir, "--workdir").resolve()

    def folder(self, name: str, config: ConfigDict) -> Path:
        """Where a run is, or will be.

        With a constant learning rate that does not depend on its steps: it may be trained up to
        some, be measured, and go on.
        """
        settings = {key: str(value) for key, value in config_lib.flatten(config)}
        if config.optimizer.schedule == "constant":
            del settings["train.steps"]
        text = json.dumps(settings, sort_keys=True).replace(str(self.workdir), "")
        return self.workdir / "runs" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def train(self, name: str, config: ConfigDict) -> Path:
        """Trains a run up to its steps, unless it has them already, and says where it is.

        Raises:
          UserError: the run has more steps already, or cannot be trained.
          KeyboardInterrupt: interrupted; the state was saved.
        """
        folder, steps = self.folder(name, config), config.train.steps
        # A run of epochs knows its steps only once its data is there, so what is done is written.
        done = folder / _DONE
        if done.exists() and done.read_text() == str(steps):
            return folder
        console.print(f"{folder.name}: {config.algorithm.name}")
        signalled = train.run(config, folder)
        done.write_text(str(steps))
        if signalled:
            raise KeyboardInterrupt
        return folder


class Answers(NamedTuple):
    """What a policy says to prompts.

    Attributes:
      sampled: the responses, those to one prompt after each other.
      groups: prompts with their responses.
      logps: of the responses under the policy, at temperature 1, in nats.
    """

    sampled: Sampled
    groups: list[Group]
    logps: Float[np.ndarray, "prompts samples"]

    def by_prompt(self, values: Any) -> Float[np.ndarray, "prompts samples"]:
        """One number a response, by prompts."""
        return np.asarray(values, float).reshape(self.logps.shape)

    def choose(self, samples: Int[np.ndarray, " prompts"]) -> "Answers":
        """One sample of each prompt alone."""
        prompts, count = self.logps.shape
        places = (np.arange(prompts) * count + samples).tolist()
        groups = [
            group._replace(responses=(group.responses[k],))
            for group, k in zip(self.groups, samples.tolist(), strict=True)
        ]
        return Answers(
            self.sampled.take(places), groups, self.logps[np.arange(prompts), samples, None]
        )


class Policy(Scorer):
    """A finished run's language model; what it scores responses by are their log-probs."""

    def __init__(self, workdir: Path):
        """Loads it.

        Raises:
          UserError: the run is none of a language model, or has no checkpoint.
        """
        config = weights.config_of(workdir)
        if config is None:
            raise UserError(f"{workdir}: is no workdir of a run.")
        super().__init__(workdir, config, 0, "", None)
        self._params = self.load()
        model = packed(self.opened.model)

        @jax.jit
        def logps(params: Any, batch: PackedBatch) -> Float[Array, "groups responses"]:
            whole = jax.tree.map(lambda x: x[0], batch)
            return response_logps(model(params, whole), whole)

        self._logps = logps

    def load(self, dtype: str = "float32") -> Any:
        """See `Scorer`."""
        return weights.load_finished(self.workdir, self.opened, self.mesh, dtype)

    def rewards(self, params: Any, batch: PackedBatch) -> Float[Array, "groups responses"]:
        """See `Scorer`."""
        return self._logps(params, batch)

    def prompts(self, asked: Sequence[str | Chat]) -> Prompts:
        """Texts and conversations as prompts for `answers`, with this policy's tokenizer.

        Raises:
          UserError: one is too long, and `data.on_long_prompt` of the run does not truncate it.
        """
        examples = [Example(prompt, (), where=f"prompt {i}") for i, prompt in enumerate(asked)]
        limits = data_lib.limits_of(self.config, self.tokenizer)
        if limits.on_long_prompt == "skip":
            # All policies are to answer the same prompts.
            limits = dataclasses.replace(limits, on_long_prompt="error")
        found = data_lib.tokenize(examples, self.tokenizer, limits)
        return Prompts(dataclasses.replace(found, examples=examples), None)

    def answers(self, prompts: Prompts, sampling: Sampling, *, seed: int = 0) -> Answers:
        """Samples responses to prompts; the same seed gives the same noise to every policy.

        Args:
          prompts: from `prompts`, of a policy with the same tokenizer.
          sampling: how to sample; its stops are the tokenizer's.
          seed: of the random numbers.
        """
        count = len(prompts.dataset)
        ids = [prompts.dataset.group(i).prompt for i in range(count)]
        sampler = Sampler(
            self.opened.model,
            sampling._replace(stops=tuple(data_lib.stop_ids(self.tokenizer))),
            mesh=self.mesh if self.mesh.size > 1 else None,
            at_once=max(_AT_ONCE // sampling.samples, 1),
            prompt_length=max(map(len, ids)),
        )
        said = sampler(sampler.prepare(self._params), ids, prompt_keys(seed, 0, count))
        sampled = prompts.sampled(range(count), said, self.tokenizer, range(sampling.samples))
        groups = [Group(ids[place], said.responses(place)) for place in range(count)]
        return Answers(sampled, groups, np.asarray(said.logps, float).sum(-1))

    def logps(self, answers: Answers) -> Float[np.ndarray, "prompts samples"]:
        """Log-probs of responses, of whomever they are, at temperature 1, in nats."""
        return answers.by_prompt(self.score(self._params, answers.groups, rows=_ROWS))
