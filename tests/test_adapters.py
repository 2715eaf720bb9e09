"""LoRA and freezing: what is trained, what it costs, what it is equal to, and how it is saved."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import pytest
import transformers
from conftest import TINY, in_float64, random_groups
from test_weights import QWEN3, write_model

from jaxpref import (
    algorithms,
    config as config_lib,
    models,
    packing,
    weights,
)
from jaxpref.errors import UserError
from jaxpref.models import Lora, huggingface
from jaxpref.models.adapters import ADAPTERS
from jaxpref.reference import Live
from jaxpref.trainable import merge, partition

pytestmark = pytest.mark.usefixtures("one_device")

# One of each way in which products share a tensor on the other side.
CASES = ["gpt2", "pythia", "llama_biases", "gemma3", "phi3", "opt_post_norm"]
TOKENS = np.random.default_rng(5).integers(3, 40, (2, 12)).astype(np.int32)


def adapted(name, **settings):
    """A fixture with adapters that are not at zero any more."""
    lora = Lora(**{"rank": 3, "alpha": 6.0, **settings})
    model = huggingface.read_model(pretrained.FIXTURES / name, lora=lora)
    _, base = models.from_pretrained(pretrained.FIXTURES / name)
    adapters, _ = partition(models.init_params(model, jax.random.key(0)), ADAPTERS)
    noise = jax.random.key(1)
    adapters = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(noise, x.shape), adapters)
    return model, merge(base, adapters), base


@pytest.mark.parametrize(
    "name",
    ["phi3", *(pytest.param(name, marks=pytest.mark.long) for name in ("gemma3", "gpt2"))],
)
def test_adapters_merge_into_the_weights(name, float64):
    model, params, base = adapted(name)
    _, base = in_float64(model, base)
    model, params = in_float64(model, params)
    plain = models.without_adapters(model)
    merged_model, merged = models.merge_adapters(model, params)
    assert merged_model == plain
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    ours = jax.jit(model.apply)({"params": params}, TOKENS)
    apply = jax.jit(plain.apply)
    np.testing.assert_allclose(ours, apply({"params": merged}, TOKENS), atol=1e-9)
    assert np.abs(ours - apply({"params": base}, TOKENS)).max() > 0.01


def test_fresh_adapters_change_nothing():
    model = huggingface.read_model(pretrained.FIXTURES / "llama3", lora=Lora(rank=2))
    plain, base = models.from_pretrained(pretrained.FIXTURES / "llama3")
    adapters, _ = partition(models.init_params(model, jax.random.key(0)), ADAPTERS)
    ours = model.apply({"params": merge(base, adapters)}, TOKENS)
    np.testing.assert_array_equal(ours, plain.apply({"params": base}, TOKENS))


def test_the_adapter_is_its_formula(float64):
    """`x W + alpha / rank * x A B`, in the product of the feed-forward's end."""
    model, params = in_float64(*adapted("llama3", targets=("down",))[:2])
    layers = params["layers"]
    a, b = layers["down_lora_a"], layers["down_lora_b"]
    assert set(partition(params, ADAPTERS)[0]["layers"]) == {"down_lora_a", "down_lora_b"}
    assert a.shape == (2, 24, 3)
    assert b.shape == (2, 3, 16)
    moved = {**layers, "down": layers["down"] + 6 / 3 * jnp.einsum("lir,lro->lio", a, b)}
    moved["down_lora_b"] = jnp.zeros_like(b)
    np.testing.assert_allclose(
        model.apply({"params": params}, TOKENS),
        model.apply({"params": {**params, "layers": moved}}, TOKENS),
        atol=1e-9,
    )


