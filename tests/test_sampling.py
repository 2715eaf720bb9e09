"""What is sampled: from the exact distribution, by keys alone, with the policy's log-probs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import pytest
from conftest import TINY, in_float64
from scipy import stats

from jaxpref import interrupts, logprobs, models, packing, sampling, sharding
from jaxpref.evaluation import enumerable
from jaxpref.models import Decoder, Lora, packed
from jaxpref.sampling import (
    Generated,
    Sampler,
    Sampling,
    decode,
    draw,
    generate,
    prompt_keys,
    sampler as sampler_lib,
    truncated,
)

# Token 0 is what fills up rows, and a stop as well, as where the padding token is EOS.
STOPS = (0, *range(7, 32))
NEW = 6


def spread(params, scale=20, **config):
    """A model in float64 whose next tokens are neither certain nor all alike."""
    params = {**params, "embedding": params["embedding"] * scale}
    return in_float64(Decoder(dataclasses.replace(TINY, **config)), params)


@pytest.fixture(scope="module")
def tiny(tiny_params):
    return spread(tiny_params, windows=(0, 5))


def prompts_of(seed, count, longest=9, vocabulary=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, n, dtype=np.int32) for n in rng.integers(1, longest, count)]


def packed_logps(model, params, groups):
    """Log-probs of every token by the training path: one packed tree; 0 after a response's end."""
    longest = max(len(r) for group in groups for r in group.responses)
    total = sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    batch = packing.pack(groups, row_length=-(-total // 64) * 64)

    @jax.jit
    def logps(params, batch):
        output = packed(model)(params, batch)
        hidden = packing.gather_sources(output.hidden, batch)
        logps = logprobs.token_logprobs(hidden, output.head, jnp.asarray(batch.target))
        return logps, jnp.minimum(packing.index_in_response(batch), longest - 1)

    found = np.zeros((batch.lengths.size + 1, longest))
    values, places = logps(params, batch)
    found[batch.response, places] = values
    return found[:-1].reshape(*batch.lengths.shape, longest)


def assert_same(found, expected, tolerance=1e-9):
    """The same tokens; log-probs the same but for rounding."""
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logps, expected.logps, atol=tolerance)
    np.testing.assert_allclose(found.sampled_logps, expected.sampled_logps, atol=tolerance)


# The exact distribution.

RESPONSES = enumerable.list_responses(vocabulary=5, steps=3, stops=(0, 3))
PROMPT = np.array([1, 3, 2], np.int32)


@pytest.fixture(scope="module")
def task(tiny_params):
    """A model of 5 tokens, and the logits of its next token after every prefix there is."""
    params = {**tiny_params, "embedding": tiny_params["embedding"][:5]}
    model, params = spread(params, scale=4, vocabulary_size=5)
    with jax.enable_x64(True):
        logps = packed_logps(model, params, [RESPONSES.group(PROMPT)])[0]
    table = np.zeros((RESPONSES.prefix_count, 5))
    table[RESPONSES.prefixes[RESPONSES.here], RESPONSES.tokens[RESPONSES.here]] = logps[
        RESPONSES.here
    ]
    np.testing.assert_allclose(np.exp(table).sum(1), 1, atol=1e-9)
    return model, params, table


def by_sorting(logps, top_k=0, top_p=1.0, min_p=0.0):
    """`truncated` for one row, from its definition: of sorted tokens, keep the first ones."""
    kept = np.argsort(-logps, kind="stable")
    if top_k:
        kept = kept[:top_k]
    chances = np.exp(logps[kept]) / np.exp(logps[kept]).sum()
    # A token stays while those before it have not yet reached top_p.
    if top_p < 1:
        kept = kept[np.concatenate([[0], np.cumsum(chances)[:-1]]) < top_p]
    kept = kept[logps[kept] >= logps[kept[0]] + np.log(max(min_p, 1e-300))]
    out = np.full_like(logps, -np.inf)
    out[kept] = logps[kept] - np.log(np.exp(logps[kept]).sum())
    return out


def fits(counts, chances):
    """The p-value of chi-square, with all that is rarer than 5 in one class."""
    wanted = chances * counts.sum()
    rare = wanted < 5
    pool = [(counts[rare].sum(), wanted[rare].sum())] if wanted[rare].sum() > 0 else []
    observed, expected = np.array([*zip(counts[~rare], wanted[~rare], strict=True), *pool]).T
    assert len(observed) > 3
    return stats.chisquare(observed, expected).pvalue


CUTS = {
    "none": {},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 4, "top_p": 0.95, "min_p": 0.05},
}


