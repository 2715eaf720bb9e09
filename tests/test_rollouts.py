"""What is learned from sampled responses does not depend on how they are cut, padded or placed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import online
import optax
import pytest
from conftest import in_float64

from jaxpref import algorithms, config as config_lib, sampling, sharding
from jaxpref.algorithms import policy_gradient as names
from jaxpref.experience import rollouts
from jaxpref.models import Decoder, ModelOutput
from jaxpref.models.protocol import ScalarHead
from jaxpref.sampling import Generated
from jaxpref.train.update import make_update

PROMPTS = [(1, 2), (3,), (2, 0, 1), (1, 1, 3, 2), (2,), (0, 3)]
# Every way to add token losses up, with every kind of ratio and further terms.
LOSSES = {
    "sum": {"importance_cap": 1.5},
    "response": {"ratio": "sequence"},
    "token": {"entropy_bonus": 0.1},
    "constant": {"ratio": "cispo", "kl_in": "loss", "kl_estimator": "k3"},
}


def config_of(method="ppo", **changes):
    settings = {
        "data__batch_size": len(PROMPTS),
        "sampling__samples": 3,
        "sampling__temperature": 0.7,
        "sampling__max_new_tokens": 4,
    }
    return online.config_of(method, **{**settings, **changes})


@pytest.fixture
def wide(float64):
    """A run in float64 whose policy has left the reference, and what it has sampled."""

    def begin(devices=1, **changes):
        decoder, params = in_float64(Decoder(online.SMALL), online.policy_params(SMALL))
        run = online.begin(
            config_of(critic__learning_rate=0.1, **changes),
            decoder=decoder,
            params=params,
            prompts=PROMPTS,
            devices=devices,
        )
        moved = jax.tree.map(
            lambda x: x * (1 + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)), params
        )
        roles = dict(run.state.roles)
        critic = roles["critic"].params
        score = jnp.sin(jnp.arange(critic["score"].size, dtype=float)).reshape(
            critic["score"].shape
        )
        roles["critic"] = roles["critic"]._replace(params=run.placed({**critic, "score": score}))
        roles["policy"] = roles["policy"]._replace(params=run.placed(moved))
        run.state = run.state._replace(roles=roles)
        return run

    return begin


SMALL = Decoder(online.SMALL)


def weighed(run, said, order):
    """The batch of one update, with the prompts in this order."""
    rewards = np.sin(np.arange(said.lengths.size, dtype=np.float32)).reshape(said.lengths.shape)
    with sharding.use(run.parts.mesh):
        said = Generated(*(x[order] for x in said))
        (batch,) = run.source._weighed(
            run.state, order.tolist(), said, rewards[order], None
        ).batches
    return batch


def gradients(run, hows):
    """Of these losses and of the critic's, as a jitted function of a batch."""
    updates = {}
    for how in hows:
        config = config_lib.default("ppo")
        config.update(run.config)
        config.algorithm.update({**LOSSES[how], "aggregation": how})
        policy = algorithms.build_online(config).policy
        updates[how] = make_update(policy, run.parts.policy, optax.identity())
    critic = make_update(run.parts.online.critic, run.parts.critic, optax.identity(), role="critic")

    @jax.jit
    def found(state, batch):
        bare = state._replace(
            roles={
                r: t._replace(optimizer_state=optax.EmptyState()) for r, t in state.roles.items()
            }
        )

        def of(update, role):
            after, sums = update(bare, {}, {}, batch)
            change = jax.tree.map(jnp.subtract, after.roles[role].params, bare.roles[role].params)
            return change, sums["loss"]

        return {
            **{how: of(update, "policy") for how, update in updates.items()},
            "critic": of(critic, "critic"),
        }

    def call(batch):
        with sharding.use(run.parts.mesh):
            return sharding.fetch(found(run.state, batch))

    return call


def assert_close(one, other):
    for name in one:
        for x, y in zip(jax.tree.leaves(one[name]), jax.tree.leaves(other[name]), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12, err_msg=name)


# Knobs, devices, and whether prompts change places.
LAYOUTS = {
    "all at once": ({"data__row_length": 9, "data__rows": 8}, 8, True),
    "micro-batches": ({"data__row_length": 9, "data__rows": 3}, 1, False),
    "permuted": ({"data__row_length": 16, "data__rows": 6}, 1, True),
    "long rows": ({"data__row_length": 64, "data__rows": 2}, 1, False),
}


