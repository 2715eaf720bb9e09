import gzip
import importlib
import inspect
import json
from pathlib import Path

import pytest

from jaxpref import config as config_lib, losses
from jaxpref.errors import UserError
from jaxpref.methods import METHODS, OFFLINE
from jaxpref.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
ONLINE = [name for name in METHODS if METHODS[name].samples]
ONLINE_HH = ["ppo", "remax", "rloo", "grpo", "rejection_sampling", "online_dpo"]
RECIPES = [
    *(("quickstart", name) for name in OFFLINE),
    *(("rlhf_quickstart", name) for name in ONLINE),
    ("sft_hh", "tiny"),
    ("sft_hh", "paper"),
    ("dpo_hh", "tiny"),
    ("dpo_hh", "paper"),
    *((f"{name}_hh", size) for name in ONLINE_HH for size in ("tiny", "paper")),
    *(("rlhf_hh", name + size) for name in ONLINE for size in ("", ",paper")),
    *(("shapes", f"{name},dpo") for name in ("llama3_8b", "llama3_70b", "qwen3_32b")),
    ("shapes", "llama3_8b,grpo"),
    ("sentiment_sft", None),
    ("sentiment_reward", None),
    *(("sentiment_rlhf", name) for name in ONLINE),
    *((name, kind) for name in ("sft", "dpo") for kind in ("", "lora")),
    *(("method", name + kind) for name in OFFLINE for kind in ("", ",lora")),
    *(("methods_hh", name + size) for name in OFFLINE for size in ("", ",paper")),
    *(("tldr", name + size) for name in METHODS for size in ("", ",paper", ",tiny")),
]


@pytest.mark.parametrize(("recipe", "argument"), RECIPES)
def test_every_recipe_is_a_valid_config(recipe, argument, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module(f"configs.{recipe}")
    config = module.get_config() if argument is None else module.get_config(argument)
    # The runs that come first are checked with it, and give what it leaves open.
    for stage, workdir in getattr(module, "get_stages", lambda *_: [])(config, "W"):
        config_lib.check(stage)
        assert workdir.startswith("W/")
    if not config.data.path and config.data.format != "synthetic":
        config.data.path = "a.jsonl"
    config_lib.check(config)
    assert config.algorithm.name in METHODS


def test_recipes_are_all_tested():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {recipe for recipe, _ in RECIPES}


def test_the_sentiment_data_is_two_halves_and_tokenizers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    texts = [f"a {how} film , number {n} ." for n, how in enumerate(["dull", "fine"] * 4)]
    lines = [json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts)]
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.writelines(lines)
    folder = tmp_path / "folder"
    importlib.import_module("configs.sentiment_sft").prepare(tmp_path / "x.jsonl.gz", folder)
    halves = [(folder / f"{name}.jsonl").read_text() for name in ("reward", "policy")]
    assert "".join(halves) == "".join(lines)
    assert [half.count("\n") for half in halves] == [4, 4]
    for name in ("tokenizer", "classifier_tokenizer"):
        tokenizer = load_tokenizer(str(folder / name))
        for text in texts:
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.eos_token_id not in ids


def test_every_algorithm_can_be_configured():
    for name in METHODS:
        assert config_lib.default(name).algorithm.name == name


# The losses that are not called like their algorithm.
LOSSES = {"sft": losses.nll, "reward": losses.bradley_terry, "all_pairs_dpo": losses.dpo}
# What an algorithm does beside calling its loss, with the value that does nothing.
AROUND = {
    "length_alpha": 1.0,
    "wpo": False,
    "wpo_largest": 0.0,
    "per_token": False,
    "nll_per_token": False,
    "ranking": "all_pairs",
}


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_a_knobs_default_is_that_of_its_loss(name):
    """A recipe without knobs is the loss called without options."""
    parameters = inspect.signature(LOSSES.get(name) or getattr(losses, name)).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    knobs = {key: knob.default for key, knob in METHODS[name].knobs.items()}
    if name == "dpo":
        alpha = inspect.signature(losses.divergences.alpha_divergence).parameters["alpha"]
        assert knobs.pop("alpha") == alpha.default
        assert knobs.pop("divergence") == defaults.pop("divergence").__name__
    assert knobs == {key: {**AROUND, **defaults}[key] for key in knobs}
    if name not in LOSSES:
        # And the loss has no number that the config leaves out.
        numbers = {key for key, value in defaults.items() if type(value) is float}
        assert numbers <= knobs.keys()


