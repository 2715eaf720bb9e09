"""Every method in every mode of the reference, on batches whose answers can be told apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_groups

from jaxpref import (
    algorithms,
    config as config_lib,
    losses,
    packing,
    reference,
    sharding,
    train,
)
from jaxpref.logprobs import LMHead, token_logprobs
from jaxpref.methods import METHODS, OFFLINE
from jaxpref.models import ModelOutput, ScalarHead
from jaxpref.packing import Budget, Group
from jaxpref.trainable import partition

STEPS, GROUPS, RESPONSES = 6, 8, {"sft": 1, "pairs": 2, "mismatched": 2, "unpaired": 1, "ranked": 3}
RANK = 2
MODES = ("live", "precomputed", "adapter", "synced", "free")


pytestmark = pytest.mark.usefixtures("float64")


def allowed(name, mode):
    config = config_of(name, mode)
    try:
        config_lib.check(config)
    except config_lib.UserError:
        return False
    return True


def config_of(name, mode="live", **knobs):
    config = config_lib.default(name)
    config.data.format = "synthetic"
    config.reference.mode = mode
    if mode == "synced":
        config.reference.update(sync_every=2, sync_mix=0.6)
    config.model.lora.rank = RANK if mode == "adapter" else 0
    for knob, value in knobs.items():
        config.algorithm[knob] = value
    return config


@functools.cache
def batch_of(kind: str, groups: int = GROUPS, shards: int = 1, rows: int = 0):
    """Good responses are of tokens below 30, bad ones of those above, more the worse.

    Micro-batches have as many rows as they are said to; without, one has a row for each group.
    """
    rng = np.random.default_rng(7)
    count = RESPONSES[kind]
    labels = np.arange(groups) % 2 == 0
    made = []
    for g in range(groups):
        worse = [0.0] if kind == "sft" else np.linspace(0, 1, count)
        if kind in ("unpaired", "mismatched"):
            worse = [1.0 - labels[g], 0.5][:count]
        ids = [
            rng.integers(1, 30, n) + (rng.random(n) < w) * 30
            for w, n in zip(worse, rng.integers(2, 6, count), strict=True)
        ]
        prompt = rng.integers(1, 60, 3).astype(np.int32)
        made.append(Group(prompt, [x.astype(np.int32) for x in ids]))
    batch = packing.pack_micro_batches(
        made, Budget(32, 24, shards), shape=packing.Shape(rows or groups, 1), responses=count
    )
    if kind in ("unpaired", "mismatched"):
        extras = {"labels": np.tile(labels.astype(np.float32), (len(batch.tokens), 1))}
        batch = dataclasses.replace(batch, extras=extras)
    return jax.tree.map(jnp.asarray, batch)


def bigram(params, batch, key=None):
    """A token's successor from the token alone: quick to compile, and all that a loss sees."""
    table = params["embedding"]
    if "embedding_lora_a" in params:
        table += params["embedding_lora_a"] @ params["embedding_lora_b"]
    return ModelOutput(table[batch.tokens], LMHead(params["kernel"]))


def bigram_with_rewards(params, batch, key=None):
    return ModelOutput(params["embedding"][batch.tokens], ScalarHead(params["score"][0]))


def model_for(name):
    return bigram_with_rewards if name == "reward" else bigram


@functools.cache
def params_of(adapter=False):
    rng = np.random.default_rng(5)
    params = {name: (rows, 8) for name, rows in (("embedding", 64), ("kernel", 64), ("score", 1))}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in params.items()}
    if adapter:
        params["embedding_lora_a"] = jnp.asarray(rng.normal(size=(64, RANK)))
        params["embedding_lora_b"] = jnp.zeros((RANK, 8))
    return params


def mode_of(config, model):
    """The mode of the reference, as the config says, for the policy's model."""
    knobs = config.reference
    return {
        "live": reference.Live(model),
        "adapter": reference.Live(model),
        "precomputed": reference.Precomputed(),
        "synced": reference.Synced(model, mix=knobs.sync_mix, every=knobs.sync_every),
        "free": reference.Free(),
    }[knobs.mode]


