"""What rollouts and what is sampled for held-out prompts have in common."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from jaxpref import config as config_lib, data as data_lib, models, packing, sharding
from jaxpref.algorithms import Online, token_logps, token_values
from jaxpref.algorithms.policy_gradient import OLD, REFERENCE, SAMPLED, VALUES
from jaxpref.data import BatchStream, TokenizedDataset
from jaxpref.data.chat import Chat
from jaxpref.errors import UserError
from jaxpref.logprobs import LMHead
from jaxpref.models import Decoder
from jaxpref.models.protocol import Model, ModelOutput
from jaxpref.packing import Budget, Group, PackedBatch, Shape
from jaxpref.reference.modes import Mode
from jaxpref.rewards import Rewards, Sampled
from jaxpref.sampling import Generated, Sampler, Sampling
from jaxpref.tokenizer import decode


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
                said_ids = each[k][:-1] if stopped else each[k]
                responses.append(decode(tokenizer, said_ids.tolist()))
                prompt_ids.append(ids)
                response_ids.append(each[k])
                finished.append(stopped)
                records.append(example.record)
        return Sampled(prompts, responses, prompt_ids, response_ids, np.array(finished), records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParts:
    """What it takes to sample responses, and to say what they are worth.

    Attributes:
      config: a checked config.
      decoder: the policy's.
      policy: the same as a function of a packed batch, at the temperature of sampling.
      frozen: the policy's parameters that are not trained.
      mode: how the reference gives log-probs.
      reference: its parameters, where they do not move.
      rewards: of responses; None where no reward is given.
      true_rewards: of a response's text to a prompt's, where they are known.
      tokenizer: the policy's.
      mesh: over which all is sharded.
      budget: the shape of a row.
    """

    config: ConfigDict
    decoder: Decoder
    policy: Model
    frozen: Any
    mode: Mode
    reference: Any
    rewards: Rewards | None
    true_rewards: Callable[..., Sequence[float]] | None
    tokenizer: Any
    mesh: Mesh
    budget: Budget

    def sampler(
        self, decoder: Decoder, prompt_length: int, *, greedy: bool, samples: int
    ) -> Sampler:
        """Samples from a model as the config says, see `make_sampler`."""
        return make_sampler(
            self.config,
            self.tokenizer,
            self.mesh,
            decoder,
            prompt_length,
            greedy=greedy,
            samples=samples,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(SamplingParts):
    """What rollouts are made of.

    Attributes:
      online: the method.
      critic: the critic's model; None without one.
      critic_frozen: the critic's parameters that are not trained.
      rewards: of responses.
    """

    online: Online
    critic: Model | None
    critic_frozen: Any
    rewards: Rewards


def make_sampler(
    config: ConfigDict,
    tokenizer: Any,
    mesh: Mesh,
    decoder: Decoder,
    prompt_length: int,
    *,
    greedy: bool,
    samples: int,
) -> Sampler:
    """Samples from a model as the config says.

    Args:
      config: a checked config.
      tokenizer: of the policy, whose responses end with what it says.
      mesh: over which prompts are split.
      decoder: the model.
      prompt_length: of the longest prompt.
      greedy: whether the most probable response comes after the samples.
      samples: responses to each prompt.
    """
    knobs = config.sampling
    # Methods on data have not all of these knobs, and then their defaults.
    truncated = {name: knobs[name] for name in ("top_k", "top_p", "min_p") if name in knobs}
    cache_dtype = knobs.get("cache_dtype", "auto")
    stops = dict.fromkeys([*data_lib.stop_ids(tokenizer), *knobs.stop_token_ids])
    temperatures = (float(knobs.temperature),) * samples
    settings = Sampling(
        samples=samples + greedy,
        max_new_tokens=config_lib.max_new_tokens(config),
        stops=tuple(stops),
        temperature=(*temperatures, 0.0) if greedy else temperatures,
        **truncated,
        cache_dtype=None if cache_dtype == "auto" else cache_dtype,
    )
    at_once = knobs.get("at_once", 0)
    return Sampler(decoder, settings, mesh=mesh, at_once=at_once, prompt_length=prompt_length)


def say(
    sampler: Sampler,
    weights: Any,
    prompts: Prompts,
    indices: Sequence[int],
    keys: Key[Array, " _"],
    stopping: Callable[[], bool] = lambda: False,
) -> Generated:
    """Samples responses to the prompts of these indices, each by its own key; see `Sampler`."""
    return sampler(weights, [prompts.dataset.group(i).prompt for i in indices], keys, stopping)


class Packer:
    """Groups in micro-batches of one shape for each number of groups, however long they are."""

    def __init__(self, config: ConfigDict, budget: Budget):
        """Takes the shape of a row, and of a micro-batch from the config."""
        self._config, self._budget = config, budget
        self._shapes: dict[tuple[int, int], Shape] = {}

    def expect(self, *, batch_size: int, responses: int) -> Shape:
        """The shape that the longest groups fit.

        Raises:
          UserError: the longest prompt with the longest responses does not fit a micro-batch.
        """
        config, size = self._config, (batch_size, responses)
        if size not in self._shapes:
            try:
                self._shapes[size] = packing.fixed_shape(
                    np.full(1, config.data.max_prompt_length),
                    np.full((1, responses), config_lib.max_new_tokens(config)),
                    self._budget,
                    batch_size=batch_size,
                    rows=config.data.rows,
                )
            except ValueError as error:
                raise UserError(
                    f"data.rows is {config.data.rows}, which the longest prompts with the longest "
                    f"responses do not fit: {error}"
                ) from error
        return self._shapes[size]

    def __call__(self, groups: Sequence[Group], *, batch_size: int, responses: int) -> PackedBatch:
        """The micro-batches; groups that are missing to `batch_size` are absent in the tables.

        Should there be more than were expected, they are compiled for once more. The next step has
        no more than before, as in a run that is resumed there.
        """
        return packing.pack_micro_batches(
            groups,
            self._budget,
            shape=self.expect(batch_size=batch_size, responses=responses),
            responses=responses,
            batch_size=batch_size,
        )


def with_sampled(batch: PackedBatch, logps: np.ndarray) -> PackedBatch:
    """The batch with what the sampler said of each token.

    Args:
      batch: of micro-batches, all of whose responses were sampled.
      logps: of the tokens `[groups, samples, new]`.
    """
    response = np.asarray(batch.response)
    index = np.stack(
        [
            np.asarray(packing.index_in_response(jax.tree.map(lambda x, i=i: x[i], batch)))
            for i in range(len(batch.tokens))
        ]
    )
    here = response < logps.shape[0] * logps.shape[1]
    flat = logps.reshape(-1, logps.shape[-1])
    of_tokens = flat[np.where(here, response, 0), np.where(here, index, 0)]
    sampled = np.where(here, of_tokens, 0).astype(np.float32)
    return dataclasses.replace(batch, token_extras={SAMPLED: sampled})


class Asked(NamedTuple):
    """The parameters that `look` needs.

    Attributes:
      policy: all of the policy's.
      frozen: those of the run's policy that are not trained, which the reference may share.
      reference: the reference's own.
      critic: all of the critic's; None without one.
    """

    policy: Any
    frozen: Any
    reference: Any
    critic: Any = None


def make_look(
    policy: Model, mode: Mode, critic: Model | None = None
) -> Callable[[Asked, PackedBatch], dict[str, Array]]:
    """The jitted function from micro-batches to what is said of each of their scored tokens.

    Args:
      policy: the model whose log-probs are asked for.
      mode: how the reference gives them.
      critic: the model whose values are asked for, if any.
    """
    return jax.jit(partial(_look, policy, mode, critic))


def _look(
    policy: Model, mode: Mode, critic: Model | None, asked: Asked, batch: PackedBatch
) -> dict[str, Array]:
    def look(micro: PackedBatch, _: Array) -> dict[str, Array]:
        said = policy(asked.policy, micro)

        def read(output: ModelOutput, micro: PackedBatch) -> Array:
            # In the updates of a method on data the reference has no temperature.
            return token_logps(_at_temperature_of(said, output), micro)

        found = {OLD: token_logps(said, micro)}
        reference = mode.logps(read, asked.reference, asked.frozen, micro)
        if reference is not None:
            found[REFERENCE] = reference
        if critic is not None:
            found[VALUES] = token_values(critic(asked.critic, micro), micro)
        return found

    return packing.map_micro_batches(look, batch)


def _at_temperature_of(one: ModelOutput, other: ModelOutput) -> ModelOutput:
    """What the other model says, at the temperature of the one."""
    assert isinstance(one.head, LMHead)
    assert isinstance(other.head, LMHead)
    head = dataclasses.replace(other.head, temperature=one.head.temperature)
    return other._replace(head=head)


def budget_of(config: ConfigDict, mesh: Mesh, *, samples: int, scored_length: int = 0) -> Budget:
    """The shape of a row for responses that are yet to be sampled.

    The table of scored positions has the share that the longest prompt with all of its responses
    would have of a row, or as much as one response needs if that is more: more would be computed
    in vain for rows with long prompts, less would leave rows with short ones half empty.

    Args:
      config: a checked config.
      mesh: over whose devices the rows are dealt out.
      samples: responses to each prompt.
      scored_length: of the table; 0: as above.
    """
    row = config.data.row_length or config.data.max_length
    longest = config_lib.max_new_tokens(config)
    responses = longest * samples
    share = responses / (config.data.max_prompt_length + responses)
    scored = scored_length or min(max(int(share * row), longest), row)
    shards, own = sharding.batch_shards(mesh), sharding.own_shards(mesh)
    return Budget(row, scored, shards, models.alignment(config, mesh), own)
