"""What policies say to held-out prompts, and what that is worth."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxpref import models, processes, sampling, sharding, workdir as workdir_lib
from jaxpref.algorithms.policy_gradient import OLD, REFERENCE
from jaxpref.data.chat import Message
from jaxpref.experience.parts import Asked, Packer, Prompts, SamplingParts, make_look, say
from jaxpref.models import Decoder
from jaxpref.packing import Group
from jaxpref.reference.modes import Free
from jaxpref.rewards import Sampled
from jaxpref.sampling import Generated, Sampler
from jaxpref.trainable import merge
from jaxpref.workdir import AnyPath

# Evaluations sample with the same noise each time, and with none that training has.
_EVALUATION = 2**31 - 1
# Names among what is known of a response; the KL is that to the reference, where there is one.
SCORES, KL, LENGTH = "objective/scores", "objective/kl", "completions/length"


class Other(NamedTuple):
    """Another policy than the one that is trained.

    Attributes:
      decoder: its model.
      params: of the model.
    """

    decoder: Decoder
    params: Any


class Said(NamedTuple):
    """What a policy has said to held-out prompts, one response each.

    Attributes:
      prompts: texts, or lists of messages.
      responses: texts, without the token that ended them.
      response_ids: their token ids, with the token that ended them.
      values: what is known of each response, by name.
    """

    prompts: Sequence[str | Sequence[Message]]
    responses: Sequence[str]
    response_ids: Sequence[Int[np.ndarray, " _"]]
    values: Mapping[str, Float[np.ndarray, " prompts"]]

    def means(self, prefix: str) -> dict[str, float]:
        """The mean of each value over the prompts, under `PREFIX/NAME`."""
        return {f"{prefix}/{name}": float(values.mean()) for name, values in self.values.items()}


class _Policy(NamedTuple):
    """A policy that is measured.

    Attributes:
      sampler: samples from it.
      params: its parameters.
      look: says log-probs of its responses, see `make_look`; None where they are not asked for.
    """

    sampler: Sampler
    params: Any
    look: Any


class HeldOut:
    """Lets policies answer held-out prompts, and says what is known of the responses."""

    def __init__(self, parts: SamplingParts, prompts: Prompts, workdir: AnyPath):
        """Prepares what does not depend on the state."""
        self._parts, self._prompts, self._workdir = parts, prompts, workdir
        self._longest = int(prompts.dataset.prompt_lengths.max(initial=1))
        self._packer = Packer(parts.config, parts.budget)
        self._sampler = parts.sampler(parts.decoder, self._longest, greedy=False, samples=1)
        self._look = make_look(parts.policy, parts.mode)

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self._prompts.dataset)

    @property
    def rewarded(self) -> bool:
        """Whether the responses have rewards."""
        return self._parts.rewards is not None

    def said(self, step: int, state: Any, stopping: Callable[[], bool] = lambda: False) -> Said:
        """What the run's policy says; some of it is kept in the workdir.

        Raises:
          StoppedError: `stopping` has said so.
        """
        params = merge(state.policy, self._parts.frozen)
        policy = _Policy(self._sampler, params, self._look)
        said = self._said(policy, state, len(self), stopping)
        if not jax.process_index():
            shown = self._parts.config.sampling.shown
            _keep_shown(self._workdir / "samples.jsonl", step, said, min(shown, len(self)))
        return said

    def said_by(self, other: Other, state: Any) -> Said:
        """What another policy says, with its KL to this run's reference."""
        temperature = self._parts.config.sampling.temperature
        policy = models.packed(other.decoder, temperature=temperature)
        look = make_look(policy, self._parts.mode)
        return self._said(self._of(other)._replace(look=look), state, len(self))

    def scored(self, other: Other, state: Any, prompts: int) -> Said:
        """What another policy says to the first prompts, without its KL."""
        return self._said(self._of(other), state, prompts)

    def _of(self, other: Other) -> _Policy:
        sampler = self._parts.sampler(other.decoder, self._longest, greedy=False, samples=1)
        return _Policy(sampler, other.params, None)

    def _said(
        self,
        policy: _Policy,
        state: Any,
        count: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Said:
        parts = self._parts
        size = min(parts.config.data.batch_size, len(self))
        weights = policy.sampler.prepare(policy.params)
        # A prompt's noise is its own, whatever the size of a batch.
        keys = sampling.prompt_keys(parts.config.seed, _EVALUATION, count)
        prompts: list[Any] = []
        responses: list[str] = []
        response_ids: list[np.ndarray] = []
        values: dict[str, list[np.ndarray]] = {}
        for start in range(0, count, size):
            processes.beat()
            indices = [*range(start, min(start + size, count))]
            # The last prompts are filled up, so that nothing is compiled for their number.
            filled = [*indices, *[indices[0]] * (size - len(indices))]
            own = keys[np.array(filled)]
            said = say(policy.sampler, weights, self._prompts, filled, own, stopping)
            sampled = self._prompts.sampled(filled, said, parts.tokenizer, range(1))
            real = slice(len(indices))
            prompts += sampled.prompts[real]
            responses += sampled.responses[real]
            response_ids += sampled.response_ids[real]
            known = {**self._worth(sampled), **self._looked(policy, state, filled, said)}
            for name, of_name in known.items():
                values.setdefault(name, []).append(np.asarray(of_name, np.float64)[real])
        joined = {name: np.concatenate(xs) for name, xs in values.items()}
        return Said(prompts, responses, response_ids, joined)

    def _worth(self, sampled: Sampled) -> dict[str, np.ndarray]:
        """What is known of responses without any log-prob."""
        parts = self._parts
        values: dict[str, np.ndarray] = {}
        if parts.rewards is not None:
            scores = parts.rewards(sampled)
            values[SCORES] = scores.total
            if len(scores.by_name) > 1:
                values |= {f"rewards/{name}": said for name, said in scores.by_name.items()}
        if parts.true_rewards is not None:
            values["true_reward"] = np.asarray(
                parts.true_rewards(prompts=sampled.prompts, completions=sampled.responses)
            )
        return {**values, LENGTH: sampled.lengths, "completions/clipped_ratio": ~sampled.finished}

    def _looked(
        self, policy: _Policy, state: Any, indices: Sequence[int], said: Generated
    ) -> dict[str, np.ndarray]:
        """The KL of one response to each prompt, where there is a reference."""
        parts = self._parts
        if policy.look is None or isinstance(parts.mode, Free):
            return {}
        groups = [
            Group(self._prompts.dataset.group(index).prompt, said.responses(place))
            for place, index in enumerate(indices)
        ]
        packed = self._packer(groups, batch_size=len(groups), responses=1)
        batch = sharding.put_batch(parts.mesh, packed)
        own = state.reference if parts.mode.moves else parts.reference
        asked = Asked(policy.params, parts.frozen, own)
        looked, response = sharding.fetch((policy.look(asked, batch), batch.response))
        ratios = looked[OLD] - looked[REFERENCE]
        kl = np.bincount(response.ravel(), ratios.ravel(), len(groups) + 1)
        return {KL: kl[: len(groups)]}


def _keep_shown(path: AnyPath, step: int, said: Said, count: int) -> None:
    """Adds the first responses of a step, in place of those of a run that has died after it."""
    kept = [text for text in workdir_lib.read_lines(path) if json.loads(text)["step"] < step]
    shown = [_shown(step, said, place) for place in range(count)]
    write_lines(path, [*kept, *(json.dumps(line, ensure_ascii=False) for line in shown)])


def _shown(step: int, said: Said, place: int) -> dict[str, Any]:
    numbers = {name: round(float(of_name[place]), 4) for name, of_name in said.values.items()}
    response = {"prompt": said.prompts[place], "response": said.responses[place]}
    return {"step": step, **response, **numbers}


def write_lines(path: AnyPath, lines: Sequence[str]) -> None:
    """Writes a file so that it is there whole or not at all."""
    workdir_lib.write(path, "".join(f"{line}\n" for line in lines))