def run(name, mode, steps=STEPS, rows=0, **knobs):
    """Losses of some updates on one batch, and the last state."""
    config = config_of(name, mode, **knobs)
    model, params = model_for(name), params_of(mode == "adapter")
    algorithm = algorithms.build(config)
    batch = batch_of(config_lib.data_kind(config), rows=rows)
    trained, frozen = partition(params, config_lib.trainable(config))
    optimizer = optax.adam(3e-2)
    update = train.make_update(algorithm, model, optimizer, reference=mode_of(config, model))
    copy = jax.tree.map(jnp.copy, trained)
    state = train.initial_state(
        jax.tree.map(jnp.copy, trained),
        optimizer,
        running=algorithm.running,
        reference=copy if mode == "synced" else None,
    )
    own = copy if mode == "live" else {}
    if mode == "precomputed":
        logps = reference_of(algorithm, model, params, batch)[None]
        batch = dataclasses.replace(batch, extras={**batch.extras, reference.COLUMN: logps})
    found = []
    for _ in range(steps):
        state, measured = update(state, frozen, own, batch)
        found.append({k: float(m.values) / max(float(m.weights), 1) for k, m in measured.items()})
    return found, state


def whole(batch):
    """A batch of one micro-batch without that axis."""
    return jax.tree.map(lambda x: x[0], batch) if batch.tokens.ndim > 2 else batch


def reference_of(algorithm, model, params, batch):
    """What a method reads of a reference with these parameters."""
    return algorithm.reference_logps(model(params, whole(batch)), whole(batch))


def loss_of(name, batch, params, other=None, **knobs):
    """A method's objective of a batch, the reference having other parameters."""
    mode = config_lib.default(name).reference.mode
    algorithm, model = algorithms.build(config_of(name, mode, **knobs)), model_for(name)
    said = None if other is None else reference_of(algorithm, model, other, batch)
    output = model(params, whole(batch))
    return algorithm.loss(output, whole(batch), algorithms.LossInputs(said))


def response_logps(params, batch):
    return algorithms.response_logps(bigram(params, batch), batch)


CASES = [(name, mode) for name in OFFLINE for mode in MODES if allowed(name, mode)]


@functools.cache
def live(name):
    return run(name, "live")[0]


# A mode does not know the method: these are one of each family, and of each kind of state.
EVERY_MODE = ("dpo", "bco", "aot", "kto", "plackett_luce_dpo")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(
            name,
            mode,
            marks=[pytest.mark.long]
            if mode in ("adapter", "precomputed", "synced") and name not in EVERY_MODE
            else [],
        )
        for name, mode in CASES
    ],
)
def test_every_method_learns_in_every_mode(name, mode):
    found = live(name) if mode == "live" else run(name, mode)[0]
    assert all(np.isfinite(list(step.values())).all() for step in found)
    assert found[-1]["loss"] < found[0]["loss"]
    # Around 0 DiscoPOP's loss rises with the margin: it has a local optimum there.
    if "rewards/margins" in found[0] and name != "discopop":
        assert found[-1]["rewards/margins"] > found[0]["rewards/margins"]
    if mode == "precomputed":
        assert_same_measurements(found, live(name))


def assert_same_measurements(found, expected):
    for number, (step, other) in enumerate(zip(found, expected, strict=True)):
        for key, value in step.items():
            if key == "rewards/accuracies" and number == 0:
                # Before the first update margins are 0 but for rounding.
                continue
            # Norms of all parameters are logged in float32.
            tolerance = 1e-6 if key.endswith("_norm") else 1e-9
            np.testing.assert_allclose(value, other[key], rtol=tolerance, atol=1e-9, err_msg=key)


def test_each_method_has_every_mode_that_makes_sense():
    by_name = {name: {mode for n, mode in CASES if n == name} for name in OFFLINE}
    everything = set(MODES)
    assert by_name["sft"] == by_name["reward"] == by_name["orpo"] == {"free"}
    assert by_name["dpo"] == by_name["ipo"] == by_name["plackett_luce_dpo"] == everything
    assert by_name["kto"] == by_name["nca"] == everything - {"free"}


VARIANTS = {
    "dpo": [
        {"divergence": "forward_kl"},
        {"divergence": "jensen_shannon"},
        {"divergence": "alpha"},
        {"per_token": True},
        {"label_smoothing": 0.1},
        {"length_alpha": 0.5},
        {"wpo": True},
    ],
    "ipo": [{"per_token": True}],
    "cpo": [{"nll_per_token": True}],
    "orpo": [{"nll_per_token": True}],
    "reward": [{"ranking": "plackett_luce"}, {"ranking": "binary"}, {"center_coefficient": 0.01}],
}


@pytest.mark.parametrize(
    ("name", "knobs"), [(name, knobs) for name, all in VARIANTS.items() for knobs in all]
)
def test_each_knob_changes_the_loss_and_still_learns(name, knobs):
    mode = config_lib.default(name).reference.mode
    found, _ = run(name, mode, **knobs)
    plain = live(name) if mode == "live" else run(name, mode)[0]
    # At the reference DPO's loss is log 2 whatever its form.
    assert found[-1]["loss"] != plain[-1]["loss"]
    assert found[-1]["loss"] < found[0]["loss"]