def test_dropout_is_off_without_a_key_and_keeps_the_mean():
    model, params, _ = adapted("llama3", dropout=0.5, targets=("query",))
    variables = {"params": params}
    still = models.Decoder(dataclasses.replace(model.config, lora=Lora(3, 6.0, ("query",))))
    off = model.apply(variables, TOKENS)
    np.testing.assert_array_equal(off, still.apply(variables, TOKENS))
    apply = jax.jit(lambda key: model.apply(variables, TOKENS, rngs={"dropout": key}))
    first, again, other = (apply(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - off).max() > 1e-3


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_peft_reads_the_adapters(name, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    model, params, _ = adapted(name)
    models.save_adapters(model, params, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        pretrained.FIXTURES / name, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS), expected, atol=2e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_a_reward_models_adapters_and_head(tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    model, params, _ = adapted("llama_biases")
    model, params = models.with_scalar_head(model, params, jax.random.key(2))
    models.save_adapters(model, params, tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        pretrained.FIXTURES / "llama_biases", num_labels=1, pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(TOKENS.astype(np.int64))).logits.numpy()
    ours = model.apply({"params": params}, TOKENS, method="scalars")
    np.testing.assert_allclose(ours[:, -1:], expected, atol=2e-5)


@pytest.fixture(scope="module")
def tiny_lora():
    """The tiny model with adapters that have been trained, in float64."""
    model = models.Decoder(dataclasses.replace(TINY, lora=Lora(rank=2, dropout=0.1)))
    params = models.init_params(model, jax.random.key(0))
    return in_float64(
        model,
        jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params),
    )


def test_the_base_as_the_reference_is_a_copy_with_fresh_adapters(tiny_lora, float64):
    """The same losses, measurements and gradients in both modes."""
    model, params = tiny_lora
    adapters, base = partition(params, ADAPTERS)
    fresh = jax.tree.map(jnp.copy, adapters)
    fresh["layers"] |= {k: jnp.zeros_like(v) for k, v in fresh["layers"].items() if k[-1] == "b"}
    batch = packing.pack(random_groups(0, 4), row_length=32)
    found = []
    for mode, held in (("live", merge(base, fresh)), ("adapter", {})):
        config = config_lib.default("dpo")
        config.reference.mode = mode
        algorithm = algorithms.build(config)
        asked = model if mode == "live" else models.without_adapters(model)
        live = Live(models.packed(asked), shared=mode == "adapter")

        @jax.jit
        def objective(adapters, held, algorithm=algorithm, live=live):
            said = live.logps(algorithm.reference_logps, held, base, batch)
            output = models.packed(model)(merge(adapters, base), batch, jax.random.key(1))
            objective = algorithm.loss(output, batch, algorithms.LossInputs(said))
            return objective.loss.values.sum(), objective

        found.append(jax.grad(objective, has_aux=True)(adapters, held))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    assert np.abs(found[0][1].metrics["rewards/margins"].values).min() > 1e-3


@pytest.mark.parametrize("name", ["pythia", "phi3", pytest.param("gpt2", marks=pytest.mark.long)])
def test_saved_adapters_merge_as_ours_do(name, tmp_path):
    model, params, base = adapted(name)
    models.save_adapters(model, params, tmp_path)
    plain, merged = models.merge_adapters(model, params)
    saved = huggingface.SavedAdapters(tmp_path)
    assert saved.base == str(pretrained.FIXTURES / name)
    ours = saved.merge(plain, jax.tree.map(jnp.copy, base))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama_biases"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_a_run_begins_with_adapters_of_peft(name, settings, tmp_path):
    """As PeftModel reads them, with ranks and alphas that differ from module to module."""
    peft = pytest.importorskip("peft")
    import torch

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(pretrained.FIXTURES / name)
    targets = {"gpt2": ["c_attn", "mlp.c_fc"], "llama_biases": ["q_proj", "down_proj"]}[name]
    config = peft.LoraConfig(
        r=2,
        target_modules=targets,
        rank_pattern={targets[1]: 3},
        # Anchored at the start of the module's name, or not.
        alpha_pattern={targets[1]: 5, f"^.*0.*{targets[0]}": 7},
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        **settings,
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(TOKENS.astype(np.int64))).logits.numpy()
    config = config_lib.default("sft")
    config.model.init_from, config.data.max_length = str(tmp_path), 32
    source = weights.find(config, tmp_path / "run")
    model = weights.build_model(config, source, 40)
    params = weights.load(config, source, model, huggingface.abstract_params(model))
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS), expected, atol=2e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_an_embedding_that_peft_unties_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(pretrained.FIXTURES / "llama3")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    model, params = models.from_pretrained(pretrained.FIXTURES / "llama3")
    with pytest.raises(UserError, match="unties from the head of"):
        huggingface.SavedAdapters(tmp_path).merge(model, params)


def test_adapters_of_a_classifier_keep_its_padding(tmp_path):
    """Whatever the tokenizer pads with; so a run may begin with them as with the classifier."""
    tokenizer = transformers.ByT5Tokenizer()
    write_model(tmp_path / "hf", {**QWEN3, "pad_token_id": 7})
    model, params = models.from_pretrained(tmp_path / "hf")
    model, params = models.with_scalar_head(model, params, jax.random.key(2))
    models.save_pretrained(model, params, tmp_path / "classifier", tokenizer=tokenizer)
    path = tmp_path / "classifier" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 7}))

    model = huggingface.read_model(tmp_path / "classifier", lora=Lora(2))
    assert model.config.pad_token_id == 7
    trained = models.init_params(model, jax.random.key(4))
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    models.save_adapters(model, trained, tmp_path / "adapters")
    beside, note = models.padding_beside_adapters(model, tokenizer)
    assert beside.pad_token == tokenizer.pad_token
    assert note.endswith("model.config.pad_token_id = 7 after loading")
    beside.save_pretrained(tmp_path / "adapters")

    config = config_lib.default("reward")
    config.model.init_from = str(tmp_path / "adapters")
    config.data.max_length = 64
    source = weights.find(config, tmp_path / "run")
    again = weights.build_model(config, source, 384)
    assert again.config.pad_token_id == 7
    found = weights.load(config, source, again, huggingface.abstract_params(again))
    base = models.from_pretrained(tmp_path / "classifier")[1]
    ours = merge(base, partition(trained, ADAPTERS)[0]) | {"score": trained["score"]}
    np.testing.assert_allclose(
        again.apply({"params": found}, TOKENS, method="scalars"),
        model.apply({"params": ours}, TOKENS, method="scalars"),
        atol=1e-5,
    )


