"""Hugging Face models in and out: parity with transformers, for every family."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import pytest
from conftest import in_float64, response_logps
from safetensors import safe_open

from jaxpref import config as config_lib, models, packing, sharding, weights
from jaxpref.errors import UserError
from jaxpref.logprobs import from_logits
from jaxpref.models.experts import load_balancing_loss
from jaxpref.models.huggingface import safetensors
from jaxpref.models.huggingface.families import FAMILIES

# One case a family, for what does not depend on its variants.
FAMILY_CASES = [
    *("gpt2", "gptj", "pythia", "opt", "opt_post_norm", "llama3", "mistral", "qwen2_windows"),
    *("qwen3", "gemma2", "gemma3", "phi3_long", "qwen3_moe", "mixtral"),
]
# Families whose parts are those of others.
ALIKE = ("opt", "mistral", "qwen2_windows", "qwen3", "mixtral")
# Also those in which tokens look at each other as in another.
SEEN_ALIKE = (*ALIKE, "gptj", "opt_post_norm", "gemma2")
LENGTH = pretrained.LENGTH


def read(directory, **options):
    return models.from_pretrained(directory, max_length=LENGTH, **options)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.long] if name in SEEN_ALIKE else [])
        for name in FAMILY_CASES
    ],
)
def family(request):
    return in_float64(*read(pretrained.FIXTURES / request.param))


def nll_and_logits(model, tokens):
    tokens = jnp.asarray(tokens)

    def function(params):
        logits = model.apply({"params": params}, tokens)
        return -from_logits(logits[:, :-1], tokens[:, 1:]).mean(), logits

    return function


def assert_parity(directory, said):
    model, params = read(directory)
    _, expected = read(directory / "gradient")
    gradient, logits = jax.jit(jax.grad(nll_and_logits(model, said["tokens"]), has_aux=True))(
        params
    )
    assert np.abs(logits - said["logits"]).max() < 1e-4
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(np.abs(theirs).max()), 1e-3)
        assert np.abs(ours - theirs).max() < 1e-4 * scale, path
        assert np.abs(theirs).max() > 0, path


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n in ALIKE else []) for n in pretrained.CASES],
)
def test_logits_and_gradient_equal_transformers(name):
    directory = pretrained.FIXTURES / name
    assert_parity(directory, np.load(directory / "said.npz"))


def test_every_family_has_a_case():
    kinds = {
        json.loads((pretrained.FIXTURES / name / "config.json").read_text())["architectures"][0]
        for name in pretrained.CASES
    }
    assert kinds == set(FAMILIES)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", pretrained.CASES)
def test_logits_and_gradient_equal_transformers_live(name, tmp_path):
    assert_parity(tmp_path, pretrained.make(name, tmp_path, seed=100))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_bfloat16_ranks_the_next_token_alike(name, tmp_path):
    """Wherever the best token leads by more than bfloat16's noise, both sides choose it."""
    theirs = pretrained.make(name, tmp_path, seed=7, dtype="bfloat16")["logits"]
    tokens = np.load(tmp_path / "said.npz")["tokens"]
    model, params = read(tmp_path, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    ours = np.asarray(model.apply({"params": params}, tokens))
    model, params = read(tmp_path)
    exact = np.asarray(model.apply({"params": params}, tokens))
    noise = np.abs(theirs - exact).max()
    assert np.abs(ours - exact).max() < 2 * noise
    second, first = np.moveaxis(np.sort(exact)[..., -2:], -1, 0)
    clear = first - second > noise
    assert clear.mean() > 0.1
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", pretrained.CASES)
def test_transformers_reads_what_was_trained_and_exported(name, tmp_path):
    import torch
    import transformers

    model, params = read(pretrained.FIXTURES / name)
    key = jax.random.key(0)
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), params)
    models.save_pretrained(model, params, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    tokens = np.load(pretrained.FIXTURES / name / "said.npz")["tokens"]
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, atol=1e-5)