def test_length_desensitised_dpo_equals_the_definition():
    """The weights of the tree's table, against sums by hand."""
    algorithm = algorithms.build(config_of("dpo", "live", length_alpha=0.25))
    batch = whole(batch_of("pairs"))
    lengths = np.asarray(batch.lengths)
    output = bigram(params_of(), batch)
    scored = token_logprobs(packing.gather_sources(output.hidden, batch), output.head, batch.target)
    expected = np.zeros_like(lengths, np.float64)
    seen = np.zeros_like(lengths)
    for value, response in zip(
        np.asarray(scored).ravel(), np.asarray(batch.response).ravel(), strict=True
    ):
        if response < lengths.size:
            g, k = divmod(int(response), 2)
            expected[g, k] += value * (1 if seen[g, k] < lengths[g].min() else 0.25)
            seen[g, k] += 1
    np.testing.assert_array_equal(seen, lengths)
    np.testing.assert_allclose(algorithm.reference_logps(output, batch), expected, rtol=1e-9)


def test_methods_are_their_losses_on_the_models_log_probs():
    params = params_of()
    other = jax.tree.map(lambda x: 1.1 * x, params)
    batch = whole(batch_of("pairs"))
    policy, said = (response_logps(p, batch) for p in (params, other))
    objective = loss_of("apo_zero", batch, params, other)
    expected = losses.apo_zero(*policy.T, *said.T, beta=0.1)
    np.testing.assert_allclose(objective.loss.values, expected.losses, rtol=1e-9)
    np.testing.assert_allclose(
        objective.metrics["rewards/chosen"].values, expected.chosen_rewards, rtol=1e-9
    )
    batch = whole(batch_of("mismatched"))
    policy, said = (response_logps(p, batch) for p in (params, other))
    objective = loss_of("kto", batch, params, other)
    kl = losses.kto_kl(policy[:, 1], said[:, 1])
    expected = losses.kto(policy[:, 0], said[:, 0], batch.extras["labels"] > 0, kl)
    np.testing.assert_allclose(objective.loss.values, expected.losses, rtol=1e-9)
    assert objective.metrics["kl"].values[0] == kl


def test_a_tie_is_half_a_pair():
    """Not compiled as one, so that policy and reference run the same programs, bit for bit."""
    params = params_of()
    for name in ("dpo", "all_pairs_dpo"):
        metrics = loss_of(name, batch_of(METHODS[name].data), params, params).metrics
        np.testing.assert_array_equal(metrics["rewards/margins"].values, 0)
        np.testing.assert_array_equal(metrics["rewards/accuracies"].values, 0.5)


def test_absent_groups_change_no_method():
    """A batch filled up with absent groups has the same loss as without them."""
    params = params_of()
    for name in ("aot", "aot_unpaired", "dpo", "rrhf", "all_pairs_dpo"):
        other = None if name == "rrhf" else jax.tree.map(lambda x: 1.1 * x, params)
        groups = random_groups(2, 5, RESPONSES[METHODS[name].data])
        budget = Budget(40, 40)
        values = []
        for size in (5, 8):
            batch = packing.materialise(
                packing.plan(groups, budget),
                groups,
                budget,
                responses=RESPONSES[METHODS[name].data],
                batch_size=size,
            )
            loss = jax.jit(lambda batch, n=name, r=other: loss_of(n, batch, params, r))(batch).loss
            values.append(float((loss.values * loss.weights).sum() / loss.weights.sum()))
        assert values[0] == pytest.approx(values[1], rel=1e-9), name


