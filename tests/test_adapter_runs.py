"""Runs with adapters: what is trained, saved and exported, and what runs begin from."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from test_adapters import TOKENS
from test_weights import MIXTURE, QWEN3, small, write_model

from jaxpref import (
    checkpoint,
    config as config_lib,
    evaluation,
    export,
    identity,
    metrics,
    models,
    optimizer as optimizer_lib,
    sharding,
    train,
    weights,
)
from jaxpref.errors import UserError
from jaxpref.models import Lora, huggingface
from jaxpref.models.adapters import ADAPTERS
from jaxpref.trainable import partition

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two DPO runs with adapters: the reference a copy, and the base."""
    folder = tmp_path_factory.mktemp("adapters")
    write_model(folder / "hf", QWEN3)
    for mode in ("live", "adapter"):
        config = lora_run(folder / "hf", reference__mode=mode, model__lora__dropout=0.1)
        train.run(config, folder / mode)
    return folder


def lora_run(source, algorithm="dpo", **changes):
    return small(algorithm, source, **{"model__lora__rank": 2, **changes})


def lines_of(workdir):
    return metrics.read(workdir / "metrics.jsonl")


def test_only_adapters_are_trained_saved_and_have_optimizer_state(folder, capsys):
    config = lora_run(folder / "hf")
    model = models.build(config.model, 400)
    adapters = sum(x.size for x in jax.tree.leaves(huggingface.abstract_params(model)))
    optimizer, _ = optimizer_lib.build(config.optimizer, 1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state, frozen = train.abstract_state(model, optimizer, mesh, config_lib.trainable(config))
    assert set(state.policy) == {"layers"}
    names = set(state.policy["layers"])
    assert names == {f"{p}_lora_{ab}" for p in models.config.ADAPTABLE for ab in "ab"}
    trained = sum(x.size for x in jax.tree.leaves(state.policy))
    moments = sum(x.size for x in jax.tree.leaves(state.roles["policy"].optimizer_state) if x.ndim)
    assert moments == 2 * trained
    assert trained + sum(x.size for x in jax.tree.leaves(frozen)) == adapters
    # The base in the workdir is what it was.
    base = huggingface.abstract_params(models.without_adapters(the_model(folder)))
    kept = checkpoint.restore_frozen(folder / "live", base)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(read(folder / "hf")), strict=True):
        np.testing.assert_array_equal(a, b)


def the_model(folder):
    return huggingface.read_model(folder / "hf", lora=Lora(2))


def read(directory):
    return models.from_pretrained(directory)[1]


def test_the_base_is_the_reference_without_a_second_copy(folder):
    live, adapter = lines_of(folder / "live"), lines_of(folder / "adapter")
    assert [x["step"] for x in live] == [x["step"] for x in adapter] == [0, 1, 2, 2]
    for lines in (live, adapter):
        assert lines[0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-5)
        assert abs(lines[-1]["eval/rewards/margins"]) > 1e-3
    assert not (folder / "adapter" / "reference").exists()
    kept, _ = partition(huggingface.abstract_params(the_model(folder)), ADAPTERS)
    assert jax.tree.leaves(checkpoint.restore_reference(folder / "live", kept))