@pytest.mark.parametrize(
    ("hows", "layouts"),
    [
        (["token"], ["all at once"]),
        pytest.param(list(LOSSES), list(LAYOUTS), marks=pytest.mark.long),
    ],
)
def test_gradients_do_not_depend_on_how_a_step_is_cut(hows, layouts, wide):
    """Neither on micro-batches, rows, devices, the order of prompts, nor on what padding holds."""
    run = wide(data__row_length=32, data__rows=8)
    order = np.arange(len(PROMPTS))
    with sharding.use(run.parts.mesh):
        source, indices = run.source, order.tolist()
        weights = source._sampler.prepare(run.state.policy)
        keys = sampling.prompt_keys(0, 1, len(indices))
        said = rollouts.say(source._sampler, weights, source._prompts, indices, keys)
    assert len(np.unique(said.lengths)) > 2
    whole = weighed(run, said, order)
    held = (whole.lengths > 0).any(axis=(1, 2))
    assert np.asarray(held).tolist() == [True, False]
    compute = gradients(run, hows)
    expected = compute(whole)
    if "long rows" in layouts:
        # One micro-batch is computed without a loop over several.
        assert_close(expected, compute(jax.tree.map(lambda x: x[:1], whole)))
    for change, loss in expected.values():
        assert max(float(np.abs(x).max()) for x in jax.tree.leaves(change)) > 1e-3
        assert np.isfinite(loss.values)
    padding = np.asarray(whole.response) >= whole.lengths[0].size
    assert padding[0].any()
    dirty = dataclasses.replace(
        whole,
        token_extras={
            name: jnp.where(padding, jnp.nan, x) for name, x in whole.token_extras.items()
        },
        tokens=jnp.where(whole.group == 0, 3, whole.tokens),
    )
    jax.tree.map(np.testing.assert_array_equal, expected, compute(dirty))
    rng = np.random.default_rng(0)
    for name in layouts:
        changes, devices, permuted = LAYOUTS[name]
        another = wide(devices, **changes)
        batch = weighed(another, said, rng.permutation(order) if permuted else order)
        assert (batch.lengths > 0).any(axis=(1, 2)).sum() > 1 or name == "long rows"
        assert_close(expected, gradients(another, hows)(batch))


def said_by_hand():
    """Two responses to two prompts, which hold EOS themselves: cut, ended at once, by either id."""
    responses = [[[1, 2, 2], [0]], [[2, 3], [2, 2, 0]]]
    lengths = np.array([[len(r) for r in of_prompt] for of_prompt in responses], np.int32)
    tokens = np.zeros((2, 2, 3), np.int32)
    for place, k in np.ndindex(2, 2):
        tokens[place, k, : lengths[place, k]] = responses[place][k]
    stopped = np.array([[False, True], [True, True]])
    zeros = np.zeros(tokens.shape, np.float32)
    return Generated(tokens, lengths, stopped, zeros, zeros)


# With EOS (which is the padding too) inside.
BY_HAND = [(2, 0, 1), (0, 3)]
# Less what being cut costs.
REWARDS = {(1, 2, 2): 4.0 - 10.0, (0,): 2.0, (2, 3): -1.0, (2, 2, 0): 3.0}


def where_it_reads(params, batch, key=None):
    """A critic that says at which position a value is read, times its only parameter."""
    positions = jnp.asarray(batch.positions, jnp.float32)[..., None]
    return ModelOutput(positions, ScalarHead(params["score"]))


def learned_by_hand(method, monkeypatch, critic=None, **changes):
    """Values of each token by response, from what was said by hand."""
    config = config_of(
        method,
        data__batch_size=2,
        sampling__samples=2,
        sampling__max_new_tokens=3,
        sampling__stop_token_ids=(3,),
        sampling__temperature=1.0,
        reward__truncation_penalty=10.0,
        algorithm__beta=0.0,
        **changes,
    )

    def reward(sampled):
        values = [REWARDS[tuple(ids.tolist())] for ids in sampled.response_ids]
        return np.array(values, np.float32) + 10 * ~sampled.finished

    run = online.begin(config, prompts=BY_HAND, reward=reward)
    assert run.source._sampler.settings.stops == (0, 3)
    if critic is not None:
        run.source._look = rollouts.make_look(run.parts.policy, run.parts.mode, critic)
        roles = {**run.state.roles, "critic": run.state.roles["policy"]}
        roles["critic"] = roles["critic"]._replace(params={"score": jnp.ones(1)})
        run.state = run.state._replace(roles=roles)
    monkeypatch.setattr(run.source._prompts.stream, "indices", lambda step: [0, 1])
    monkeypatch.setattr(rollouts, "say", lambda *args: said_by_hand())
    given = run.sample()
    (batch,) = given.batches
    found = {}
    for name, values in batch.token_extras.items():
        response = np.asarray(batch.response).ravel()
        of = [np.asarray(values).ravel()[response == i].tolist() for i in range(4)]
        found[name] = dict(zip(REWARDS, of, strict=True))
        assert not np.asarray(values).ravel()[response == 4].any()
    return given, found