def test_the_synced_reference_follows_every_other_update():
    found, state = run("dpo", "synced", steps=4)
    # Mixed with share 0.6 after updates 2 and 4, so that the fourth state is 0.4 away.
    _, before = run("dpo", "synced", steps=2)
    expected = jax.tree.map(lambda new, old: 0.6 * new + 0.4 * old, state.policy, before.reference)
    for ours, theirs in zip(
        jax.tree.leaves(state.reference), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert found[2]["rewards/margins"] < found[1]["rewards/margins"]


def test_bco_reads_the_mean_reward_of_all_steps_before():
    found, state = run("bco", "live", steps=3)
    total = state.running["rewards/mean"]
    means = [step["rewards/mean"] for step in found]
    assert float(total.weights) == 3 * GROUPS
    assert float(total.values / total.weights) == pytest.approx(np.mean(means), rel=1e-9)


@pytest.mark.parametrize("name", ["kto", "bco_unpaired", "dpo"])
def test_micro_batches_change_no_update(name):
    """KTO's reference point too is that of the whole batch."""
    whole, cut = live(name)[:3], run(name, "live", steps=3, rows=1)[0]
    assert_same_measurements(cut, whole)
    if name == "kto":
        assert whole[2]["kl"] > 0


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "all_pairs_dpo", "reward"])
def test_micro_batches_change_nothing_that_is_measured_of_an_example(name):
    mode = "live" if METHODS[name].reference == "needed" else "free"
    config, model, params = config_of(name, mode), model_for(name), params_of()
    other = jax.tree.map(lambda x: 1.1 * x, params)
    look = train.make_eval_step(algorithms.build(config), model, reference=mode_of(config, model))
    optimizer = optax.sgd(1.0)
    state = train.initial_state(jax.tree.map(jnp.copy, params), optimizer)
    whole, cut = (look(state, {}, other, batch_of(METHODS[name].data, rows=n)) for n in (0, 1))
    # The lowest and the highest reward are those of a micro-batch.
    for metric in whole.metrics.keys() - {"min_reward", "max_reward"}:
        np.testing.assert_allclose(cut.metrics[metric], whole.metrics[metric], rtol=1e-9)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-9)
    assert (whole.loss.weights > 0).all()


@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_a_likelihood_per_token_is_the_mean_over_the_batchs_tokens(name):
    """Also where the batch is cut into micro-batches of unequal lengths."""
    found, _ = run(name, "free", steps=2, nll_per_token=True)
    cut, _ = run(name, "free", steps=2, rows=1, nll_per_token=True)
    assert_same_measurements(cut, found)
    batch = whole(batch_of("pairs"))
    logps, lengths = response_logps(params_of(), batch).T, batch.lengths.T
    assert len(set(lengths[0].tolist())) > 1
    # The other term alone.
    zero = jnp.zeros(GROUPS)
    if name == "cpo":
        preference = losses.cpo(*logps, beta=0.1, nll_weight=0.0)
    else:
        preference = losses.orpo(*logps, *lengths, beta=0.1, nll=zero)
    expected = preference.losses.mean() - logps[0].sum() / lengths[0].sum()
    assert found[0]["loss"] == pytest.approx(float(expected), rel=1e-9)


def test_quantiles_need_the_whole_batch():
    config = config_of("aot")
    config.data.rows = 2
    with pytest.raises(config_lib.UserError, match="aot compares quantiles of a whole batch"):
        config_lib.check(config)