def test_configs_are_locked():
    with pytest.raises(AttributeError):
        config_lib.default("dpo").data.pth = "x"


def test_a_reward_model_of_labels_trains_on_labels_and_centres_nothing():
    config = config_lib.default("reward")
    config.data.path = "a.jsonl"
    assert config_lib.data_kind(config) == "ranked"
    config.algorithm.ranking = "binary"
    config_lib.check(config)
    assert config_lib.data_kind(config) == "unpaired"
    config.algorithm.center_coefficient = 0.01
    with pytest.raises(UserError, match=r"only where algorithm.ranking is not"):
        config_lib.check(config)


def valid(**changes):
    config = config_lib.default("dpo")
    config.data.path = "a.jsonl"
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


BAD = [
    ({"seed": -1}, "seed should be from 0 to 4294967295; got -1"),
    ({"seed": 2**32}, "seed should be from 0 to 4294967295; got 4294967296"),
    ({"train__epochs": 0.0}, "train.steps is 0 and train.epochs 0.0, which is no number of steps"),
    ({"train__epochs": float("inf")}, "train.epochs inf, which is no number of steps"),
    ({"data__format": "hhh"}, "data.format is 'hhh'.*Did you mean 'hh'"),
    ({"data__eval_split": "train"}, "data.eval_split is 'train', which is trained on"),
    (
        {"data__path": "", "data__format": "synthetic", "data__limit": 5},
        "data.limit is 5, which means nothing where data.format 'synthetic'",
    ),
    (
        {"reference__mode": "precomputed", "reference__dtype": "bfloat16"},
        "reference.dtype is 'bfloat16', which has an effect only where reference.mode is 'live'",
    ),
    ({"model__frozen_dtype": "nf4"}, "'nf4', which has an effect only where something is frozen"),
    ({"algorithm__alpha": 0.9}, "only where algorithm.divergence is 'alpha'; leave it at 0.5"),
    ({"algorithm__wpo_largest": 1.0}, "only where algorithm.wpo is True"),
    ({"reference__sync_mix": 0.5}, "only where reference.mode is 'synced'"),
    ({"model__lora__dropout": 0.1}, "only where model.lora.rank is above 0"),
    ({"train__epochs": 2.0, "train__steps": 3}, "only where train.steps is 0"),
    ({"algorithm__beta": 0.0}, "algorithm.beta should be above 0"),
    (
        {"algorithm__divergence": "alpha", "algorithm__alpha": 5.0},
        "algorithm.alpha should be from 0 to 1",
    ),
    (
        {"reference__mode": "free", "algorithm__divergence": "forward_kl"},
        "'forward_kl' reads each log-ratio by itself",
    ),
    (
        {"reference__mode": "synced", "model__lora__rank": 2},
        "mix the factors of the adapters.*set reference.sync_mix=1",
    ),
    ({"reference__mode": "lve"}, "Did you mean 'live'"),
    ({"optimizer__name": "adam"}, "Did you mean 'adamw'"),
    ({"algorithm__name": "dpoo"}, "algorithm.name is 'dpoo'.*one of sft, dpo, .*'dpo'"),
    ({"algorithm__name": "sft"}, "start from a recipe for sft"),
    ({"data__max_prompt_length": 512}, "max_prompt_length .512. should be below"),
    ({"data__row_length": 100}, "row_length .100. should be at least data.max_length"),
    ({"data__path": ""}, "data.path is empty"),
    ({"data__format": "synthetic"}, "leave data.path empty"),
    ({"data__eval_fraction": 1.0}, "eval_fraction should be from 0"),
    ({"data__batch_size": 0}, "data.batch_size should be at least 1; got 0"),
    ({"train__steps": -1}, "train.steps should be at least 0; got -1"),
    ({"train__keep": 0}, "train.keep should be at least 1"),
    ({"algorithm__beta": -0.1}, "algorithm.beta should be above 0; got -0.1"),
    ({"algorithm__beta": float("nan")}, "algorithm.beta should be above 0; got nan"),
    ({"algorithm__label_smoothing": 0.5}, "label_smoothing should be from 0 to below 0.5"),
    ({"model__layers": 0}, "model.layers should be at least 1"),
    ({"model__dtype": "float17"}, "model.dtype is 'float17'"),
    ({"model__param_dtype": "bfloat16"}, "model.param_dtype is 'bfloat16'; it should be one of f"),
    ({"data__scored_length": -4}, "data.scored_length should be at least 0"),
    ({"data__limit": -1}, "data.limit should be at least 0"),
    ({"data__num_proc": 0}, "data.num_proc should be at least 1"),
    ({"data__min_score_ratio": 0.5}, "data.min_score_ratio should be at least 1"),
    ({"data__on_tie": "drop"}, "data.on_tie is 'drop'; it should be one of error, skip"),
    ({"data__on_identical": "skp"}, "data.on_identical is 'skp'.*Did you mean 'skip'"),
    ({"data__ranked_pairs": "best"}, "data.ranked_pairs is 'best'; it should be one of best_worst"),
    ({"data__mixture": ({"path": "b"},)}, "data.path .'a.jsonl'. and data.mixture are both given"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_impossible_values_are_errors_that_name_the_key(changes, message):
    config_lib.check(valid())
    with pytest.raises(UserError, match=message):
        config_lib.check(valid(**changes))


BAD_MIXTURES = {
    "no dict": (("b.jsonl",), r"data.mixture\[0\] should be a dict with at least a 'path'"),
    "no path": (({"weight": 1},), r"data.mixture\[0\] should be a dict with at least a 'path'"),
    "mistyped key": (
        ({"path": "b"}, {"path": "c", "wieght": 2}),
        r"a key of data.mixture\[1\] is 'wieght'.*Did you mean 'weight'",
    ),
    "wrong type": (({"path": "b", "weight": "2"},), r"\[0\]: 'weight' cannot be '2'"),
    "weight 0": (({"path": "b", "weight": 0},), "'weight' should be above 0; got 0"),
    "limit": (({"path": "b", "limit": -1},), "'limit' should be at least 0; got -1"),
    "format": (({"path": "b", "format": "hhh"},), "'format' is 'hhh'.*Did you mean 'hh'"),
    "generated": (({"path": "b", "format": "synthetic"},), "'format' is 'synthetic'"),
    "name": (({"path": "b", "name": "x/y"},), "a name has no '/'"),
    "same name": (({"path": "x/b.jsonl"}, {"path": "y/b.jsonl"}), "same name .b, b.; give each"),
}


@pytest.mark.parametrize("case", BAD_MIXTURES)
def test_impossible_mixtures_are_errors_that_say_where(case):
    mixture, message = BAD_MIXTURES[case]
    with pytest.raises(UserError, match=message):
        config_lib.check(valid(data__path="", data__mixture=mixture))


def test_a_source_takes_what_it_leaves_out_from_the_data():
    mixture = ({"path": "x/b.jsonl"}, {"path": "owner/c", "format": "hh", "limit": 3})
    config = valid(data__path="", data__mixture=mixture, data__subset="s", data__limit=9)
    config_lib.check(config)
    shared = {"split": "train", "weight": 1.0}
    assert config_lib.sources(config) == [
        # A file has no subset.
        {"path": "x/b.jsonl", "name": "b", "format": "auto", "limit": 9, "subset": "", **shared},
        {"path": "owner/c", "name": "c", "format": "hh", "limit": 3, "subset": "s", **shared},
    ]
    config.data.eval_split = "test"
    with pytest.raises(UserError, match=r"data.eval_split .'test'. is a split of data.path"):
        config_lib.check(config)


def test_a_mixture_survives_being_written_down():
    mixture = ({"path": "b", "weight": 2.0},)
    flat = json.loads(json.dumps(dict(config_lib.flatten(valid(data__mixture=mixture)))))
    assert config_lib.from_flat(flat).data.mixture == mixture


def test_sft_takes_no_reference():
    config = config_lib.default("sft")
    config.data.path = "a.jsonl"
    config_lib.check(config)
    config.reference.mode = "live"
    with pytest.raises(UserError, match="sft compares with no reference"):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("data.pth", "data.path"), ("algoritm.beta", "algorithm.beta"), ("train.step", "train.steps")],
)
def test_unknown_key_names_the_nearest(key, nearest):
    assert f"Did you mean {nearest!r}" in config_lib.unknown_key(valid(), key)
    assert config_lib.unknown_key(valid(), nearest) is None


