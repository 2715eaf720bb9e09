"""Reward models in Hugging Face's layout give the same rewards there and here, whatever pads."""

import json
import re

import numpy as np
import pytest
import transformers
from test_weights import QWEN3, small, write_model
from tokenizers import Tokenizer, decoders, models as tokenizer_models, pre_tokenizers

from jaxpref import evaluation, export, models, train

# Of `</s>`, a padding token, and bytes; as many rows as ids, so that a new token needs a new row,
# and more.
IDS = 258
ROWS = (IDS, pytest.param(400, marks=pytest.mark.long))
PADS = {"eos": "</s>", "apart": "<pad>", "none": None}


def tokenizer_that_pads(pad):
    """One id a byte, as a tokenizer of the fast kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", "<pad>", *alphabet])}
    bytes_alone = Tokenizer(tokenizer_models.BPE(vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token="</s>", pad_token=PADS[pad]
    )


def write_pairs(path, count=20):
    """Pairs whose responses differ in length; some end in what could be taken for padding."""
    rng = np.random.default_rng(0)
    words = ["yes", "no", "perhaps", "never", "of course", "<pad>"]

    def response():
        return " " + " ".join(rng.choice(words, rng.integers(1, 6)))

    pairs = [
        {"prompt": f"Is {i} odd?", "chosen": response(), "rejected": response()}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def ours(model, path, output):
    evaluation.score_file(model, str(path), output)
    return np.array([json.loads(line)["scores"] for line in output.read_text().splitlines()])


def theirs(directory, pairs, model=None):
    """What transformers says of prompt, response and EOS, in padded batches where it can."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if model is None:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    texts = [[pair["prompt"], pair[side]] for pair in pairs for side in ("chosen", "rejected")]
    ids = [
        [
            *(
                i
                for text in both
                for i in tokenizer(
                    text, add_special_tokens=False, split_special_tokens=True
                ).input_ids
            ),
            tokenizer.eos_token_id,
        ]
        for both in texts
    ]
    if model.config.pad_token_id is None:
        batches = [[one] for one in ids]
    else:
        # As TRL does, which tells the model what the tokenizer pads with.
        assert tokenizer.pad_token_id == model.config.pad_token_id
        batches = [ids[:13], ids[13:]]
    rewards = []
    for batch in batches:
        padded = (
            tokenizer.pad({"input_ids": batch}, return_tensors="pt")
            if len(batch) > 1
            else {"input_ids": torch.tensor(batch)}
        )
        with torch.no_grad():
            rewards.append(model(**padded).logits[:, 0].numpy())
    return np.concatenate(rewards).reshape(len(pairs), 2)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ROWS)
def test_adapters_of_a_reward_model_give_its_rewards_as_they_say(rows, tmp_path, capsys):
    """With EOS for padding; the base's embedding has a row for another token, or has none."""
    peft = pytest.importorskip("peft")

    write_model(
        tmp_path / "hf", {**QWEN3, "vocab_size": rows}, tokenizer=tokenizer_that_pads("eos")
    )
    train.run(small("reward", tmp_path / "hf", model__lora__rank=2), tmp_path / "run")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    here = ours(tmp_path / "run", tmp_path / "pairs.jsonl", tmp_path / "scored")
    export.run(tmp_path / "run", tmp_path / "out", adapters=True)
    told = re.search(r"model.config.pad_token_id = (\w+)", capsys.readouterr().out)[1]
    assert told == ("None" if rows == IDS else str(IDS))
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=1
    )
    model.config.pad_token_id = None if rows == IDS else IDS
    np.testing.assert_allclose(theirs(tmp_path / "out", pairs, model), here, atol=2e-5)
    again = ours(tmp_path / "out", tmp_path / "pairs.jsonl", tmp_path / "again")
    np.testing.assert_allclose(again, here, atol=2e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pad", PADS)
def test_an_export_gives_the_rewards_of_its_workdir(pad, rows, tmp_path):
    write_model(tmp_path / "hf", {**QWEN3, "vocab_size": rows}, tokenizer=tokenizer_that_pads(pad))
    train.run(small("reward", tmp_path / "hf"), tmp_path / "run")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    export.run(tmp_path / "run", tmp_path / "out")
    here = ours(tmp_path / "run", tmp_path / "pairs.jsonl", tmp_path / "scored")
    np.testing.assert_allclose(theirs(tmp_path / "out", pairs), here, atol=2e-5)
    again = ours(tmp_path / "out", tmp_path / "pairs.jsonl", tmp_path / "again")
    np.testing.assert_allclose(again, here, atol=2e-5)
    if pad == "eos":
        # TRL reads the names of special tokens in texts as such.
        plain = [i for i, pair in enumerate(pairs) if "<pad>" not in "".join(pair.values())]
        margins = np.subtract(*here[plain].T)
        expected = np.log1p(np.exp(-margins)).mean()
        found = trl_loss(tmp_path / "out", [pairs[i] for i in plain], tmp_path / "trl")
        assert len(plain) > 5
        assert found == pytest.approx(expected, abs=1e-5)


def trl_loss(directory, pairs, output):
    """The loss of TRL's reward trainer before its first step."""
    import datasets
    import trl

    args = trl.RewardConfig(
        output_dir=str(output),
        report_to=[],
        per_device_eval_batch_size=len(pairs),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list(pairs)
    trainer = trl.RewardTrainer(
        model=str(directory), args=args, train_dataset=data, eval_dataset=data
    )
    return trainer.evaluate()["eval_loss"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pad", PADS)
def test_an_import_gives_the_rewards_of_transformers(pad, tmp_path):
    import torch

    torch.manual_seed(0)
    tokenizer = tokenizer_that_pads(pad)
    config = transformers.Qwen3Config(
        **{**QWEN3, "architectures": None, "vocab_size": IDS},
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    expected = theirs(tmp_path / "hf", pairs)
    here = ours(tmp_path / "hf", tmp_path / "pairs.jsonl", tmp_path / "scored")
    np.testing.assert_allclose(here, expected, atol=2e-5)
    # Exported as it is, it still says the same.
    model, params = models.from_pretrained(tmp_path / "hf")
    models.save_pretrained(model, params, tmp_path / "out", tokenizer=tokenizer)
    np.testing.assert_allclose(theirs(tmp_path / "out", pairs), expected, atol=2e-5)