@pytest.mark.parametrize(
    "cut",
    [pytest.param(x, marks=[] if x == "all" else [pytest.mark.long]) for x in CUTS],
)
def test_samples_have_the_exact_distribution_and_are_independent(cut, task, float64):
    """Chi-square over all responses, at two temperatures and greedily; and of pairs of samples."""
    model, params, table = task
    temperatures, prompts = (1.0, 1.0, 0.6, 0.0), 1500
    said = generate(
        model,
        params,
        [PROMPT] * prompts,
        prompt_keys(0, 0, prompts),
        samples=4,
        max_new_tokens=3,
        stops=(0, 3),
        temperature=temperatures,
        **CUTS[cut],
    )
    number = {tuple(row): i for i, row in enumerate(RESPONSES.tokens)}
    which = np.array([[number[tuple(row)] for row in rows] for rows in said.tokens])
    prefixes, here = RESPONSES.prefixes[which], RESPONSES.here[which]
    expected = np.where(here, table[prefixes, said.tokens], 0)
    np.testing.assert_allclose(said.logps, expected, atol=1e-9)
    for sample, temperature in enumerate(temperatures):
        if temperature == 0:
            best = table[RESPONSES.prefixes].argmax(-1) == RESPONSES.tokens
            (greedy,) = np.flatnonzero((best | ~RESPONSES.here).all(1))
            assert (which[:, sample] == greedy).all()
            assert not said.sampled_logps[:, sample].any()
            continue
        at = np.stack([by_sorting(row / temperature, **CUTS[cut]) for row in table])
        expected = np.where(here[:, sample], at[prefixes[:, sample], said.tokens[:, sample]], 0)
        np.testing.assert_allclose(said.sampled_logps[:, sample], expected, atol=1e-9)
        logps = np.where(RESPONSES.here, at[RESPONSES.prefixes, RESPONSES.tokens], 0).sum(1)
        counts = np.bincount(which[:, sample], minlength=len(logps))
        assert not counts[np.isneginf(logps)].any()
        assert fits(counts, np.exp(logps)) > 1e-3
    # Samples of one prompt, and those of neighbouring prompts: their first tokens, their lengths.
    neighbours = [
        (which[:, 0], which[:, 1]),
        (which[:, 0], which[:, 2]),
        (which[:-1, 0], which[1:, 0]),
    ]
    for one, other in neighbours:
        for said_first in (RESPONSES.tokens[:, 0], RESPONSES.lengths):
            pairs = stats.contingency.crosstab(said_first[one], said_first[other]).count
            assert stats.chi2_contingency(pairs).pvalue > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_truncation_by_its_formula(dtype, float64):
    """Also where logits are far apart, below 0, or -infinity already."""
    rng = np.random.default_rng(0)
    rows = [
        rng.normal(scale=scale, size=300) - shift for scale, shift in ((1, 0), (5, 9), (40, 99))
    ]
    logits = np.array(rows, dtype)
    logits[2, ::7] = -np.inf
    for cut in [*CUTS.values(), {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_p": 0.999}]:
        found = np.asarray(jax.jit(partial(truncated, **cut))(jnp.asarray(logits)))
        expected = np.stack([by_sorting(row.astype("float64"), **cut) for row in logits])
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
        kept = np.isfinite(found)
        np.testing.assert_array_equal(found[kept], logits[kept])


def test_truncation_keeps_ties_and_never_removes_the_best():
    tied = jnp.log(jnp.array([[0.3, 0.1, 0.1, 0.1, 0.3, 0.1]]))
    kept = [np.isfinite(truncated(tied, top_k=k))[0].sum() for k in range(1, 8)]
    assert kept == [2, 2, 6, 6, 6, 6, 6]
    assert np.isfinite(truncated(tied, top_p=0.5))[0].sum() == 2
    equal = jnp.zeros((1, 5))
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 5}, {"top_k": 99}):
        np.testing.assert_array_equal(truncated(equal, **cut), equal)
    apart = jnp.array([[-1e30, 3e38, -jnp.inf, 1.0]])
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1 - 1e-7}, {"min_p": 1e-9}):
        assert np.isfinite(truncated(apart, **cut))[0].tolist()[1]


