"""A reference that is another policy than the one that training starts from."""

import shutil

import pytest
from test_train import assert_same_params, lines_of, small
from test_weights import QWEN3, small as from_weights, write_model

from jaxpref import train
from jaxpref.errors import UserError


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """SFT runs of the policy's shape and of another one, a Hugging Face model, adapters on it."""
    root = tmp_path_factory.mktemp("references")
    fast = {"optimizer__learning_rate": 1e-2, "train__steps": 2}

    def made(name):
        folder = root / name
        if folder.exists():
            return folder
        if name == "same":
            train.run(small("sft", **fast), folder)
        elif name == "other":
            train.run(small("sft", **fast, model__layers=2, model__width=24), folder)
        elif name == "hf":
            write_model(folder, QWEN3)
        else:
            adapters = {"model__lora__rank": 2, "optimizer__learning_rate": 0.1}
            train.run(from_weights("sft", made("hf"), **adapters), folder)
        return folder

    return made


def reference_logps(workdir, beta=0.1):
    """What the first evaluation compares the chosen responses with, in nats."""
    first = lines_of(workdir)[0]
    return first["eval/logps/chosen"] - first["eval/rewards/chosen"] / beta


def said(workdir):
    """What the model of a finished run says of the same responses."""
    return lines_of(workdir)[-1]["eval/logps/chosen"]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param("live", "other", marks=pytest.mark.long),
        pytest.param("precomputed", "other", marks=pytest.mark.long),
        pytest.param("synced", "same", marks=pytest.mark.long),
    ],
)
def test_the_reference_is_what_it_was_named(mode, name, folder_of, tmp_path):
    """And a run that resumes needs it no more."""
    source = shutil.copytree(folder_of(name), tmp_path / "source")
    config = small(reference__mode=mode, reference__init_from=str(source), train__steps=1)
    if mode == "synced":
        config.reference.sync_every = 1
    whole = config.copy_and_resolve_references()
    whole.train.steps = 2
    train.run(whole, tmp_path / "whole")
    assert reference_logps(tmp_path / "whole") == pytest.approx(said(folder_of(name)), rel=1e-5)
    assert abs(lines_of(tmp_path / "whole")[0]["eval/rewards/chosen"]) > 0.01
    train.run(config, tmp_path / "parts")
    shutil.rmtree(source)
    config.update_from_flattened_dict({"train.steps": 2, "reference.init_from": ""})
    train.run(config, tmp_path / "parts")
    assert_same_params(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("name", ["hf", "adapters"])
def test_hugging_face_models_and_adapters_can_be_the_reference(name, folder_of, tmp_path):
    """Each is the reference of the other; adapters are merged."""
    policy = {"hf": "adapters", "adapters": "hf"}[name]
    lora = {"model__lora__rank": 2} if policy == "adapters" else {}
    named = {"reference__init_from": str(folder_of(name)), "train__steps": 1}
    train.run(from_weights("dpo", folder_of(policy), **lora, **named), tmp_path / "run")
    adapted = lines_of(folder_of("adapters"))
    expected = (adapted[0] if name == "hf" else adapted[-1])["eval/logps/chosen"]
    assert reference_logps(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    again = from_weights("dpo", folder_of(policy), **lora, **{**named, "train__steps": 2})
    train.run(again, tmp_path / "run")
    assert lines_of(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("dpo", {"reference__mode": "free"}, "compares with no reference"),
        ("sft", {}, "compares with no reference"),
        ("dpo", {"reference__mode": "adapter", "model__lora__rank": 2}, "is the policy's own base"),
        (
            "dpo",
            {
                "reference__mode": "synced",
                "model__lora__rank": 2,
                "reference__sync_mix": 1.0,
            },
            "mixes its parameters",
        ),
        ("dpo", {"reference__mode": "synced"}, "of another shape than the policy"),
        ("dpo", {"reference__init_from": "no/such/place"}, "no/such/place: is neither a directory"),
        ("dpo", {"tokenizer__name": "HF"}, "its tokenizer gives other ids than the policy's"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(algorithm, changes, message, folder_of, tmp_path):
    changes = {"reference__init_from": str(folder_of("other")), **changes}
    if changes.get("tokenizer__name"):
        changes["tokenizer__name"] = str(other_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=message):
        train.run(small(algorithm, **changes), tmp_path / "run")


def other_tokenizer(directory):
    import transformers

    transformers.ByT5Tokenizer(extra_ids=7).save_pretrained(directory)
    return directory