@pytest.mark.parametrize("saved", ["adapters", "base"])
def test_a_run_from_adapters_keeps_the_tokenizer_that_was_saved_beside_them(saved, tmp_path):
    """And nothing of the other one: its template would win over what there is, or is not."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model, params, _ = adapted("llama3")
    models.save_adapters(model, params, tmp_path / "adapters", base=str(tmp_path / "hf"))
    shutil.copytree(pretrained.FIXTURES / "llama3", tmp_path / "hf")
    for name, talks in (("adapters", saved == "adapters"), ("hf", saved == "base")):
        tokenizer = transformers.ByT5Tokenizer(chat_template=template if talks else None)
        tokenizer.save_pretrained(tmp_path / name)
    config = config_lib.default("sft")
    config.model.init_from, config.data.max_length = str(tmp_path / "adapters"), 32
    source = weights.find(config, tmp_path / "run")
    (tmp_path / "run").mkdir()
    weights.keep(source, weights.build_model(config, source, 40), tmp_path / "run")
    kept = weights.kept(tmp_path / "run")
    assert not (kept.pretrained / "adapter_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(kept.tokenizer)
    assert tokenizer.chat_template == (template if saved == "adapters" else None)


def test_adapters_without_an_alpha_have_that_of_peft(tmp_path):
    model, params, base = adapted("llama3", rank=2, alpha=8.0)
    models.save_adapters(model, params, tmp_path)
    path = tmp_path / "adapter_config.json"
    described = json.loads(path.read_text())
    assert described.pop("lora_alpha") == 8
    path.write_text(json.dumps(described))
    plain, merged = models.merge_adapters(model, params)
    ours = huggingface.SavedAdapters(tmp_path).merge(plain, base)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
