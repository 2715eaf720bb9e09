"""Scalar heads: grown on a language model, read at a response's last token, saved and loaded."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import pytest
from conftest import in_float64

from jaxpref import logprobs, models, packing
from jaxpref.algorithms import response_logps, response_scalars
from jaxpref.errors import UserError

# Plain, one with a bias in its LM head, one with narrow embeddings, one with soft caps.
CASES = ["gpt2", "gptj", "pythia", "opt_post_norm", "llama3", "gemma2", "gemma3", "qwen3_moe"]


def grown(name):
    model, params = models.from_pretrained(pretrained.FIXTURES / name)
    return models.with_scalar_head(model, params, jax.random.key(0))


def random_groups(seed, count=4):
    rng = np.random.default_rng(seed)

    def ids(longest):
        return rng.integers(3, 40, rng.integers(1, longest), dtype=np.int32)

    # Responses of one token too, whose last token is their first.
    return [packing.Group(ids(6), [ids(5), ids(3), ids(2)]) for _ in range(count)]


@pytest.mark.parametrize("planner", [packing.plan_tree, packing.plan_padded])
@pytest.mark.parametrize("shards", [1, 2])
def test_places_and_last_tokens(planner, shards):
    groups = random_groups(0)
    batch = packing.pack(groups, row_length=24, scored_length=24, shards=shards, planner=planner)
    flat = np.asarray(batch.tokens).reshape(shards, -1)
    places = np.asarray(batch.place).reshape(shards, -1)
    response = np.asarray(batch.response)
    found = np.take_along_axis(flat, places, axis=1).reshape(response.shape)
    real = response < batch.lengths.size
    np.testing.assert_array_equal(found[real], np.asarray(batch.target)[real])
    last = np.asarray(packing.is_last(batch))
    assert last.sum() == batch.lengths.size
    ends = dict(zip(response[last].tolist(), found[last].tolist(), strict=True))
    expected = [r[-1] for group in groups for r in group.responses]
    assert [ends[i] for i in range(len(expected))] == expected


@pytest.mark.parametrize("shards", [1, 2])
def test_what_pads_is_passed_over_at_the_end(shards):
    """transformers' rule, token by token: the last one that is not padding, in the whole text."""
    pad, rng = 3, np.random.default_rng(0)

    def ids(longest):
        return rng.choice([pad, 4, 5], rng.integers(1, longest)).astype(np.int32)

    groups = [packing.Group(ids(5), [ids(5), ids(4), ids(3)]) for _ in range(40)]
    batch = packing.pack(groups, row_length=16, scored_length=16, shards=shards)
    # A model whose hidden state at a token is the token's place in its text, and its group.
    positions = jnp.asarray(batch.positions, jnp.float32)
    read = dataclasses.replace(batch, place=packing.last_places(batch, pad))
    found = packing.gather_places(positions[..., None], read)[..., 0]
    ends = packing.sum_by_response(jnp.where(packing.is_last(batch), found, 0), batch)
    tokens = packing.gather_places(jnp.asarray(batch.tokens, jnp.float32)[..., None], read)[..., 0]
    tokens = packing.sum_by_response(jnp.where(packing.is_last(batch), tokens, 0), batch)
    for g, group in enumerate(groups):
        for k, response in enumerate(group.responses):
            text = np.concatenate([group.prompt, response])
            expected = np.flatnonzero(text != pad)[-1] if (text != pad).any() else 0
            assert (ends[g, k], tokens[g, k]) == (expected, text[expected])


def test_a_reward_is_what_the_head_says_at_the_last_token(float64):
    model, params = in_float64(*grown("llama3"))
    groups = random_groups(1)
    batch = packing.pack(groups, row_length=24, scored_length=24)
    rewards = jax.jit(lambda p: response_scalars(models.packed(model)(p, batch), batch))(params)
    assert rewards.shape == (4, 3)
    scalars = jax.jit(partial(model.apply, method="scalars"))
    for g, group in enumerate(groups):
        for k, response in enumerate(group.responses):
            text = np.concatenate([group.prompt, response])
            # What comes after the text is seen by none of its tokens.
            alone = scalars({"params": params}, np.pad(text, (0, 24 - len(text)))[None])
            np.testing.assert_allclose(rewards[g, k], alone[0, len(text) - 1], rtol=1e-9, atol=1e-9)


def test_a_policy_at_a_temperature_has_its_log_probs(tiny_model, tiny_params, float64):
    model, params = in_float64(tiny_model, tiny_params)
    batch = packing.pack(random_groups(1), row_length=24, scored_length=24)
    output = models.packed(model, temperature=0.7)(params, batch)
    # The head has neither bias nor bound, so that its kernel may be divided in place of the logits.
    scaled = output._replace(head=logprobs.LMHead(output.head.kernel / 0.7))
    found = response_logps(output, batch)
    np.testing.assert_allclose(found, response_logps(scaled, batch), rtol=1e-9)
    with pytest.raises(ValueError, match="packed expected temperature above 0; got 0"):
        models.packed(model, temperature=0.0)
    scorer = model.clone(config=dataclasses.replace(model.config, scalar_head=True))
    with pytest.raises(ValueError, match="a temperature of 1 for a decoder with a scalar head"):
        models.packed(scorer, temperature=0.7)


def test_the_body_is_shared_and_only_the_head_is_new():
    model, params = models.from_pretrained(pretrained.FIXTURES / "pythia")
    scalar, grown_params = models.with_scalar_head(model, params, jax.random.key(0))
    assert "head" in params
    assert "head" not in grown_params
    assert grown_params["layers"]["query"] is params["layers"]["query"]
    assert grown_params["score"].shape == (1, 16)
    with pytest.raises(ValueError, match="has no LM head"):
        scalar.apply({"params": grown_params}, method="lm_head")


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, params = grown(name)
    models.save_pretrained(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    again, loaded = models.from_pretrained(tmp_path)
    assert again.config == model.config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    # Once more, now with an origin that has this head already.
    models.save_pretrained(again, loaded, tmp_path / "twice")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_transformers_says_the_same(name, tmp_path):
    import torch
    import transformers

    model, params = grown(name)
    models.save_pretrained(model, params, tmp_path)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = np.load(pretrained.FIXTURES / name / "said.npz")["tokens"][:1]
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens.astype(np.int64))).logits.numpy()
    assert expected.shape == (1, 1)
    ours = model.apply({"params": params}, jnp.asarray(tokens), method="scalars")
    np.testing.assert_allclose(ours[:, -1:], expected, atol=2e-5)


def test_more_labels_than_one_are_refused(tmp_path):
    model, params = grown("llama3")
    models.save_pretrained(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a classifier with 2 labels; only one label"):
        models.from_pretrained(tmp_path)