def test_differences_list_what_changes_the_updates():
    def described(**changes):
        return dict(config_lib.flatten(valid(**changes)))

    assert config_lib.differences(described(), described()) == []
    free = {"train__log_every": 5, "mesh__data": 2, "eval__max_examples": 7, "train__keep": 3}
    assert config_lib.differences(described(**free), described()) == []
    assert config_lib.differences(described(algorithm__beta=0.2), described()) == [
        "algorithm.beta: 0.2 now, 0.1 there"
    ]
    assert config_lib.differences(described(train__steps=7), described()) == []
    cosine = {"optimizer__schedule": "cosine"}
    assert config_lib.differences(described(train__steps=7, **cosine), described(**cosine)) == [
        "train.steps: 7 now, 0 there"
    ]


def test_data_that_moved_is_the_same_data():
    here = {"data.path": "a/x.jsonl", "data.eval_path": "a/y.jsonl", "data.mixture": []}
    there = {"data.path": "b/x.jsonl", "data.eval_path": "b/z.jsonl", "data.mixture": []}
    prints = dict.fromkeys(config_lib.FINGERPRINTS, "0a")
    # Before the data is read, and when it has been.
    assert not config_lib.differences(here, {**there, **prints})
    assert not config_lib.differences({**here, **prints}, {**there, **prints})
    for name in prints:
        found = config_lib.differences({**here, **prints, name: "1b"}, {**there, **prints})
        assert {line.partition(":")[0] for line in found} == {"data.path", "data.eval_path", name}
    # Held-out data of its own, or a share of the data, is another setting.
    assert config_lib.differences({**here, "data.eval_path": ""}, {**there, **prints})

    mixture = [{"path": "a/x.jsonl", "weight": 2}, {"path": "a/y.jsonl"}]
    moved = [{"path": "b/x.jsonl", "weight": 2}, {"path": "b/y.jsonl"}]
    assert not config_lib.differences({"data.mixture": mixture}, {"data.mixture": moved})
    for other in (moved[::-1], moved[:1], [{**moved[0], "weight": 3}, moved[1]]):
        assert config_lib.differences({"data.mixture": mixture}, {"data.mixture": other})


def test_a_table_of_log_probs_holds_for_the_examples_that_it_was_made_for():
    flat = dict(config_lib.flatten(valid(reference__mode="precomputed")))
    assert config_lib.differences({**flat, "eval.max_examples": 3}, flat) == [
        "eval.max_examples: 3 now, 0 there"
    ]
    live = {**flat, "reference.mode": "live"}
    assert not config_lib.differences({**live, "eval.max_examples": 3}, live)
