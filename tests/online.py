"""A run of a method that samples, without a workdir or a tokenizer: sampler, source and updates."""

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpref import (
    algorithms,
    config as config_lib,
    experience,
    models,
    optimizer as optimizer_lib,
    rewards,
    sharding,
)
from jaxpref.checkpoint import CRITIC
from jaxpref.data import BatchStream, TokenizedDataset
from jaxpref.data.examples import Example
from jaxpref.evaluation import enumerable
from jaxpref.experience.rollouts import MOMENTS
from jaxpref.models import Decoder, DecoderConfig, init_params, make_rope
from jaxpref.reference.modes import Free, Live, Synced
from jaxpref.train.critic import Critic
from jaxpref.train.state import abstract_state, initial_state
from jaxpref.train.update import Frozen, make_step, make_update
from jaxpref.weights import Opened, Source

# The enumerable task has these token ids alone, of which 0 ends a response.
VOCABULARY = 4
SMALL = DecoderConfig(
    vocabulary_size=VOCABULARY,
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    feed_forward=32,
    rope=(make_rope(8),),
    tied_head=False,
)


class Tokenizer:
    """EOS and padding are one token, which a prompt may have, too."""

    eos_token_id = 0
    chat_template = None

    def __len__(self):
        return VOCABULARY

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


TOKENIZER = Tokenizer()


def rewarded(sampled):
    """The rewards of the enumerable task."""
    return np.array([enumerable.reward(ids.tolist()) for ids in sampled.response_ids], np.float32)


def prompts_of(prompts):
    """A data set of prompts."""
    offsets = np.cumsum([0, *map(len, prompts)])
    return TokenizedDataset(
        tokens=np.concatenate([np.asarray(p, np.int32) for p in prompts]),
        piece_offsets=offsets,
        example_offsets=np.arange(len(prompts) + 1),
        true_rewards=None,
        counts=Counter(),
        uncut=np.diff(offsets),
        prompts=np.zeros(len(prompts), np.int64),
        examples=[Example(" ".join(map(str, p)), (), where=str(i)) for i, p in enumerate(prompts)],
    )


def config_of(method, **changes):
    """A config of the enumerable task."""
    config = config_lib.default(method)
    config.update_from_flattened_dict(
        {
            "data.format": "synthetic",
            "data.batch_size": 4,
            "data.max_length": 8,
            "data.max_prompt_length": 4,
            "data.row_length": 16,
            "sampling.max_new_tokens": 3,
            "data.rows": 4,
            "algorithm.beta": 0.5,
            "reward.function": "online:rewarded",
            "train.steps": 4,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    config_lib.check(config)
    return config


def policy_params(decoder, scale=1.0):
    """Parameters, with a head so large that the first policy prefers some tokens clearly."""
    params = jax.jit(lambda key: init_params(decoder, key))(jax.random.key(1))
    return {**params, "head": params["head"] * scale}


@dataclasses.dataclass
class Run:
    """What a run consists of; `source` and `step` are the real ones."""

    config: object
    parts: experience.Parts
    source: experience.Rollouts
    step: object
    update: object
    state: object
    number: int = 0

    @property
    def frozen(self):
        return Frozen(self.parts.frozen, self.parts.critic_frozen)

    def placed(self, params):
        """A copy on all devices of the mesh."""
        return _placed(self.parts.mesh, params)

    def sample(self, number=None):
        with sharding.use(self.parts.mesh):
            return self.source(number or self.number + 1, self.state, lambda: False)

    def learn(self, given):
        with sharding.use(self.parts.mesh):
            self.number += 1
            self.state, measured = self.step(
                self.number, self.state, self.frozen, self.parts.reference, given
            )
        return {name: float(m.values / max(float(m.weights), 1e-8)) for name, m in measured.items()}

    def train(self, steps):
        return [self.learn(self.sample()) for _ in range(steps)]


def _placed(mesh, params):
    """A copy on all devices of a mesh."""
    return jax.device_put(params, NamedSharding(mesh, PartitionSpec()), may_alias=False)


def begin(
    config,
    *,
    decoder=None,
    params=None,
    prompts=((1, 2),),
    reward=rewarded,
    devices=1,
    workdir="",
    tokenizer=TOKENIZER,
):
    """A run before its first step, from a checked config."""
    decoder = decoder or Decoder(SMALL)
    params = policy_params(decoder) if params is None else params
    mesh = sharding.make_mesh(devices, devices=jax.devices()[:devices])
    online = algorithms.build_online(config)
    updates = config.train.steps * online.epochs * online.minibatches
    placed = partial(_placed, mesh)
    optimizer, schedule = optimizer_lib.build(config.optimizer, updates)
    policy = models.packed(decoder, temperature=config.sampling.temperature)
    mode, reference, moving = Free(), {}, None
    if config.reference.mode == "live":
        mode, reference = Live(policy), placed(params)
    elif config.reference.mode == "synced":
        knobs = config.reference
        mode = Synced(policy, mix=knobs.sync_mix, every=knobs.sync_every)
        moving = placed(params)
    controls = {**online.controls, **dict.fromkeys(MOMENTS, 0.0)}
    abstract, _ = abstract_state(
        decoder, optimizer, mesh, moving_reference=moving is not None, controls=controls
    )
    state = initial_state(
        placed(params), optimizer, reference=moving, controls=controls, abstract=abstract
    )
    critic = None
    if online.critic is not None:
        critic = Critic.of(config, Opened(Source(None, None), tokenizer, decoder), mesh, updates)
        state = state._replace(roles={**state.roles, CRITIC: critic.first(state.policy, {})})
    parts = experience.Parts(
        config=config,
        online=online,
        decoder=decoder,
        policy=policy,
        critic=None if critic is None else critic.model,
        frozen={},
        critic_frozen={},
        mode=mode,
        reference=reference,
        rewards=rewards.Rewards({"task": reward}, {"task": 1.0}, config.reward),
        true_rewards=None,
        tokenizer=tokenizer,
        mesh=mesh,
        budget=experience.budget_of(config, mesh, samples=config.sampling.samples),
    )
    train = prompts_of(prompts)
    stream = BatchStream(train, batch_size=config.data.batch_size, budget=parts.budget)
    source = experience.Rollouts(parts, experience.Prompts(train, stream), Path(workdir))
    update = make_update(
        online.policy, policy, optimizer, schedule, reference=mode, seed=config.seed
    )
    step = make_step(
        update,
        None if critic is None else critic.update(online.critic),
        epochs=online.epochs,
        stop_kl=online.stop_kl,
        warmup=config.critic.warmup if critic is not None else 0,
    )
    return Run(config, parts, source, step, update, state)