# By keys alone.


PROMPTS = prompts_of(0, 5)
SETTINGS = Sampling(samples=3, max_new_tokens=NEW, stops=STOPS, temperature=(1.0, 0.0, 0.7))


def sampled(tiny, order=range(5), **options):
    """What the prompts of these numbers get, each with its own key."""
    model, params = tiny
    order = list(order)
    sampler = Sampler(model, options.pop("settings", SETTINGS), **options)
    with jax.enable_x64(True):
        keys = prompt_keys(7, 3, 5)[np.array(order)]
        return sampler(sampler.prepare(params), [PROMPTS[i] for i in order], keys)


@pytest.fixture(scope="module")
def said(tiny):
    return sampled(tiny)


def taken(said, order):
    return Generated(*(x[list(order)] for x in said))


def test_responses_end_with_the_first_stop_or_at_their_greatest_length(said):
    """EOS may be the padding token, may stand inside the prompt, and may come at once."""
    assert any(np.isin(prompt, STOPS).any() for prompt in PROMPTS)
    ends, lengths = set(), set()
    for tokens, length, stopped in zip(
        said.tokens.reshape(-1, NEW), said.lengths.ravel(), said.stopped.ravel(), strict=True
    ):
        assert not np.isin(tokens[: length - 1], STOPS).any()
        assert np.isin(tokens[length - 1], STOPS) == stopped
        assert stopped or length == NEW
        assert not tokens[length:].any()
        ends.add(int(tokens[length - 1]) if stopped else "cut")
        lengths.add(int(length) if stopped else "cut")
    # All of it happens: several stops, one of them at once, and a response that is cut.
    assert len(ends) > 3
    assert {1, 2, "cut"} <= lengths
    after = np.arange(NEW) >= said.lengths[..., None]
    assert not said.logps[after].any()
    assert not said.sampled_logps[after].any()
    assert said.responses(2)[1].tolist() == said.tokens[2, 1, : said.lengths[2, 1]].tolist()


def test_each_token_is_drawn_by_its_own_key_from_a_row_of_its_own(tiny, said, float64):
    """The tree decodes what separate rows would, computed in full."""
    model, params = tiny
    keys = prompt_keys(7, 3, 5)
    rows = np.zeros((15, 16), np.int32)
    for i, prompt in enumerate(PROMPTS):
        for k in range(3):
            rows[3 * i + k, : len(prompt)] = prompt
            rows[3 * i + k, len(prompt) : len(prompt) + NEW] = said.tokens[i, k]
    logits = jax.jit(lambda p, rows: model.apply({"params": p}, rows))(params, rows)
    at = np.stack([np.arange(NEW) + len(prompt) - 1 for prompt in PROMPTS])
    logits = np.asarray(logits).reshape(5, 3, 16, -1)
    logits = np.stack([row[:, place] for row, place in zip(logits, at, strict=True)])
    here = np.arange(NEW) < said.lengths[..., None]

    def key(prompt, sample, place):
        return jax.random.fold_in(jax.random.fold_in(keys[prompt], sample), place)

    for sample, temperature in enumerate(SETTINGS.temperatures):
        if temperature == 0:
            expected = logits[:, sample].argmax(-1)
        else:
            grid = jnp.meshgrid(jnp.arange(5), jnp.arange(NEW), indexing="ij")
            of_tokens = jax.vmap(lambda i, t, sample=sample: key(i, sample, t))
            drawn, _ = jax.vmap(draw)(
                of_tokens(*(x.ravel() for x in grid)),
                jnp.asarray(logits[:, sample].reshape(5 * NEW, -1) / temperature),
            )
            expected = np.asarray(drawn).reshape(5, NEW)
        seen = here[:, sample]
        np.testing.assert_array_equal(said.tokens[:, sample][seen], expected[seen])


@pytest.mark.parametrize("order", [[3, 1, 4, 0, 2], pytest.param([2], marks=pytest.mark.long)])
def test_other_prompts_and_their_order_change_nothing(order, tiny, said):
    assert_same(sampled(tiny, order), taken(said, order))