@pytest.mark.long
def test_a_run_with_adapters_resumes_bit_for_bit(folder, tmp_path):
    """Dropout's masks depend on seed and step alone; where the weights were is forgotten."""
    config = lora_run(folder / "hf", model__lora__dropout=0.1, train__steps=4)
    train.run(config, tmp_path / "whole")
    shutil.copytree(folder / "live", tmp_path / "parts")
    config.model.init_from = str(tmp_path / "gone")
    train.run(config, tmp_path / "parts")
    abstract = huggingface.abstract_params(the_model(folder))
    (one, _), (other, _) = (
        checkpoint.restore_params(tmp_path / name, abstract) for name in ("whole", "parts")
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_export_merges_or_writes_the_adapters(folder, tmp_path):
    export.run(folder / "adapter", tmp_path / "merged")
    export.run(folder / "adapter", tmp_path / "adapters", adapters=True)
    described = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str((folder / "hf").resolve())
    model = the_model(folder)
    params, _ = checkpoint.restore_params(folder / "adapter", huggingface.abstract_params(model))
    merged, weights = models.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(
        merged.apply({"params": weights}, TOKENS),
        model.apply({"params": params}, TOKENS),
        atol=1e-5,
    )


@pytest.mark.long
def test_a_run_from_adapters_resumes_and_exports_without_them(folder, tmp_path):
    export.run(folder / "adapter", tmp_path / "adapters", adapters=True)
    train.run(small("dpo", tmp_path / "adapters"), tmp_path / "run")
    assert lines_of(tmp_path / "run")[0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-5)
    shutil.rmtree(tmp_path / "adapters")
    train.run(small("dpo", tmp_path / "adapters", train__steps=3), tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= names
    assert "adapter_config.json" not in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "sets use_dora=True, which jaxpref does not know; merge"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which jaxpref does not"),
        ({"base_model_name_or_path": "nowhere"}, "adapters for the model 'nowhere', which cannot"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(changes, message, folder, tmp_path):
    export.run(folder / "adapter", tmp_path / "adapters", adapters=True)
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        train.run(small("dpo", tmp_path / "adapters"), tmp_path / "run")


def test_adapters_for_adapters_and_a_config_that_is_none_are_refused(folder, tmp_path):
    export.run(folder / "adapter", tmp_path / "one", adapters=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    path = tmp_path / "two" / "adapter_config.json"
    other = {"base_model_name_or_path": str(tmp_path / "one")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    with pytest.raises(UserError, match="one holds adapters, too"):
        train.run(small("dpo", tmp_path / "two"), tmp_path / "run")
    path.write_text("[]")
    with pytest.raises(UserError, match="should be a JSON object; got list"):
        train.run(small("dpo", tmp_path / "two"), tmp_path / "run")


@pytest.mark.long
def test_a_reward_models_adapters_score_and_train_on(folder, tmp_path):
    train.run(lora_run(folder / "hf", "reward"), tmp_path / "reward")
    export.run(tmp_path / "reward", tmp_path / "adapters", adapters=True)
    pair = {"prompt": "Is it good?", "chosen": " Yes", "rejected": " No"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")

    def rewards(model):
        evaluation.score_file(model, str(tmp_path / "pairs.jsonl"), tmp_path / "scored")
        return json.loads((tmp_path / "scored").read_text())["scores"]

    here = rewards(tmp_path / "reward")
    np.testing.assert_allclose(rewards(tmp_path / "adapters"), here, atol=1e-5)
    train.run(small("reward", tmp_path / "adapters", train__steps=1), tmp_path / "again")
    before, after = lines_of(tmp_path / "reward"), lines_of(tmp_path / "again")
    assert after[0]["eval/mean_reward"] == pytest.approx(before[-1]["eval/mean_reward"], abs=1e-5)
    with pytest.raises(UserError, match="is a reward model or a classifier, whose head gives no"):
        train.run(small("dpo", tmp_path / "adapters"), tmp_path / "policy")


def test_experts_have_no_adapters_and_attention_has_by_default(tmp_path):
    write_model(tmp_path / "hf", MIXTURE)

    def adapted_of(**changes):
        config = lora_run(tmp_path / "hf", "sft", **changes)
        model = weights.build_model(config, weights.find(config, tmp_path / "run"), 384)
        found, _ = partition(huggingface.abstract_params(model), ADAPTERS)
        return {name.partition("_")[0] for name in found["layers"]}

    assert adapted_of() == {"query", "key", "value", "out"}
    assert adapted_of(model__lora__targets=("query",)) == {"query"}
    with pytest.raises(UserError, match="experts have no adapters; leave out gate"):
        adapted_of(model__lora__targets=("up",))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_an_export_by_itself(folder, tmp_path):
    """Base, adapters and tokenizer are found from the directory alone."""
    peft = pytest.importorskip("peft")
    import torch

    export.run(folder / "adapter", tmp_path / "adapters", adapters=True)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapters")
    model = the_model(folder)
    params, _ = checkpoint.restore_params(folder / "adapter", huggingface.abstract_params(model))
    tokens = np.array([tokenizer("What?").input_ids])
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    ours = model.apply({"params": params}, tokens.astype(np.int32))
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_adapters_name_the_base_that_they_belong_to_or_say_what_to_export(folder, tmp_path):
    def base_of(source, **changes):
        """Of a run that began there, as it describes itself."""
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        config = lora_run(source, "sft", **changes)
        identity.write(run, identity.describe(config))
        return run, lambda: weights.base_of(run)

    first, base = base_of(folder / "hf")
    assert base() == str((folder / "hf").resolve())
    # Adapters that went on belong to the base of the first run.
    assert base_of(first)[1]() == base()
    assert base_of("owner/model")[1]() == "owner/model"
    full, _ = base_of(folder / "hf", model__lora__rank=0)
    for source, changes, message in (
        ("", {}, "belong to random weights; export without --adapters"),
        (full, {}, f"Export those first .*--workdir={full} .* then give --base=BASE"),
        (tmp_path / "gone", {}, "not there any more; say where it is with --base"),
        (folder / "hf", {"train__trainable": "norm"}, "more than adapters may have been trained"),
        (folder / "hf", {"model__lora__rank": 0}, "that run has no adapters"),
    ):
        with pytest.raises(UserError, match=message):
            base_of(source, **changes)[1]()
    export.run(folder / "adapter", tmp_path / "out", adapters=True, base="owner/model")
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "owner/model"


@pytest.fixture(scope="module")
def sft(folder):
    """SFT of the adapters alone."""
    train.run(lora_run(folder / "hf", "sft"), folder / "sft")
    return folder / "sft"


@pytest.mark.long
def test_adapters_go_on_from_another_run(sft, tmp_path):
    with pytest.raises(UserError, match=r"model.lora.rank is 2 there and 0 here"):
        train.run(small("dpo", sft), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["adapter", "live", "precomputed", "synced"])
def test_the_reference_is_the_policy_that_training_starts_from(mode, sft, tmp_path):
    """SFT's adapters are DPO's first policy, and they are on in its reference."""
    config = lora_run(sft, reference__mode=mode, train__steps=1)
    if mode == "synced":
        config.reference.sync_mix = 1.0
    train.run(config, tmp_path)
    first = lines_of(tmp_path)[0]
    assert first["eval/loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.long
def test_adapters_of_the_reference_resume_from_the_workdir(sft, folder, tmp_path):
    live, adapter = (
        lora_run(sft, reference__mode=mode, train__steps=1) for mode in ("live", "adapter")
    )
    for config, name in ((live, "live"), (adapter, "adapter")):
        train.run(config, tmp_path / name)
        # Where the weights were is forgotten.
        config.update_from_flattened_dict({"train.steps": 2, "model.init_from": str(folder)})
        train.run(config, tmp_path / name)
    for ours, theirs in zip(
        lines_of(tmp_path / "adapter"), lines_of(tmp_path / "live"), strict=True
    ):
        for key in ("loss", "eval/loss", "eval/rewards/margins"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)
    shutil.rmtree(tmp_path / "adapter" / "reference")
    with pytest.raises(UserError, match="frozen reference of this run cannot be found"):
        train.run(adapter.copy_and_resolve_references(), tmp_path / "adapter")


@pytest.mark.long
def test_any_part_can_be_trained_by_a_pattern(folder, tmp_path):
    config = small("sft", folder / "hf", train__trainable="norm/scale|^embedding")
    train.run(config, tmp_path / "run")
    model = huggingface.read_model(folder / "hf")
    after, _ = checkpoint.restore_params(tmp_path / "run", huggingface.abstract_params(model))
    before = read(folder / "hf")
    trained, frozen = partition(after, config.train.trainable)
    was_trained, was_frozen = partition(before, config.train.trainable)
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(was_frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(was_trained), strict=True):
        assert not np.array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__trainable": "no_such"}, "no part of any parameter's path; there are embedding"),
        ({"train__trainable": "("}, "no regular expression"),
        ({"reference__mode": "adapter"}, "give it some with --config.model.lora.rank=16"),
        (
            {"model__lora__rank": 2, "model__lora__dropout": 1.0},
            "dropout should be from 0 to below 1",
        ),
        (
            {"model__lora__rank": 2, "reference__mode": "adapter", "train__trainable": "norm"},
            "leave train.trainable empty",
        ),
        ({"model__lora__rank": 2, "model__lora__targets": ("q_proj",)}, "some of query, key"),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.run(small("dpo", folder / "hf", **changes), tmp_path)


@pytest.mark.long
def test_a_bfloat16_reference_takes_half_the_room(folder, tmp_path):
    train.run(small("dpo", folder / "hf", reference__dtype="bfloat16"), tmp_path)
    model = huggingface.read_model(folder / "hf", param_dtype="bfloat16")
    reference = checkpoint.restore_reference(tmp_path, huggingface.abstract_params(model))
    for ours, exact in zip(
        jax.tree.leaves(reference), jax.tree.leaves(read(folder / "hf")), strict=True
    ):
        np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))
    assert lines_of(tmp_path)[0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-2)
