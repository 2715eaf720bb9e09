"""Responses that the policy samples: prompts to responses, rewards, log-probs, advantages.

Prompts come from the stream at a step, tokens from (state, seed, step): nothing of a rollout is
kept, and a run that is resumed samples the same again.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import data as data_lib, packing, sampling, sharding
from jaxpref.algorithms import Online, Rollout, token_logps, token_values
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
from jaxpref.data import BatchStream, TokenizedDataset
from jaxpref.data.chat import Chat
from jaxpref.errors import UserError
from jaxpref.experience.base import Experience
from jaxpref.experience.offline import work_of
from jaxpref.experience.pool import Pool
from jaxpref.measurements import Metric, total
from jaxpref.models import Decoder
from jaxpref.models.protocol import Model
from jaxpref.packing import Budget, Group, PackedBatch
from jaxpref.reference.modes import Mode
from jaxpref.rewards import Moments, Rewards, Sampled, Scores, shaping
from jaxpref.sampling import Generated, Sampler, Sampling
from jaxpref.tokenizer import spoken
from jaxpref.trainable import merge

# The numbers of `rewards.Moments` among what a run carries from step to step.
MOMENTS = ("reward_count", "reward_mean", "reward_m2")
# Evaluations sample with the same noise each time, and with none that training has.
_EVALUATION = 2**31 - 1


class Prompts(NamedTuple):
    """Prompts of one side of the data.

    Attributes:
      dataset: their token ids.
      stream: which of them each step takes; None for those that are held out.
    """

    dataset: TokenizedDataset
    stream: BatchStream | None

    def sampled(
        self, indices: Sequence[int], said: Generated, tokenizer: Any, samples: range
    ) -> Sampled:
        """The responses of these samples to the prompts of these indices, for rewards."""
        prompts, responses, prompt_ids, response_ids, finished, records = [], [], [], [], [], []
        for place, index in enumerate(indices):
            example, ids = self.dataset.examples[index], self.dataset.group(index).prompt
            prompt = example.prompt
            each = said.responses(place)
            for k in samples:
                stopped = bool(said.stopped[place, k])
                prompts.append(list(prompt.messages) if isinstance(prompt, Chat) else prompt or "")
                responses.append(spoken(tokenizer, each[k], stopped))
                prompt_ids.append(ids)
                response_ids.append(each[k])
                finished.append(stopped)
                records.append(example.record)
        return Sampled(prompts, responses, prompt_ids, response_ids, np.array(finished), records)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What rollouts are made of.

    Attributes:
      config: a checked config of a method that samples.
      online: the method.
      decoder: the policy's.
      policy: the same as a function of a packed batch, at the temperature of sampling.
      critic: the critic's; None without one.
      frozen: the policy's parameters that are not trained.
      critic_frozen: the critic's.
      mode: how the reference gives log-probs.
      reference: its parameters, where they do not move.
      rewards: of responses.
      true_rewards: of a response's text to a prompt's, where they are known.
      tokenizer: the policy's.
      mesh: over which all is sharded.
      budget: the shape of a row.
    """

    config: ConfigDict
    online: Online
    decoder: Decoder
    policy: Model
    critic: Model | None
    frozen: Any
    critic_frozen: Any
    mode: Mode
    reference: Any
    rewards: Rewards
    true_rewards: Callable[..., Sequence[float]] | None
    tokenizer: Any
    mesh: Mesh
    budget: Budget


