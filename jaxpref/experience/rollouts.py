"""Responses that the policy samples: prompts to responses, rewards, log-probs, advantages.

Prompts come from the stream at a step, tokens from (state, seed, step): nothing of a rollout is
kept, and a run that is resumed samples the same again.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxpref import processes, sampling, sharding
from jaxpref.algorithms import Online, Rollout
from jaxpref.algorithms.policy_gradient import (
    ADVANTAGES,
    BETA,
    OLD,
    REFERENCE,
    RETURNS,
    SAMPLED,
    VALUES,
)
from jaxpref.checkpoint import CRITIC
from jaxpref.experience.base import Experience
from jaxpref.experience.offline import work_of
from jaxpref.experience.parts import Asked, Packer, Parts, Prompts, make_look, say, with_sampled
from jaxpref.experience.pool import Pool
from jaxpref.interrupts import StoppedError
from jaxpref.measurements import Metric, total
from jaxpref.packing import Group, PackedBatch
from jaxpref.rewards import Moments, Sampled, Scores, shaping
from jaxpref.sampling import Generated
from jaxpref.trainable import merge
from jaxpref.workdir import AnyPath

# The numbers of `rewards.Moments` among what a run carries from step to step.
MOMENTS = ("reward_count", "reward_mean", "reward_m2")


class Rollouts:
    """The source of a method that samples."""

    def __init__(self, parts: Parts, prompts: Prompts, workdir: AnyPath):
        """Prepares what does not depend on the state."""
        online = parts.online
        self._parts, self._prompts = parts, prompts
        self._samples = parts.config.sampling.samples
        self._sampler = parts.sampler(
            parts.decoder,
            int(prompts.dataset.prompt_lengths.max()),
            greedy=online.greedy,
            samples=self._samples,
        )
        self._look = make_look(parts.policy, parts.mode, parts.critic)
        self._learned = jax.jit(partial(_learned, online, parts.mesh))
        self._packer = Packer(parts.config, parts.budget)
        self._pool = Pool(workdir / "pool.jsonl") if online.pool else None
        # Responses of a prompt that are trained on.
        self._trained = len(online.choose(np.arange(2.0))) if online.choose else self._samples
        size = parts.config.data.batch_size // online.minibatches
        self._packer.expect(batch_size=size, responses=self._trained)

    def __call__(self, step: int, state: Any, stopping: Callable[[], bool]) -> Experience | None:
        """See `Source`."""
        parts = self._parts
        clock = _Clock()
        assert self._prompts.stream is not None
        indices = self._prompts.stream.indices(step - 1)
        weights = self._sampler.prepare(merge(state.policy, parts.frozen))
        keys = sampling.prompt_keys(parts.config.seed, step, len(indices))
        try:
            said = say(self._sampler, weights, self._prompts, indices, keys, stopping)
        except StoppedError:
            return None
        # The copy is gone before gradients need its room.
        del weights
        clock.mark("generate")
        processes.beat()
        if stopping():
            return None
        sampled = self._prompts.sampled(indices, said, parts.tokenizer, range(self._samples))
        scores = parts.rewards(sampled)
        moments = Moments(*(np.float32(sharding.fetch(state.controls[n])) for n in MOMENTS))
        moments = shaping.update(moments, scores.total)
        rewards = parts.rewards.shaped(scores, sampled, moments)
        greedy = None
        if parts.online.greedy:
            last = range(self._samples, self._samples + 1)
            best = self._prompts.sampled(indices, said, parts.tokenizer, last)
            # The moments are those of what is trained on: both have the same scale.
            greedy = parts.rewards.shaped(parts.rewards(best), best, moments)
        clock.mark("reward")
        if stopping():
            return None
        table = rewards.reshape(len(indices), self._samples)
        if parts.online.choose is None:
            found = self._weighed(state, indices, said, table, greedy)
        else:
            found = self._chosen(step, indices, said, table)
        clock.mark("look")
        whole = partial(sharding.put_whole, parts.mesh)
        named = dict(zip(MOMENTS, (whole(np.float32(x)) for x in moments), strict=True))
        return found._replace(
            controls={**named, **found.controls},
            measured={**_counted(scores, sampled, table), **found.measured, **clock.metrics()},
        )

    def _asked(self, state: Any) -> Asked:
        parts = self._parts
        critic = None
        if parts.critic is not None:
            critic = merge(state.roles[CRITIC].params, parts.critic_frozen)
        own = state.reference if parts.mode.moves else parts.reference
        return Asked(merge(state.policy, parts.frozen), parts.frozen, own, critic)

    def _weighed(
        self,
        state: Any,
        indices: Sequence[int],
        said: Generated,
        rewards: Float[np.ndarray, "prompts samples"],
        greedy: Float[np.ndarray, " prompts"] | None,
    ) -> Experience:
        """All responses, with the advantages of their tokens."""
        parts = self._parts
        groups = [
            Group(self._prompts.dataset.group(index).prompt, said.responses(place)[: self._samples])
            for place, index in enumerate(indices)
        ]
        size = len(groups) // parts.online.minibatches
        packed = []
        for first in range(0, len(groups), size):
            part = slice(first, first + size)
            batch = self._packer(groups[part], batch_size=size, responses=self._trained)
            packed.append(with_sampled(batch, said.sampled_logps[part, : self._samples]))
        batches = [sharding.put_batch(parts.mesh, batch) for batch in packed]
        looked = [self._look(self._asked(state), batch) for batch in batches]
        learned = self._learned(
            batches,
            looked,
            sharding.put_whole(parts.mesh, rewards),
            None if greedy is None else sharding.put_whole(parts.mesh, greedy),
            {name: state.controls[name] for name in parts.online.controls},
        )
        ready = tuple(
            _with_tokens(batch, {**found, **extras}, learned.beta)
            for batch, found, extras in zip(batches, looked, learned.extras, strict=True)
        )
        kl = sharding.fetch(learned.metrics["objective/kl"])
        return Experience(
            ready,
            work_of(*packed, shape=batches[0].tokens.shape),
            learned.controls,
            learned.metrics,
            float(kl.values) / max(float(kl.weights), 1.0),
        )

    def _chosen(
        self,
        step: int,
        indices: Sequence[int],
        said: Generated,
        rewards: Float[np.ndarray, "prompts samples"],
    ) -> Experience:
        """Some of the responses to each prompt, or none, as if they were data."""
        parts = self._parts
        assert parts.online.choose is not None
        groups: list[Group] = []
        for place, index in enumerate(indices):
            responses, values = said.responses(place), rewards[place]
            if self._pool is not None and (kept := self._pool.best(index, step)) is not None:
                responses = [*responses, kept.response]
                values = np.append(values, np.float32(kept.reward))
            chosen = parts.online.choose(values)
            if chosen:
                prompt = self._prompts.dataset.group(index).prompt
                groups.append(Group(prompt, [responses[k] for k in chosen]))
                if self._pool is not None:
                    (k,) = chosen
                    self._pool.add(step, index, responses[k], float(values[k]))
        if self._pool is not None:
            self._pool.flush()
        packed = self._packer(groups, batch_size=len(indices), responses=self._trained)
        one = np.ones((), np.float32)
        measured = {
            "objective/scores": _sums(rewards),
            "objective/chosen_scores": _sums(rewards.max(axis=1)),
            "skipped_ties": Metric(np.asarray(len(indices) - len(groups), np.float32), one),
        }
        placed = sharding.put_batch(parts.mesh, packed)
        work = work_of(packed, shape=placed.tokens.shape)
        return Experience((placed,), work, measured=measured)


def abstract_batch(
    online: Online, look: Callable[..., Any], asked: Asked, batch: PackedBatch, mesh: Mesh
) -> PackedBatch:
    """What an update is given of a rollout: its shapes, dtypes and shardings.

    Args:
      online: the method.
      look: from `make_look`.
      asked: shapes of the parameters.
      batch: of one update, as it is packed.
      mesh: over which it is sharded.
    """
    if online.learned is None:
        return sharding.abstract_batch(mesh, batch)
    batch = dataclasses.replace(
        batch, token_extras={SAMPLED: np.zeros(batch.response.shape, np.float32)}
    )
    found = jax.eval_shape(look, asked, sharding.abstract_batch(mesh, batch))
    _, groups, samples = batch.lengths.shape
    count, one = online.minibatches, jax.ShapeDtypeStruct((), jnp.float32)
    prompts = groups * count
    learned = jax.eval_shape(
        partial(_learned, online, mesh),
        [batch] * count,
        [found] * count,
        jax.ShapeDtypeStruct((prompts, samples), jnp.float32),
        jax.ShapeDtypeStruct((prompts,), jnp.float32) if online.greedy else None,
        dict.fromkeys(online.controls, one),
    )
    ready = jax.eval_shape(_with_tokens, batch, {**found, **learned.extras[0]}, learned.beta)
    return sharding.abstract_batch(mesh, ready)


class _OnTokens(NamedTuple):
    """What `Online.learned` says, in the shape of the batches, with sums of its metrics."""

    extras: list[dict[str, Array]]
    beta: Array
    controls: dict[str, Array]
    metrics: dict[str, Metric]


def _learned(
    online: Online,
    mesh: Mesh,
    batches: Sequence[PackedBatch],
    looked: Sequence[dict[str, Array]],
    rewards: Float[Array, "prompts samples"],
    greedy: Float[Array, " prompts"] | None,
    controls: Mapping[str, Array],
) -> _OnTokens:
    def flat(batch: PackedBatch, values: Array) -> Array:
        return values.reshape(len(batch.tokens) * batch.shards, -1)

    def together(name: str) -> Array | None:
        if name not in looked[0]:
            return None
        parts = (flat(b, said[name]) for b, said in zip(batches, looked, strict=True))
        return jnp.concatenate(list(parts))

    responses = []
    for number, batch in enumerate(batches):
        own = batch.lengths.shape[1] * batch.lengths.shape[2]
        response = jnp.asarray(batch.response)
        shifted = jnp.where(response < own, response + number * own, rewards.size)
        responses.append(flat(batch, shifted))
    logps = together(OLD)
    assert logps is not None
    rollout = Rollout(
        jnp.concatenate(responses), logps, together(REFERENCE), together(VALUES), rewards, greedy
    )
    assert online.learned is not None
    learned = online.learned(rollout, controls)
    extras: list[dict[str, Array]] = [{} for _ in batches]
    for name, values in ((ADVANTAGES, learned.advantages), (RETURNS, learned.returns)):
        if values is None:
            continue
        start = 0
        for batch, of_batch in zip(batches, extras, strict=True):
            stop = start + len(batch.tokens) * batch.shards
            mine = values[start:stop].reshape(batch.response.shape)
            of_batch[name] = jax.lax.with_sharding_constraint(mine, sharding.by_row(mesh))
            start = stop
    metrics = {name: total(metric) for name, metric in learned.metrics.items()}
    return _OnTokens(extras, controls[BETA], learned.controls, metrics)


def _with_tokens(batch: PackedBatch, values: dict[str, Array], beta: Array) -> PackedBatch:
    everywhere = jnp.broadcast_to(beta, batch.lengths.shape[:2])
    return dataclasses.replace(
        batch,
        token_extras={**batch.token_extras, **values},
        extras={**batch.extras, BETA: everywhere},
    )


def _counted(
    scores: Scores, sampled: Sampled, rewards: Float[np.ndarray, "prompts samples"]
) -> dict[str, Metric]:
    """What is known of the responses before any log-prob, by TRL's names."""
    values = {
        "completions/mean_length": sampled.lengths,
        "completions/clipped_ratio": ~sampled.finished,
    }
    values |= {f"rewards/{name}": said for name, said in scores.by_name.items()}
    if rewards.shape[1] > 1:
        spread = rewards.std(axis=1, ddof=1)
        values |= {"reward_std": spread, "frac_reward_zero_std": spread == 0}
    return {name: _sums(x) for name, x in values.items()}


def _sums(values: np.ndarray) -> Metric:
    return Metric(np.asarray(np.sum(values), np.float32), np.asarray(values.size, np.float32))


class _Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        now = time.monotonic()
        self._phases[phase], self._last = now - self._last, now

    def metrics(self) -> dict[str, Metric]:
        return {
            f"perf/{phase}_seconds": Metric(
                np.asarray(seconds, np.float32), np.ones((), np.float32)
            )
            for phase, seconds in self._phases.items()
        }