def test_other_branches_and_room_that_grows_change_nothing(tiny, said, monkeypatch):
    """Branch 0 beside a greedy branch and a cooler one, and beside two like itself."""
    monkeypatch.setattr(sampling.sampler, "_FIRST_SLOTS", 1)
    other = sampled(tiny, settings=SETTINGS._replace(temperature=1.0))
    assert (other.tokens[:, 1:] != said.tokens[:, 1:]).any()
    assert_same(*(Generated(*(x[:, :1] for x in s)) for s in (other, said)))


@pytest.mark.parametrize("seats", [2, pytest.param(4, marks=pytest.mark.long)])
def test_seats_that_are_filled_again_give_the_same(seats, tiny, said):
    """With 4 seats one is filled at a time; the last prompts do not fill all of those free."""
    assert_same(sampled(tiny, at_once=seats), said)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2, 2), {}),
        pytest.param((8, 1, 1), {}, marks=pytest.mark.long),
        pytest.param((1, 4, 2), {"at_once": 4}, marks=pytest.mark.long),
    ],
)
def test_devices_change_nothing(shape, options, tiny, said):
    assert_same(sampled(tiny, mesh=sharding.make_mesh(*shape), **options), said)


def test_everything_compiles_once_whatever_the_lengths(tiny):
    model, params = tiny
    sampler = Sampler(model, SETTINGS, prompt_length=64, at_once=2)
    functions = (decode.begin, decode.decode, decode.seat)
    with jax.enable_x64(True):
        weights = sampler.prepare(params)
        counts = []
        for seed in range(4):
            prompts = prompts_of(seed, 3 + seed, longest=3 + 4 * seed)
            sampler(weights, prompts, prompt_keys(seed, 0, len(prompts)))
            counts.append([function._cache_size() for function in functions])
    assert counts[0] == counts[-1]


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"at_once": 4}, marks=pytest.mark.long)], ids=["all", "in turn"]
)
def test_no_device_holds_what_others_decode(options, tiny, monkeypatch, caplog):
    """Empty rooms lie as full ones do, so that the loop is compiled once a room."""
    monkeypatch.setattr(sampler_lib, "_ASK_AFTER", 1)
    monkeypatch.setattr(sampler_lib, "_FIRST_SLOTS", 1)
    model, params = tiny
    mesh = sharding.make_mesh(2, 2, 2)
    settings = Sampling(samples=2, max_new_tokens=NEW)
    sampler = Sampler(model, settings, mesh=mesh, prompt_length=64, **options)
    begun, begin = [], decode.begin

    def noted(*given):
        begun.append(begin(*given))
        return begun[-1]

    monkeypatch.setattr(decode, "begin", noted)
    prompts = prompts_of(0, 8)
    with jax.enable_x64(True), jax.log_compiles():
        sampler(sampler.prepare(params), prompts, prompt_keys(0, 0, 8))
    seating = sampler.seating(8, max(map(len, prompts)))
    compiled = [x for x in caplog.messages if x.startswith("Compiling jit(decode) ")]
    assert len(compiled) == len(seating.rooms)
    for rows in begun:
        for x in jax.tree.leaves(rows.cache.layers):
            assert x.sharding.shard_shape(x.shape)[0] == x.shape[0] / 4
            heads = x.ndim - 3
            assert x.sharding.shard_shape(x.shape)[heads] == x.shape[heads] / 2


@pytest.mark.parametrize("options", [{}, {"at_once": 2}], ids=["all", "in turn"])
def test_sampling_stops_when_it_is_asked_to(tiny, said, options, monkeypatch):
    """Within so many tokens, whatever is left to say."""
    monkeypatch.setattr(sampler_lib, "_ASK_AFTER", 1)
    model, params = tiny
    sampler = Sampler(model, SETTINGS, prompt_length=64, **options)
    asked = []

    def stopping():
        asked.append(True)
        return len(asked) == 3

    with jax.enable_x64(True):
        weights = sampler.prepare(params)
        with pytest.raises(interrupts.StoppedError):
            sampler(weights, PROMPTS, prompt_keys(7, 3, len(PROMPTS)), stopping)
        assert len(asked) == 3
        # To have asked changes nothing.
        again = sampler(weights, PROMPTS, prompt_keys(7, 3, len(PROMPTS)), lambda: False)
    assert_same(again, said)


