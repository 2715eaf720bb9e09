"""Runs that begin with a Hugging Face model, and their way back out."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import transformers

from jaxpref import (
    checkpoint,
    config as config_lib,
    evaluation,
    export,
    identity,
    metrics,
    models,
    train,
)
from jaxpref.errors import UserError
from jaxpref.models import huggingface
from jaxpref.models.huggingface import Origin
from jaxpref.rewards import RewardModel

pytestmark = pytest.mark.usefixtures("one_device")

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MIXTURE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "router_aux_loss_coef": 0.5,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 384,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 100,
}


def write_model(directory, config, *, dtype=None, tokenizer=None):
    """A Hugging Face directory with random weights and, by default, the tokenizer of bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    model = huggingface.read_model(directory)
    text = json.dumps(config, indent=2)
    model = model.clone(origin=Origin(config["architectures"][0], config=text))
    params = models.init_params(model, jax.random.key(3))
    tokenizer = tokenizer or transformers.ByT5Tokenizer()
    models.save_pretrained(model, params, directory, tokenizer=tokenizer, dtype=dtype)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face model in bfloat16, SFT from it, and DPO from that."""
    folder = tmp_path_factory.mktemp("weights")
    write_model(folder / "hf", QWEN3, dtype="bfloat16")
    train.run(small("sft", folder / "hf"), folder / "sft")
    train.run(small("dpo", folder / "sft"), folder / "dpo")
    return folder


def small(algorithm, source, **changes):
    config = config_lib.default(algorithm)
    config.update_from_flattened_dict(
        {
            "model.init_from": str(source),
            "data.format": "synthetic",
            "data.synthetic_pairs": 40,
            "data.eval_fraction": 0.2,
            "data.batch_size": 8,
            "data.max_length": 128,
            "data.max_prompt_length": 64,
            "optimizer.learning_rate": 1e-2,
            "train.steps": 2,
            "train.log_every": 1,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    return config


def weights_of(directory):
    return jax.tree.map(np.asarray, models.from_pretrained(directory)[1])


def test_a_run_begins_with_the_models_weights_and_shape(folder):
    """Before the first update the reference is what the directory holds."""
    model = huggingface.read_model(folder / "hf")
    abstract = huggingface.abstract_params(model)
    reference = checkpoint.restore_reference(folder / "dpo", abstract)
    trained, _ = checkpoint.restore_params(folder / "sft", abstract)
    for ours, theirs in zip(jax.tree.leaves(reference), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    begun = weights_of(folder / "hf")
    assert {key: value.shape for key, value in begun["layers"].items() if key == "query"} == {
        "query": (2, 16, 2, 8)
    }
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(begun), jax.tree.leaves(trained), strict=True)
    ]
    assert all(changed)


def test_the_last_checkpoint_is_exported_with_names_dtypes_and_files(folder, tmp_path):
    export.run(folder / "dpo", tmp_path / "out")
    before = huggingface.Origin("Qwen3ForCausalLM", str(folder / "hf"))
    after = huggingface.Origin("Qwen3ForCausalLM", str(tmp_path / "out"))
    assert after.tensors() == before.tensors()
    assert {dtype for _, dtype in after.tensors().values()} == {"BF16"}
    names = {path.name for path in (folder / "hf").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "hf" / name).read_bytes()
    model = huggingface.read_model(folder / "hf")
    trained, _ = checkpoint.restore_params(folder / "dpo", huggingface.abstract_params(model))
    for ours, written in zip(
        jax.tree.leaves(trained), jax.tree.leaves(weights_of(tmp_path / "out")), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours.astype("bfloat16"), np.float32), written)


def test_conversations_train_and_their_template_goes_along(folder, tmp_path):
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    config = small("sft", folder / "hf", data__path=str(tmp_path / "talk.jsonl"), train__steps=1)
    config.data.update(format="messages", eval_fraction=0.0, batch_size=1)
    with pytest.raises(UserError, match=r"talk.jsonl:1: .* no chat template"):
        train.run(config, tmp_path / "refused")
    config.tokenizer.chat_template = "hh"
    train.run(config, tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    read = tokenizer.apply_chat_template(talk, tokenize=False)
    assert read == "\n\nHuman: Hello\n\nAssistant: Good day"


def test_an_export_in_another_dtype_says_so(folder, tmp_path):
    export.run(folder / "dpo", tmp_path, dtype="float32")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    model = huggingface.read_model(folder / "hf")
    trained, _ = checkpoint.restore_params(folder / "dpo", huggingface.abstract_params(model))
    for ours, written in zip(
        jax.tree.leaves(trained), jax.tree.leaves(weights_of(tmp_path)), strict=True
    ):
        np.testing.assert_array_equal(ours, written)


def test_resuming_and_exporting_need_only_the_workdir(folder, tmp_path):
    source, workdir = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(folder / "hf", source)
    train.run(small("dpo", source), workdir)
    source.rename(tmp_path / "moved")
    train.run(small("dpo", source, train__steps=3), workdir)
    assert [line["step"] for line in metrics.read(workdir / "metrics.jsonl")][-1] == 3
    export.run(workdir, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.mark.long
def test_a_model_from_scratch_is_exported_as_a_llama(tmp_path):
    config = small("sft", "", model__width=16, model__heads=2, model__kv_heads=1)
    config.model.update(head_dim=8, feed_forward=24, layers=1, rope_theta=500.0, norm_epsilon=1e-5)
    train.run(config, tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "out")
    model, params = models.from_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    ours = models.build(config.model, 384)
    assert model.config == ours.config
    trained, _ = checkpoint.restore_params(tmp_path / "run", huggingface.abstract_params(ours))
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_generation_stops_at_the_end_of_a_turn_too(tmp_path):
    """A base model's EOS is not what ends a turn in the template that it was trained with."""
    turns = ["<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.add_tokens(turns, special_tokens=True)
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    write_model(tmp_path / "hf", QWEN3, tokenizer=tokenizer)
    train.run(small("sft", tmp_path / "hf", train__steps=1), tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said["eos_token_id"] == [tokenizer.eos_token_id, end]


def test_a_tokenizer_that_is_saved_leaves_no_file_of_another(tmp_path):
    """A template's file would win over what the new tokenizer has, or has not."""
    talking = transformers.ByT5Tokenizer()
    talking.chat_template = CHATML
    source = write_model(tmp_path / "hf", QWEN3, tokenizer=talking)
    assert (source / "chat_template.jinja").exists()
    model, params = models.from_pretrained(source)
    plain = transformers.ByT5Tokenizer()
    models.save_pretrained(model, params, tmp_path / "out", tokenizer=plain)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_a_tokenizer_without_eos_names_no_token_to_stop_at(tmp_path):
    """None is said so: transformers would take an id of its own, which means something else."""
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.eos_token = None
    write_model(tmp_path / "hf", QWEN3, tokenizer=tokenizer)
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["eos_token_id"] is None
    assert not (tmp_path / "hf" / "generation_config.json").exists()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_knows_where_a_model_from_scratch_stops(tmp_path):
    """After a little training on one answer, `generate` gives that answer, EOS, and no more."""
    import torch

    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "Say ", "completion": "yes"}) + "\n")
    config = small("sft", "", data__format="sft", data__path=str(tmp_path / "one.jsonl"))
    config.data.update(batch_size=1, eval_fraction=0.0, max_length=16, max_prompt_length=8)
    config.model.update(width=16, heads=2, kv_heads=1, head_dim=8, feed_forward=24, layers=1)
    config.train.steps = 40
    train.run(config, tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for part in (theirs.config, theirs.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(part, name) == getattr(tokenizer, name)
    prompt = tokenizer("Say ", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        said = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(said) == "yes</s>"


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_llama_from_scratch(tmp_path):
    import torch

    config = config_lib.default("sft").model
    config.update(width=16, heads=2, kv_heads=1, head_dim=8, feed_forward=24, layers=2)
    config.update(rope_theta=500.0, tied_head=False)
    model = models.build(config, 384)
    params = models.init_params(model, jax.random.key(0))
    models.save_pretrained(model, params, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = np.arange(20, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, atol=1e-5)


@pytest.mark.long
def test_a_mixture_of_experts_trains_its_router_evenly_too(tmp_path):
    """The router's loss, which is 2 for an even use, is part of the loss and logged."""
    write_model(tmp_path / "hf", MIXTURE)
    train.run(small("dpo", tmp_path / "hf", data__rows=1), tmp_path / "run")
    before, first, *_ = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert 0.5 * 1.9 < first["router_loss"] < 0.5 * 4
    np.testing.assert_allclose(first["loss"], np.log(2) + first["router_loss"], rtol=1e-5)
    assert before["eval/loss"] == pytest.approx(np.log(2) + before["eval/router_loss"], rel=1e-5)


def test_a_shape_beside_a_model_that_has_one_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"model.width is 64, but the model of .* of its own"):
        train.run(small("dpo", folder / "hf", model__width=64), tmp_path)


def test_a_policy_does_not_begin_with_a_reward_model(tmp_path, folder):
    """From a workdir or from Hugging Face, with a head of its own or a tied one."""
    train.run(small("reward", folder / "hf", train__steps=1), tmp_path / "reward")
    export.run(tmp_path / "reward", tmp_path / "classifier")
    for source in ("reward", "classifier"):
        with pytest.raises(UserError, match=f"{source}: is a reward model .* sft begins with a"):
            train.run(small("sft", tmp_path / source), tmp_path / "run")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    write_model(tmp_path / "hf", {**QWEN3, "vocab_size": 300})
    with pytest.raises(UserError, match=r"has 300 rows, but the tokenizer .* 383 \(384 in all\)"):
        train.run(small("sft", tmp_path / "hf"), tmp_path / "run")


def test_sequences_longer_than_the_table_of_positions_are_refused(tmp_path):
    write_model(tmp_path / "hf", GPT2)
    with pytest.raises(UserError, match=r"max_length is 128, but .* knows only 100 positions"):
        train.run(small("sft", tmp_path / "hf"), tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --workdir=W, a run's workdir, and --output=DIR"),
        (["--workdir=nowhere", "--output=out"], "--workdir=nowhere: holds no run"),
        (["--workdir=a", "--output=b", "c"], "unexpected arguments: c"),
    ],
)
def test_the_command_says_what_is_wrong(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxpref.export", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(re.escape(message), done.stderr)


def test_an_output_that_is_not_empty_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        export.run(folder / "dpo", tmp_path)


def test_rows_that_are_scored_do_not_depend_on_how_those_of_training_were(tmp_path):
    config = small("reward", "", data__row_length=200, data__scored_length=24)
    identity.write(tmp_path, identity.describe(config))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    for max_length, row_length in ((0, 200), (64, 0)):
        found = RewardModel(tmp_path, max_length=max_length).config
        assert (found.data.scored_length, found.data.row_length) == (0, row_length)


@pytest.mark.parametrize("begin", [pytest.param("hf", marks=pytest.mark.long), "sft"])
def test_a_reward_model_begins_with_a_language_model_and_goes_on(folder, tmp_path, begin):
    config = small("reward", folder / begin, train__steps=3)
    train.run(config, tmp_path / "reward")
    lines = metrics.read(tmp_path / "reward" / "metrics.jsonl")
    assert {"eval/accuracy", "eval/margin", "eval/mean_reward"} <= set(lines[-1])
    pairs = [
        {"prompt": "Is it good?", "chosen": f" Yes{'.' * i}", "rejected": " No"} for i in range(3)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))

    def score(model):
        done = evaluation.score_file(model, str(tmp_path / "pairs.jsonl"), tmp_path / "scored")
        lines = [json.loads(line) for line in (tmp_path / "scored").read_text().splitlines()]
        assert done.prompts == len(lines)
        return lines

    scored = score(tmp_path / "reward")
    assert [line["responses"] for line in scored] == [[p["chosen"], p["rejected"]] for p in pairs]
    # The same response to the same prompt has the same reward, whatever is beside it.
    yes, no = np.array([line["scores"] for line in scored]).T
    np.testing.assert_allclose(no, no[0], rtol=1e-5, atol=1e-5)
    assert np.diff(np.sort(yes)).min() > 1e-4
    with pytest.raises(UserError, match="is a run of sft, which has learned neither a reward"):
        score(folder / "sft")
    with pytest.raises(UserError, match="has no scalar head"):
        score(folder / "hf")
    export.run(tmp_path / "reward", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architectures"] == ["Qwen3ForSequenceClassification"]
    export.run(tmp_path / "reward", tmp_path / "float32", "float32")
    for ours, exported in zip(scored, score(tmp_path / "float32"), strict=True):
        np.testing.assert_allclose(ours["scores"], exported["scores"], atol=1e-5)
    if begin == "hf":
        # A reward model is where another run may begin, with its head.
        train.run(small("reward", tmp_path / "out", train__steps=1), tmp_path / "again")
        before, after = (
            metrics.read(tmp_path / name / "metrics.jsonl") for name in ("reward", "again")
        )
        ours, theirs = before[-1]["eval/mean_reward"], after[0]["eval/mean_reward"]
        assert theirs == pytest.approx(ours, rel=0.05)