class Rollouts:
    """The source of a method that samples."""

    def __init__(self, parts: Parts, train: Prompts, held_out: Prompts | None, workdir: Path):
        """Prepares what does not depend on the state."""
        self._parts, self._train, self._held_out = parts, train, held_out
        self._workdir = workdir
        knobs, online = parts.config.sampling, parts.online
        self._samples = knobs.samples
        temperatures = (float(knobs.temperature),) * knobs.samples
        stops = dict.fromkeys([*data_lib.stop_ids(parts.tokenizer), *knobs.stop_token_ids])
        settings = Sampling(
            samples=knobs.samples + online.greedy,
            max_new_tokens=knobs.max_new_tokens,
            stops=tuple(stops),
            temperature=(*temperatures, 0.0) if online.greedy else temperatures,
            top_k=knobs.top_k,
            top_p=knobs.top_p,
            min_p=knobs.min_p,
            cache_dtype=None if knobs.cache_dtype == "auto" else knobs.cache_dtype,
        )
        shapes: dict[str, Any] = {
            "mesh": parts.mesh,
            "at_once": knobs.at_once,
            "prompt_length": self._longest_prompt(),
        }
        self._sampler = Sampler(parts.decoder, settings, **shapes)
        alone = settings._replace(samples=1, temperature=float(knobs.temperature))
        self._one = Sampler(parts.decoder, alone, **shapes)
        self._look = jax.jit(partial(_look, parts))
        self._learned = jax.jit(partial(_learned, online))
        self._pool = Pool(workdir / "pool.jsonl") if online.pool else None
        # Responses of a prompt that are trained on.
        self._trained = len(online.choose(np.arange(2.0))) if online.choose else self._samples
        shape = parts.config.data.batch_size // online.minibatches, self._trained
        self._micro_batches = {shape: _most_micro_batches(parts, *shape)}

    def _longest_prompt(self) -> int:
        sides = [self._train, *([self._held_out] if self._held_out else [])]
        return max(int(side.dataset.prompt_lengths.max()) for side in sides)

    def __call__(self, step: int, state: Any, stopping: Callable[[], bool]) -> Experience | None:
        """See `Source`."""
        parts = self._parts
        clock = _Clock()
        assert self._train.stream is not None
        indices = self._train.stream.indices(step - 1)
        said = self._said(self._sampler, state, self._train, indices, step)
        clock.mark("generate")
        if stopping():
            return None
        sampled = self._train.sampled(indices, said, parts.tokenizer, range(self._samples))
        scores = parts.rewards(sampled)
        moments = Moments(*(np.float32(sharding.fetch(state.controls[n])) for n in MOMENTS))
        moments = shaping.update(moments, scores.total)
        rewards = parts.rewards.shaped(scores, sampled, moments)
        greedy = None
        if parts.online.greedy:
            last = range(self._samples, self._samples + 1)
            best = self._train.sampled(indices, said, parts.tokenizer, last)
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
        named = dict(zip(MOMENTS, (jnp.float32(x) for x in moments), strict=True))
        return found._replace(
            controls={**named, **found.controls},
            measured={**_counted(scores, sampled, table), **found.measured, **clock.metrics()},
        )

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
            Group(self._train.dataset.group(index).prompt, said.responses(place)[: self._samples])
            for place, index in enumerate(indices)
        ]
        size = len(groups) // parts.online.minibatches
        packed = [self._packed(groups[i : i + size], said, i) for i in range(0, len(groups), size)]
        batches = [sharding.put_batch(parts.mesh, batch) for batch in packed]
        looked = [self._looked(state, batch) for batch in batches]
        learned = self._learned(
            batches,
            looked,
            jnp.asarray(rewards),
            None if greedy is None else jnp.asarray(greedy),
            {name: state.controls[name] for name in parts.online.controls},
        )
        ready = tuple(
            _with_tokens(batch, {**found, **extras}, learned.beta)
            for batch, found, extras in zip(batches, looked, learned.extras, strict=True)
        )
        kl = sharding.fetch(learned.metrics["objective/kl"])
        return Experience(
            ready,
            work_of(*packed),
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
                prompt = self._train.dataset.group(index).prompt
                groups.append(Group(prompt, [responses[k] for k in chosen]))
                if self._pool is not None:
                    (k,) = chosen
                    self._pool.add(step, index, responses[k], float(values[k]))
        if self._pool is not None:
            self._pool.flush()
        packed = self._in_micro_batches(groups, len(indices), self._trained)
        one = np.ones((), np.float32)
        measured = {
            "objective/scores": _sums(rewards),
            "objective/chosen_scores": _sums(rewards.max(axis=1)),
            "skipped_ties": Metric(np.asarray(len(indices) - len(groups), np.float32), one),
        }
        return Experience(
            (sharding.put_batch(parts.mesh, packed),), work_of(packed), measured=measured
        )

    def _said(
        self, sampler: Sampler, state: Any, prompts: Prompts, indices: Sequence[int], step: int
    ) -> Generated:
        weights = sampler.prepare(merge(state.policy, self._parts.frozen))
        keys = sampling.prompt_keys(self._parts.config.seed, step, len(indices))
        return sampler(weights, [prompts.dataset.group(i).prompt for i in indices], keys)

    def _looked(self, state: Any, batch: PackedBatch) -> dict[str, Array]:
        parts = self._parts
        return self._look(state, parts.reference, parts.frozen, parts.critic_frozen, batch)

    def _packed(self, groups: Sequence[Group], said: Generated, first: int) -> PackedBatch:
        """A minibatch, with what the sampler said of each token."""
        samples = len(groups[0].responses)
        batch = self._in_micro_batches(groups, len(groups), samples)
        response = np.asarray(batch.response)
        index = np.stack(
            [
                np.asarray(packing.index_in_response(jax.tree.map(lambda x, i=i: x[i], batch)))
                for i in range(len(batch.tokens))
            ]
        )
        here = response < len(groups) * samples
        logps = said.sampled_logps[first : first + len(groups), :samples]
        logps = logps.reshape(-1, logps.shape[-1])
        of_tokens = logps[np.where(here, response, 0), np.where(here, index, 0)]
        sampled = np.where(here, of_tokens, 0).astype(np.float32)
        return dataclasses.replace(batch, token_extras={SAMPLED: sampled})

    def _in_micro_batches(
        self, groups: Sequence[Group], batch_size: int, responses: int
    ) -> PackedBatch:
        """Groups in micro-batches of the one shape that is compiled for this many of them."""
        shape = batch_size, responses
        if shape not in self._micro_batches:
            self._micro_batches[shape] = _most_micro_batches(self._parts, *shape)
        # Should there be more than were expected, they are compiled for once more. The next step
        # has no more than before, as in a run that is resumed there.
        return packing.pack_micro_batches(
            groups,
            self._parts.budget,
            rows=self._parts.config.sampling.rows,
            micro_batches=self._micro_batches[shape],
            responses=responses,
            batch_size=batch_size,
        )

    def evaluate(self, step: int, state: Any) -> dict[str, float]:
        """What the policy says to held-out prompts is worth; some of it is kept in the workdir."""
        parts, held_out = self._parts, self._held_out
        if held_out is None:
            return {}
        size = parts.config.data.batch_size
        sums: dict[str, list[np.ndarray]] = {}
        shown: list[dict[str, Any]] = []
        count = len(held_out.dataset)
        for start in range(0, count, size):
            indices = [*range(start, min(start + size, count))]
            # The last prompts are filled up, so that nothing is compiled for their number.
            filled = [*indices, *[indices[0]] * (size - len(indices))]
            said = self._said(self._one, state, held_out, filled, _EVALUATION - start)
            sampled = held_out.sampled(filled, said, parts.tokenizer, range(1))
            values = self._values(state, held_out, filled, said, sampled)
            for name, of_name in values.items():
                sums.setdefault(name, []).append(of_name[: len(indices)])
            room = min(len(indices), parts.config.sampling.shown - len(shown))
            shown += [_shown(step, sampled, values, place) for place in range(room)]
        if not jax.process_index():
            _keep_samples(self._workdir / "samples.jsonl", step, shown)
        means = {name: float(np.concatenate(parts).mean()) for name, parts in sums.items()}
        return {f"eval/{name}": value for name, value in means.items()}

    def _values(
        self,
        state: Any,
        prompts: Prompts,
        indices: Sequence[int],
        said: Generated,
        sampled: Sampled,
    ) -> dict[str, np.ndarray]:
        """What is known of one response to each prompt."""
        parts = self._parts
        scores = parts.rewards(sampled)
        groups = [
            Group(prompts.dataset.group(index).prompt, said.responses(place)[:1])
            for place, index in enumerate(indices)
        ]
        batch = sharding.put_batch(parts.mesh, self._packed(groups, said, 0))
        looked = sharding.fetch(self._looked(state, batch))
        response = np.asarray(sharding.fetch(batch.response))
        ratios = looked[OLD] - looked.get(REFERENCE, looked[OLD])
        kl = np.bincount(response.ravel(), ratios.ravel(), len(groups) + 1)[: len(groups)]
        values = {
            "objective/scores": scores.total,
            "objective/kl": kl,
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


def _look(
    parts: Parts,
    state: Any,
    held: Any,
    frozen: Any,
    critic_frozen: Any,
    batch: PackedBatch,
) -> dict[str, Array]:
    """Log-probs of policy and reference and the critic's values, of every scored token."""
    params = merge(state.policy, frozen)
    own = state.reference if parts.mode.moves else held

    def look(micro: PackedBatch) -> dict[str, Array]:
        found = {OLD: token_logps(parts.policy(params, micro), micro)}
        reference = parts.mode.logps(token_logps, own, frozen, micro)
        if reference is not None:
            found[REFERENCE] = reference
        if parts.critic is not None:
            critic = merge(state.roles[CRITIC].params, critic_frozen)
            found[VALUES] = token_values(parts.critic(critic, micro), micro)
        return found

    first = jax.tree.map(lambda x: x[0], batch)
    count = (jnp.asarray(batch.lengths) > 0).any(axis=(1, 2)).sum()
    shapes = jax.eval_shape(look, first)
    zeros = jax.tree.map(lambda x: jnp.zeros((len(batch.tokens), *x.shape), x.dtype), shapes)

    def step(index: Array, found: dict[str, Array]) -> dict[str, Array]:
        said = look(jax.tree.map(lambda x: x[index], batch))
        return jax.tree.map(lambda all, one: all.at[index].set(one), found, said)

    return jax.lax.fori_loop(0, count, step, zeros)


class _OnTokens(NamedTuple):
    """What `Online.learned` says, in the shape of the batches, with sums of its metrics."""

    extras: list[dict[str, Array]]
    beta: Array
    controls: dict[str, Array]
    metrics: dict[str, Metric]


def _learned(
    online: Online,
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
            of_batch[name] = values[start:stop].reshape(batch.response.shape)
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


def budget_of(config: ConfigDict, mesh: Mesh) -> Budget:
    """The shape of a row for responses that are yet to be sampled.

    The table of scored positions has the share that the longest prompt with all of its responses
    would have of a row, or as much as one response needs if that is more: more would be computed
    in vain for rows with long prompts, less would leave rows with short ones half empty.
    """
    row = config.data.row_length or config.data.max_length
    longest = config.sampling.max_new_tokens
    responses = longest * config.sampling.samples
    share = responses / (config.data.max_prompt_length + responses)
    scored = config.data.scored_length or min(max(int(share * row), longest), row)
    return Budget(row, scored, sharding.batch_shards(mesh))


def _most_micro_batches(parts: Parts, groups: int, responses: int) -> int:
    """As many as the longest prompts with the longest responses need, and one more.

    Raises:
      UserError: one of these does not fit a micro-batch.
    """
    config = parts.config
    longest = [config.sampling.max_new_tokens] * responses
    try:
        plans = packing.plan_micro_batches(
            [config.data.max_prompt_length] * groups,
            [longest] * groups,
            parts.budget,
            config.sampling.rows,
        )
    except ValueError as error:
        raise UserError(
            f"sampling.rows is {config.sampling.rows}, which the longest prompts with the longest "
            f"responses do not fit: {error}"
        ) from error
    return len(plans) + 1


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