def test_the_cache_is_written_in_place():
    """What the loop takes beside its arguments is a small part of its cache."""
    model = Decoder(dataclasses.replace(TINY, layers=4, head_dim=32, rope=(models.make_rope(32),)))
    settings = Sampling(samples=2, max_new_tokens=1025)
    sampler = Sampler(model, settings, prompt_length=64)
    params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    weights = jax.eval_shape(lambda p: models.unroll(model, p)[1], params)
    prompts = [np.ones(3, np.int32)] * 4
    table = sampler._table(64)
    rows = jax.eval_shape(
        lambda w: sampler._begin(
            w, prompts, prompt_keys(0, 0, 4), 64, range(4), 4, 1024, table=table
        ),
        weights,
    )
    bounds = [jax.ShapeDtypeStruct((), jnp.int32)] * 2
    plan = (
        decode.decode.lower(sampler.decoder, settings, weights, rows, *bounds, table)
        .compile()
        .memory_analysis()
    )
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows.cache.layers))
    assert plan.alias_size_in_bytes > cache
    assert plan.temp_size_in_bytes < 0.2 * cache


# The policy's log-probs.

FEW = ("gemma2",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("adapters", marks=pytest.mark.long),
        *FEW,
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in pretrained.CASES
            if name not in FEW
        ),
    ],
)
def test_log_probs_are_those_of_training(name, tiny_params, float64):
    """Of every family: windows, soft caps, experts, learned positions, adapters."""
    if name == "adapters":
        config = dataclasses.replace(TINY, lora=Lora(2, 4.0))
        shapes = models.abstract_params(Decoder(config))["layers"]
        rng = np.random.default_rng(0)
        fresh = {
            name: rng.normal(scale=0.2, size=x.shape)
            for name, x in shapes.items()
            if "lora" in name
        }
        model, params = spread(
            {**tiny_params, "layers": {**tiny_params["layers"], **fresh}}, lora=config.lora
        )
    else:
        directory = pretrained.FIXTURES / name
        model, params = in_float64(*models.from_pretrained(directory, max_length=pretrained.LENGTH))
    prompts = prompts_of(1, 3, longest=12)
    settings = {"samples": 2, "max_new_tokens": 6, "stops": STOPS, "temperature": (1.0, 2.0)}
    said = generate(model, params, prompts, prompt_keys(0, 0, 3), **settings)
    groups = [packing.Group(p, said.responses(i)) for i, p in enumerate(prompts)]
    expected = packed_logps(model, params, groups)
    np.testing.assert_allclose(said.logps[..., : expected.shape[-1]], expected, atol=1e-9)


@pytest.mark.long
def test_a_cache_in_bfloat16_costs_a_little_precision(tiny, said):
    rough = sampled(tiny, settings=SETTINGS._replace(cache_dtype="bfloat16"))
    # The first token comes from the prompt itself, before anything is kept.
    np.testing.assert_array_equal(rough.tokens[..., 0], said.tokens[..., 0])
    both = (rough.tokens == said.tokens).cumprod(-1).astype(bool)
    error = np.abs(rough.logps - said.logps)
    assert error[..., 0].max() < 1e-9
    assert 1e-6 < error[both].max() < 0.2


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples should be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens should be at least 1"),
        ({"temperature": -0.1}, "temperature should be at least 0"),
        ({"temperature": float("nan")}, "temperature should be at least 0"),
        ({"temperature": (1.0, 0.5)}, "one for each of 3; got"),
        ({"top_k": -1}, "top_k should be at least 0"),
        ({"top_p": 0.0}, "top_p should be above 0 and at most 1; got 0.0"),
        ({"min_p": 1.5}, "min_p should be from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        Sampler(tiny_model, Sampling(**{"samples": 3, **settings}))


def test_prompts_that_cannot_be_continued_are_named(tiny_model, tiny_params):
    model = Decoder(dataclasses.replace(TINY, learned_positions=10))
    one, key = np.array([1, 2], np.int32), prompt_keys(0, 0, 1)
    for prompts, message in (
        ([], "expected a key a prompt; got 1 for 0"),
        ([one, one], "got 1 for 2"),
        ([one[:0]], "prompt 0 is empty"),
        ([one * 32], "prompt 0 should have ids from 0 to 63; got 32 to 64"),
        ([np.ones(8, np.int32)], "has 8 tokens, and max_new_tokens is 4, but .* only 10 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(model, Sampling(max_new_tokens=4))({}, prompts, key)
    with pytest.raises(ValueError, match="scalar head gives no words"):
        Sampler(models.as_scalar(tiny_model), Sampling())