def test_the_score_lands_on_the_last_token_and_being_cut_costs(monkeypatch):
    """pad = EOS, EOS in the prompt, two stop ids, a response that was cut, EOS at once."""
    given, found = learned_by_hand("reinforce", monkeypatch, algorithm__gamma=0.5)
    for tokens, reward in REWARDS.items():
        expected = [reward * 0.5**left for left in reversed(range(len(tokens)))]
        assert found[names.ADVANTAGES][tokens] == pytest.approx(expected)
    clipped = given.measured["completions/clipped_ratio"]
    assert (float(clipped.values), float(clipped.weights)) == (1, 4)
    assert float(given.controls["baseline"]) == pytest.approx(0.1 * np.mean(list(REWARDS.values())))


def test_a_value_is_read_before_its_token(monkeypatch):
    changes = {"algorithm__lam": 0.5, "algorithm__whiten": False}
    _, found = learned_by_hand("ppo", monkeypatch, where_it_reads, **changes)
    for number, (tokens, reward) in enumerate(REWARDS.items()):
        # The first token is predicted from the prompt's last one.
        first = len(BY_HAND[number // 2]) - 1
        values = [float(first + t) for t in range(len(tokens))]
        assert found[names.VALUES][tokens] == values
        after, expected = 0.0, []
        for t in reversed(range(len(tokens))):
            last = t == len(tokens) - 1
            surprise = (reward if last else values[t + 1]) - values[t]
            after = surprise + 0.5 * after
            expected.insert(0, after)
        assert found[names.ADVANTAGES][tokens] == pytest.approx(expected)
        returns = [a + v for a, v in zip(expected, values, strict=True)]
        assert found[names.RETURNS][tokens] == pytest.approx(returns)


def test_groups_have_baselines_of_their_own(monkeypatch):
    _, found = learned_by_hand("rloo", monkeypatch)
    rewards = list(REWARDS.values())
    for number, tokens in enumerate(REWARDS):
        expected = rewards[number] - rewards[number ^ 1]
        assert found[names.ADVANTAGES][tokens] == pytest.approx([expected] * len(tokens))


def test_whitened_advantages_are_those_of_the_whole_step(monkeypatch):
    """Each prompt is an update, and a micro-batch, by itself."""
    changes = {"algorithm__minibatches": 2, "data__rows": 3, "data__row_length": 8}
    run = online.begin(config_of("reinforce_pp", **changes), prompts=PROMPTS)
    given = run.sample()
    assert len(given.batches) == 2
    assert any((b.lengths > 0).any(axis=(1, 2)).sum() > 1 for b in given.batches)
    values = np.concatenate(
        [
            np.asarray(b.token_extras[names.ADVANTAGES])[np.asarray(b.response) < b.lengths[0].size]
            for b in given.batches
        ]
    )
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std(ddof=1) == pytest.approx(1, rel=1e-4)


def test_the_greedy_response_is_a_baseline_alone(monkeypatch):
    """It is never trained on, and a sample that equals it is as good as it, however scaled."""
    changes = {"algorithm__beta": 0.0, "reward__normalize": True, "sampling__samples": 4}
    params = online.policy_params(SMALL, scale=3.0)
    run = online.begin(config_of("remax", **changes), prompts=PROMPTS, params=params)
    said = []
    say = rollouts.say
    monkeypatch.setattr(rollouts, "say", lambda *args: said.append(say(*args)) or said[-1])
    (batch,) = run.sample().batches
    assert batch.lengths.shape[2] == 4
    response, advantages = (
        np.asarray(x).ravel() for x in (batch.response, batch.token_extras[names.ADVANTAGES])
    )
    equal = [
        place * 4 + k
        for place in range(len(PROMPTS))
        for k in range(4)
        if np.array_equal(said[0].responses(place)[k], said[0].responses(place)[4])
    ]
    assert 0 < len(equal) < 24
    assert not advantages[np.isin(response, equal)].any()
    others = (response < 24) & ~np.isin(response, equal)
    assert np.abs(advantages[others]).max() > 0.1


EXPERTS = dataclasses.replace(online.SMALL, experts=4, experts_per_token=2)


@pytest.mark.parametrize(
    ("shape", "updates"),
    [(EXPERTS, 4), (online.SMALL, 1), pytest.param(online.SMALL, 4, marks=pytest.mark.long)],
)
def test_the_first_update_is_at_the_policy_that_sampled(shape, updates):
    """At any temperature, and before it the KL is 0; with one update the ratio is exactly 1.

    A router may pick other experts where it is undecided, but it is asked the same each time.
    """
    decoder = Decoder(shape)
    changes = {"algorithm__epochs": updates} if updates > 1 else {}
    config = config_of("rloo", **changes)
    run = online.begin(
        config, decoder=decoder, params=online.policy_params(decoder), prompts=PROMPTS
    )
    given = run.sample()
    assert abs(given.kl) < 1e-6
    (batch,) = given.batches
    old, reference, sampled = (
        np.asarray(batch.token_extras[n]) for n in (names.OLD, names.REFERENCE, names.SAMPLED)
    )
    assert np.abs(old - reference).max() < 1e-6
    # The sampler computes the same otherwise.
    assert np.abs(old - sampled).max() < 1e-4
    with sharding.use(run.parts.mesh):
        _, sums = run.update(run.state, {}, run.parts.reference, batch)
    ratio, kl = sums["policy/ratio"], sums["policy/approx_kl"]
    if updates == 1:
        assert float(ratio.values) == float(ratio.weights)
        assert float(kl.values) == 0
    else:
        assert abs(float(ratio.values / ratio.weights) - 1) < 1e-6
        # Half the mean square of the log-ratios.
        assert float(kl.values / kl.weights) < 1e-12


def test_nothing_is_compiled_for_the_lengths_of_responses(monkeypatch):
    """Over 20 steps in which responses are long, short, or of any length."""
    changes = {"data__rows": 2, "sampling__max_new_tokens": 6, "data__max_length": 10}
    run = online.begin(config_of("rloo", **changes), prompts=PROMPTS)
    run.train(1)
    rng, micro_batches = np.random.default_rng(0), set()
    say = rollouts.say

    def forced(*args):
        said = say(*args)
        longest = rng.choice([1, 3, 6])
        lengths = (
            np.minimum(said.lengths, longest) if longest < 6 else np.full_like(said.lengths, 6)
        )
        return said._replace(lengths=lengths)

    monkeypatch.setattr(rollouts, "say", forced)
    compiled = []

    def note(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            compiled.append(details)

    jax.monitoring.register_event_duration_secs_listener(note)
    for _ in range(20):
        given = run.sample()
        micro_batches.add(int((np.asarray(given.batches[0].lengths) > 0).any(axis=(1, 2)).sum()))
        run.learn(given)
    jax.monitoring.unregister_event_duration_listener(note)
    assert len(micro_batches) > 2
    assert not compiled


def test_one_token_a_response_is_legal_and_a_batch_without_any_changes_nothing(monkeypatch):
    run = online.begin(
        config_of("rloo", reference__mode="free", algorithm__beta=0.0), prompts=PROMPTS
    )
    shape = (len(PROMPTS), 3)
    zeros = np.zeros((*shape, 4), np.float32)
    eos = Generated(
        zeros.astype(np.int32), np.ones(shape, np.int32), np.ones(shape, bool), zeros, zeros
    )
    monkeypatch.setattr(rollouts, "say", lambda *args: eos)
    before = jax.tree.map(np.asarray, run.state.policy)
    given = run.sample()
    measured = run.learn(given)
    assert measured["grad_norm"] == 0
    assert measured["frac_reward_zero_std"] == 1
    assert measured["completions/mean_length"] == 1
    (batch,) = given.batches
    nothing = dataclasses.replace(
        batch,
        lengths=jnp.zeros_like(batch.lengths),
        response=jnp.full_like(batch.response, batch.lengths[0].size),
        token_extras={n: jnp.full_like(x, jnp.nan) for n, x in batch.token_extras.items()},
    )
    with sharding.use(run.parts.mesh):
        state, sums = run.update(run.state, {}, {}, nothing)
    assert float(sums["loss"].weights) == 0
    assert all(np.isfinite(float(m.values)) for m in sums.values())
    jax.tree.map(np.testing.assert_array_equal, state.policy, before)