def stored(directory):
    """Every tensor's dtype, shape and bytes, as the safetensors library reads them."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                tensors[name] = (piece.get_dtype(), piece.get_shape())
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        body = raw[8 + int.from_bytes(raw[:8], "little") :]
        for name in tensors.keys() & header.keys():
            start, end = header[name]["data_offsets"]
            tensors[name] = (*tensors[name], body[start:end])
    return tensors


def rewrite(source, target, dtype, **options):
    """The same checkpoint in another dtype, or in several files."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    files = safetensors.TensorFiles(source)
    for path in target.glob("*.safetensors"):
        path.unlink()
    tensors = {name: (tensor.shape, dtype) for name, tensor in files.stored.items()}
    safetensors.write(target, tensors, files.read, **options)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama3", "gemma3", "phi3", "qwen3_moe"])
def test_import_then_export_is_bit_identical(name, dtype, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    rewrite(pretrained.FIXTURES / name, source, dtype)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / file).write_text(f'{{"file": "{file}"}}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "merges.txt").write_text("a b\n")
    models.save_pretrained(*read(source), target)
    assert stored(target) == stored(source)
    others = {path.name for path in source.iterdir() if path.is_file()} - {"said.npz"}
    assert {path.name for path in target.iterdir()} == others
    for file in others - {"model.safetensors"}:
        assert (target / file).read_bytes() == (source / file).read_bytes()


def test_many_files_with_an_index_are_one_checkpoint(tmp_path):
    source = pretrained.FIXTURES / "qwen3_moe"
    whole = read(source)
    models.save_pretrained(*whole, tmp_path, shard_bytes=10_000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert stored(tmp_path) == stored(source)
    index = json.loads((tmp_path / safetensors.INDEX).read_text())
    assert set(index["weight_map"]) == set(stored(source))
    assert index["metadata"]["total_size"] == sum(len(x[2]) for x in stored(source).values())
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(read(tmp_path)[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_bare_models_names_and_its_buffers(tmp_path):
    """GPT-2's checkpoints on the hub lack the prefix and hold attention's masks."""
    source = pretrained.FIXTURES / "gpt2"
    shutil.copy(source / "config.json", tmp_path)
    files = safetensors.TensorFiles(source)
    names = {name.removeprefix("transformer."): name for name in files.stored}
    mask = np.tril(np.ones((1, 1, 4, 4), np.float32))
    tensors = {name: (files.stored[whole].shape, "F32") for name, whole in names.items()}
    tensors["h.0.attn.bias"] = (mask.shape, "F32")
    safetensors.write(tmp_path, tensors, lambda n: files.read(names[n]) if n in names else mask)
    (model, params), (_, expected) = read(tmp_path), read(source)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    models.save_pretrained(model, params, tmp_path / "out")
    assert set(stored(tmp_path / "out")) == set(names)


def test_a_tied_head_that_is_stored_too_is_written_too(tmp_path):
    source = pretrained.FIXTURES / "llama3"
    files = safetensors.TensorFiles(source)
    names = {name: name for name in files.stored} | {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = {name: (files.stored[whole].shape, "F32") for name, whole in names.items()}
    shutil.copy(source / "config.json", tmp_path)
    safetensors.write(tmp_path, tensors, lambda name: files.read(names[name]))
    models.save_pretrained(*read(tmp_path), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(tmp_path)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    "name",
    ["gpt2", "qwen3_moe", *(pytest.param(n, marks=pytest.mark.long) for n in ("pythia", "phi3"))],
)
def test_weights_go_into_their_shards_and_back(name, shape, tmp_path):
    source = pretrained.FIXTURES / name
    mesh = sharding.make_mesh(*shape)
    model, params = read(source, mesh=mesh)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(read(source)[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    models.save_pretrained(model, params, tmp_path)
    assert stored(tmp_path) == stored(source)


def test_every_layout_gives_the_same_response_logps(family, float64):
    """Alone, right-padded, left-padded, packed one by one, and as a tree."""
    model, params = family
    rng = np.random.default_rng(3)

    def ids(longest):
        return rng.integers(3, 40, rng.integers(2, longest), dtype=np.int32)

    groups = [packing.Group(ids(7), [ids(7), ids(6)]) for _ in range(3)]

    def pack(groups, planner=packing.plan_tree):
        # As many rows as a row each would take, so that all is compiled for one shape.
        def widened(*lengths):
            plan = planner(*lengths)
            return [*plan, *([] for _ in range(6 - len(plan)))]

        return packing.pack(groups, row_length=2 * LENGTH, planner=widened)

    @jax.jit
    def logps(batch):
        return response_logps(model, params, batch)

    apply = jax.jit(partial(model.apply, {"params": params}))
    tree = logps(pack(groups))
    padded = logps(pack(groups, packing.plan_padded))
    np.testing.assert_allclose(tree, padded, rtol=1e-9, atol=1e-9)
    singles = [packing.Group(g.prompt, [r]) for g in groups for r in g.responses]
    packed = logps(pack(singles))
    np.testing.assert_allclose(packed.ravel(), padded.ravel(), rtol=1e-9, atol=1e-9)

    # Left-padded, through the plain interface.
    rows = [np.concatenate([g.prompt, g.responses[0]]) for g in groups]
    tokens = np.stack([np.pad(row, (LENGTH - len(row), 0)) for row in rows])
    pads = np.array([LENGTH - len(row) for row in rows])
    index = np.arange(LENGTH)
    positions = np.maximum(index[None] - pads[:, None], 0)
    real = (index[None] >= pads[:, None]).astype(int)
    tree = packing.Tree(group=real, branch=np.zeros_like(real))
    logits = apply(tokens, positions, tree)
    each = from_logits(logits[:, :-1], jnp.asarray(tokens[:, 1:]))
    left = [each[i, LENGTH - 1 - len(g.responses[0]) :].sum() for i, g in enumerate(groups)]
    np.testing.assert_allclose(np.stack(left), padded[:, 0], rtol=1e-9, atol=1e-9)

    alone = apply(rows[0][None])
    targets = jnp.asarray(rows[0][None, 1:])
    expected = from_logits(alone[:, :-1], targets)[0, len(groups[0].prompt) - 1 :].sum()
    np.testing.assert_allclose(padded[0, 0], expected, rtol=1e-9, atol=1e-9)


def test_step_by_step_decoding_gives_the_full_forward_pass(family, float64):
    """Prompts padded left and right, then one token at a time in two branches of each."""
    model, params = family
    rng = np.random.default_rng(4)
    tokens = rng.integers(3, 40, (2, 2, LENGTH), dtype=np.int32)
    # Prompt 0 has 5 tokens after 3 places of padding, prompt 1 has 6 before 2.
    start = np.array([5, 6])
    for prompt, length in enumerate(start):
        tokens[prompt, 1, :length] = tokens[prompt, 0, :length]
    flat = tokens.reshape(4, LENGTH)
    apply = jax.jit(partial(model.apply, {"params": params}))
    full = apply(flat).reshape(2, 2, LENGTH, -1)
    prompts = np.zeros((2, 8), np.int32)
    prompts[0, 3:], prompts[1, :6] = tokens[0, 0, :5], tokens[1, 0, :6]
    real = np.stack([np.arange(8) >= 3, np.arange(8) < 6])
    unrolled, weights = models.unroll(model, params)
    variables = {"params": weights}

    @jax.jit
    def begin(prompts, real):
        hidden, kept = unrolled.apply(variables, prompts, real, method="prefill")
        cache = models.branch(kept, real, branches=2, slots=LENGTH - 6)
        return unrolled.apply(variables, method="lm_head").logits(hidden), cache

    both = np.arange(2)
    logits, cache = begin(prompts, real)
    np.testing.assert_allclose(logits, full[both, 0, start - 1], atol=1e-9)

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = unrolled.apply(variables, tokens, positions, cache, method="step")
        return unrolled.apply(variables, method="lm_head").logits(hidden), cache

    for number in range(LENGTH - 6):
        place = start + number
        positions = jnp.broadcast_to(jnp.asarray(place)[:, None], (2, 2))
        logits, cache = step(jnp.asarray(tokens[both, :, place]), positions, cache)
        np.testing.assert_allclose(logits, full[both, :, place], atol=1e-9)
    assert int(cache.places.used) == LENGTH - 6


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_load_balancing_loss_equals_transformers(name):
    directory = pretrained.FIXTURES / name
    said = np.load(directory / "said.npz")
    model, params = read(directory)
    _, sown = model.apply(
        {"params": params}, said["tokens"], method="hidden_states", mutable=["intermediates"]
    )
    (logits,) = sown["intermediates"]["router_logits"]
    real = jnp.ones(logits.shape[1], bool)
    loss = load_balancing_loss(logits, real, model.config.experts_per_token)
    np.testing.assert_allclose(loss, said["router_loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["phi3_long", "llama_dynamic"])
def test_positions_that_are_not_known_are_refused_or_give_nan(name):
    """Rather than logits of a model that nobody trained."""
    model, params = models.from_pretrained(pretrained.FIXTURES / name)
    tokens = jnp.ones((1, 14), jnp.int32)
    with pytest.raises(ValueError, match=r"14 tokens, but the model knows only 12 .*max_length="):
        model.apply({"params": params}, tokens)
    logits = model.apply({"params": params}, tokens, jnp.arange(14)[None])
    assert np.isnan(logits[0, 12:]).all()
    assert np.isfinite(model.apply({"params": params}, tokens[:, :12])).all()


def test_positions_scaled_for_long_texts_are_told(tmp_path, capsys):
    """The original scales them by the longest text of a call; here by data.max_length."""
    config = config_lib.default("sft")
    for name, length, told in (("phi3_long", 12, False), ("llama_dynamic", 17, True)):
        config.model.init_from = str(pretrained.FIXTURES / name)
        config.data.max_length = length
        model = weights.build_model(config, weights.find(config, tmp_path), 40)
        assert model.config.max_length == length
        assert (f"({length}) is beyond the 12 that" in capsys.readouterr().out) == told


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(pretrained.FIXTURES / "llama3", tmp_path / "model")


def change_config(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, r"RwkvForCausalLM.*jaxpref knows GPT2LMHeadModel"),
        ({"architectures": "remove"}, "its architecture is None"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', which jaxpref does not"),
        ({"quantization_config": {"bits": 4}}, "sets quantization_config="),
        ({"attention_sinks": 4}, "sets attention_sinks=4, which jaxpref does not know"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type is 'proportional'",
        ),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.input_layernorm.weight.* and 4 more"),
        ({"num_hidden_layers": 1}, r"has model.layers.1.*does not call for"),
        ({"intermediate_size": 28}, r"mlp.down_proj.weight is \(16, 24\), not \(16, 28\)"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(copy, changes, message):
    change_config(copy, **changes)
    with pytest.raises(UserError, match=message):
        models.from_pretrained(copy)


@pytest.mark.parametrize("text", ["{", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_config_that_cannot_be_read_is_named(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"model/config.json: (is no JSON|transformers cannot)"):
        models.from_pretrained(copy)


def test_an_unknown_key_can_be_ignored_by_name(copy):
    change_config(copy, attention_sinks=4)
    model, _ = models.from_pretrained(copy, ignore=["attention_sinks"])
    assert model.config.width == 16


def test_damaged_files_are_named(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: .* should end at byte .* damaged"):
        models.from_pretrained(copy)
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match="its header should have"):
        models.from_pretrained(copy)
    path.write_bytes(whole[:8] + b"x" + whole[9:])
    with pytest.raises(UserError, match="its header is no JSON"):
        models.from_pretrained(copy)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        models.from_pretrained(copy)


def test_pickles_and_missing_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle.*Convert it"):
        models.from_pretrained(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds neither"):
        models.from_pretrained(copy)
    (copy / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="which is not there"):
        models.from_pretrained(copy)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no config"):
        models.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a directory nor a hub name"):
        models.from_pretrained(tmp_path / "nothing")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"the hub could not give it.*give the path"):
        models.from_pretrained("owner/model")


def test_a_model_of_no_family_cannot_be_written(tiny_model, tiny_params, tmp_path):
    with pytest.raises(UserError, match="has no origin that says which family it is of"):
        models.save_pretrained(tiny_model, tiny_params, tmp_path)
