"""What policies say to held-out prompts, and what that is worth."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpref import models, sampling, sharding
from jaxpref.algorithms.policy_gradient import OLD, REFERENCE
from jaxpref.experience.parts import Asked, Packer, Parts, Prompts, make_look, say
from jaxpref.packing import Group
from jaxpref.rewards import Sampled
from jaxpref.sampling import Generated, Sampler
from jaxpref.trainable import merge

# Evaluations sample with the same noise each time, and with none that training has.
_EVALUATION = 2**31 - 1


class _Policy(NamedTuple):
    """A policy that is measured: its sampler, its parameters, and what looks at its responses."""

    sampler: Sampler
    params: Any
    look: Any


class HeldOut:
    """Measures policies on held-out prompts, one response to each."""

    def __init__(self, parts: Parts, prompts: Prompts, workdir: Path):
        """Prepares what does not depend on the state."""
        self._parts, self._prompts, self._workdir = parts, prompts, workdir
        self._longest = int(prompts.dataset.prompt_lengths.max())
        self._packer = Packer(parts.config, parts.budget)
        self._sampler = parts.sampler(parts.decoder, self._longest, greedy=False, samples=1)
        self._look = make_look(parts.policy, parts.mode)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        """What the policy says is worth; some of it is kept in the workdir.

        Before the first step other policies are measured as well, under `eval/NAME/`.
        """
        parts = self._parts
        params = merge(state.policy, parts.frozen)
        means, shown = self._measured(_Policy(self._sampler, params, self._look), state, step)
        if not jax.process_index():
            _keep_samples(self._workdir / "samples.jsonl", step, shown)
        found = {f"eval/{name}": value for name, value in means.items()}
        while parts.others:
            name, other = parts.others.popitem()
            policy = _Policy(
                parts.sampler(other.decoder, self._longest, greedy=False, samples=1),
                other.params,
                make_look(
                    models.packed(other.decoder, temperature=parts.config.sampling.temperature),
                    parts.mode,
                ),
            )
            means, _ = self._measured(policy, state, step)
            found |= {f"eval/{name}/{key}": value for key, value in means.items()}
        return found

    def _measured(
        self, policy: _Policy, state: Any, step: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Means over all prompts, and the first responses."""
        parts = self._parts
        size, count = parts.config.data.batch_size, len(self._prompts.dataset)
        weights = policy.sampler.prepare(policy.params)
        # A prompt's noise is its own, whatever the size of a batch.
        keys = sampling.prompt_keys(parts.config.seed, _EVALUATION, count)
        sums: dict[str, list[np.ndarray]] = {}
        shown: list[dict[str, Any]] = []
        for start in range(0, count, size):
            indices = [*range(start, min(start + size, count))]
            # The last prompts are filled up, so that nothing is compiled for their number.
            filled = [*indices, *[indices[0]] * (size - len(indices))]
            said = say(policy.sampler, weights, self._prompts, filled, keys[np.array(filled)])
            sampled = self._prompts.sampled(filled, said, parts.tokenizer, range(1))
            values = self._values(policy, state, filled, said, sampled)
            for name, of_name in values.items():
                sums.setdefault(name, []).append(of_name[: len(indices)])
            room = min(len(indices), parts.config.sampling.shown - len(shown))
            shown += [_shown(step, sampled, values, place) for place in range(room)]
        return {name: float(np.concatenate(xs).mean()) for name, xs in sums.items()}, shown

    def _values(
        self,
        policy: _Policy,
        state: Any,
        indices: Sequence[int],
        said: Generated,
        sampled: Sampled,
    ) -> dict[str, np.ndarray]:
        """What is known of one response to each prompt."""
        parts = self._parts
        scores = parts.rewards(sampled)
        groups = [
            Group(self._prompts.dataset.group(index).prompt, said.responses(place))
            for place, index in enumerate(indices)
        ]
        packed = self._packer(groups, batch_size=len(groups), responses=1)
        own = state.reference if parts.mode.moves else parts.reference
        asked = Asked(policy.params, parts.frozen, own)
        looked = sharding.fetch(policy.look(asked, sharding.put_batch(parts.mesh, packed)))
        ratios = looked[OLD] - looked.get(REFERENCE, looked[OLD])
        kl = np.bincount(packed.response.ravel(), ratios.ravel(), len(groups) + 1)
        values = {
            "objective/scores": scores.total,
            "objective/kl": kl[: len(groups)],
            "completions/length": sampled.lengths,
            "completions/clipped_ratio": ~sampled.finished,
        }
        if len(scores.by_name) > 1:
            values |= {f"rewards/{name}": said for name, said in scores.by_name.items()}
        if parts.true_rewards is not None:
            values["true_reward"] = np.asarray(
                parts.true_rewards(prompts=sampled.prompts, completions=sampled.responses)
            )
        return {name: np.asarray(value, np.float64) for name, value in values.items()}


def _shown(
    step: int, sampled: Sampled, values: Mapping[str, np.ndarray], place: int
) -> dict[str, Any]:
    numbers = {name: round(float(value[place]), 4) for name, value in values.items()}
    prompt, response = sampled.prompts[place], sampled.responses[place]
    return {"step": step, "prompt": prompt, "response": response, **numbers}


def _keep_samples(path: Path, step: int, shown: Sequence[Mapping[str, Any]]) -> None:
    """Adds the samples of a step, in place of those of a run that has died after it."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [text for text in texts if json.loads(text)["step"] < step]
    lines = [*kept, *(json.dumps(line, ensure_ascii=False) for line in shown)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