def test_weights_of_tokens_do_not_show_in_what_is_logged():
    (plain, *_), (weighted, *_) = live("dpo"), run("dpo", "live", 1, length_alpha=0.25)[0]
    assert weighted["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=1e-9)


def test_a_wpo_weight_can_be_limited():
    # All tokens alike, which gives each pair the weight 1.
    params = jax.tree.map(jnp.zeros_like, params_of())
    objective = loss_of("dpo", batch_of("pairs"), params, params, wpo=True, wpo_largest=0.5)
    np.testing.assert_allclose(objective.loss.values, 0.5 * np.log(2), rtol=1e-9)


def test_all_pairs_of_a_ranking_count_in_a_reward_models_measurements():
    batch = whole(batch_of("ranked"))
    output = bigram_with_rewards(params_of(), batch)
    rewards = np.asarray(algorithms.response_scalars(output, batch))
    metrics = loss_of("reward", batch, params_of()).metrics
    expected = [[r[0] - r[1], r[0] - r[2], r[1] - r[2]] for r in rewards]
    np.testing.assert_allclose(metrics["margin"].values, expected, rtol=1e-9)
    expected = (1 + np.sign(expected)) / 2
    assert metrics["accuracy"].values.tolist() == expected.tolist()


def test_a_reward_model_of_labels_is_a_logistic_regression():
    """Its loss is the cross-entropy of the rewards, and its gradient what they are off by."""
    batch = whole(batch_of("unpaired"))
    labels = np.asarray(batch.extras["labels"])
    params = params_of()
    rewards = algorithms.response_scalars(bigram_with_rewards(params, batch), batch)[:, 0]
    objective = loss_of("reward", batch, params, ranking="binary")
    chance = 1 / (1 + np.exp(-np.asarray(rewards)))
    expected = -np.log(np.where(labels > 0, chance, 1 - chance))
    np.testing.assert_allclose(objective.loss.values, expected, rtol=1e-9)
    gradient = jax.grad(lambda r: losses.binary_reward(r, jnp.asarray(labels > 0)).sum())(rewards)
    np.testing.assert_allclose(gradient, chance - labels, rtol=1e-9)
    metrics = {
        name: np.average(metric.values, weights=metric.weights)
        for name, metric in objective.metrics.items()
    }
    assert metrics["accuracy"] == np.mean((chance > 0.5) == (labels > 0))
    for name, label in (("good", 1), ("bad", 0)):
        expected = np.mean(np.asarray(rewards)[labels == label])
        assert metrics[f"{name}_reward"] == pytest.approx(expected, rel=1e-9)
    assert metrics["mean_reward"] == pytest.approx(float(rewards.mean()), rel=1e-9)


def test_plackett_luce_has_no_place_for_margins():
    batch = dataclasses.replace(whole(batch_of("ranked")), extras={"margins": jnp.ones(GROUPS)})
    with pytest.raises(config_lib.UserError, match="the data has margins"):
        loss_of("reward", batch, params_of(), ranking="plackett_luce")


@pytest.mark.parametrize(("name", "head"), [("dpo", ScalarHead), ("reward", LMHead)])
def test_a_method_says_what_kind_of_model_it_needs(name, head):
    batch = whole(batch_of(METHODS[name].data))
    model = bigram if head is LMHead else bigram_with_rewards
    with pytest.raises(ValueError, match=rf"needs .* head; got {head.__name__}"):
        algorithms.build(config_of(name, config_lib.default(name).reference.mode)).loss(
            model(params_of(), batch), batch, algorithms.LossInputs()
        )


def test_a_models_own_losses_are_added_whatever_the_method():
    """And logged by their names; a method does not see them."""

    def model(params, batch, key=None):
        output = bigram(params, batch, key)
        return output._replace(auxiliary={"squares": (params["kernel"] ** 2).sum()})

    params = params_of()
    batch = batch_of("sft")
    expected = float((params["kernel"] ** 2).sum())
    found = []
    for each in (bigram, model):
        algorithm, optimizer = algorithms.build(config_of("sft", "free")), optax.sgd(0.1)
        state = train.initial_state(jax.tree.map(jnp.copy, params), optimizer)
        update = train.make_update(algorithm, each, optimizer)
        found.append(update(state, {}, {}, batch))
    (plain, without), (state, measured) = found
    assert "squares" not in without
    for name, more in (("loss", expected), ("squares", expected)):
        before = without[name].values / without[name].weights if name in without else 0.0
        now = measured[name].values / measured[name].weights
        assert float(now) == pytest.approx(float(before) + more, rel=1e-9)
    moved = plain.policy["kernel"] - 0.1 * 2 * params["kernel"]
    np.testing.assert_allclose(state.policy["kernel"], moved, rtol=1e-9)


def test_a_reward_models_new_head_is_trained_with_its_adapters():
    config = config_of("reward", "free")
    config.model.lora.rank = 2
    params = {"layers": {"query": 0, "query_lora_a": 1}, "score": 2}
    trained, _ = partition(params, config_lib.trainable(config))
    assert trained == {"layers": {"query_lora_a": 1}, "score": 2}


def test_rewards_are_read_at_the_last_token_and_named_as_trl_does():
    found, _ = run("reward", "free")
    names = {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    assert names <= set(found[-1])
    assert found[-1]["accuracy"] > found[0]["accuracy"]
    assert found[-1]["min_reward"] <= found[-1]["mean_reward"] <= found[-1]["max_reward"]


@pytest.mark.parametrize("name", ["kto", "aot", "aot_unpaired"])
def test_what_compares_examples_is_the_same_on_eight_devices(name):
    """A batch's KL estimate and quantiles are of the whole batch, wherever its parts lie."""
    params = params_of()
    other = jax.tree.map(lambda x: 1.1 * x, params)
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(data=devices, fsdp=1, tensor=1, devices=jax.devices()[:devices])
        batch = jax.tree.map(np.asarray, batch_of(METHODS[name].data, 16, devices))
        with sharding.use(mesh):
            loss = jax.jit(lambda batch: loss_of(name, batch, params, other))
            found.append(jax.device_get(loss(sharding.put_batch(mesh, batch))))
    np.testing.assert_allclose(found[0].loss.values, found[1].loss.values, rtol=1e-9)
    if name == "kto":
        assert found[0].metrics["kl"].values[0] > 0
        np.testing.assert_allclose(
            found[0].metrics["kl"].values, found[1].metrics["kl"].values, rtol=1e-9
        )
