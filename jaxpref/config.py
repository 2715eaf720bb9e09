"""A run's config: every knob of `knobs` and of the method, with what only fits together.

Recipes in `configs/` change values, never names. Nothing heavy is imported here, so that a
command line is checked at once.
"""

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.knobs import DATA_FORMATS, EVALUATION_KNOBS, GROUPS, KNOBS, Knob, one_of
from jaxpref.methods import METHODS, Method
from jaxpref.workdir import as_path

# How the names of data files end.
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")

# The keys that an entry of data.mixture may have, and the types of their values.
_MIXTURE_KEYS: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "format": str,
    "subset": str,
    "split": str,
    "weight": (int, float),
    "limit": int,
    "name": str,
}

# The same of an entry of reward.mixture.
_REWARD_KEYS: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "function": str,
    "weight": (int, float),
    "name": str,
}

# Data is known by the fingerprints that a run has of it, not by where it lies.
_PATHS = ("data.path", "data.eval_path", "data.mixture")
FINGERPRINTS = ("data_fingerprint", "held_out_fingerprint")


def default(algorithm: str) -> ConfigDict:
    """The config that a recipe starts from: every knob with its default.

    Args:
      algorithm: a name in `jaxpref.methods.METHODS`.

    Returns:
      A locked config: values may change, an unknown key is an error.
    """
    config = ConfigDict()
    method = method_of(algorithm)
    for key, knob in {**KNOBS, **_of_groups(method)}.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        group[name] = method.defaults.get(key, knob.default)
    own = {name: knob.default for name, knob in method.knobs.items()}
    config.algorithm = ConfigDict({"name": algorithm, **own})
    if method.reference == "none":
        config.reference.mode = "free"
    return config.lock()


def method_of(name: str) -> Method:
    """The declaration of a method.

    Raises:
      UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(one_of("algorithm.name", name, METHODS))
    return METHODS[name]


def data_kind(config: ConfigDict) -> str:
    """The kind of examples that a config's method trains on, see `jaxpref.data.convert`."""
    method = method_of(config.algorithm.name)
    others = (kind for kind, where in method.data_where.items() if where.holds(config))
    return next(others, method.data)


def knobs_of(name: str) -> dict[str, Knob]:
    """Every knob of a config with this method, by its dotted key."""
    method = method_of(name)
    own = {f"algorithm.{key}": knob for key, knob in method.knobs.items()}
    return {**KNOBS, **_of_groups(method), **own}


def _of_groups(method: Method) -> dict[str, Knob]:
    if method.speaks and not method.samples:
        return EVALUATION_KNOBS
    return {key: knob for group in method.groups for key, knob in GROUPS[group].items()}


def temperature(config: ConfigDict) -> float:
    """What all logits in training are divided by: 1 for a method that learns from data alone."""
    samples = method_of(config.algorithm.name).samples
    return float(config.sampling.temperature) if samples else 1.0


def max_new_tokens(config: ConfigDict) -> int:
    """The tokens after which a sampled response is cut."""
    return config.sampling.max_new_tokens or config.data.max_length - config.data.max_prompt_length


def check(config: ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is read or computed.

    Raises:
      UserError: naming the key, its value and what it may be.
    """
    name = config.algorithm.name
    method = method_of(name)
    if set(config.algorithm) != {"name", *method.knobs}:
        raise UserError(
            f"algorithm.name is {name!r}, whose knobs are {sorted(method.knobs)}, but the "
            f"config has {sorted(set(config.algorithm) - {'name'})}: start from a recipe for "
            f"{name} rather than changing algorithm.name on the command line."
        )
    for key, knob in knobs_of(name).items():
        if message := knob.refusal(key, get(config, key)):
            raise UserError(message)
    _check_reference(config, method)
    _refuse_without_effect(config)
    _check_training(config, method)
    _check_lengths(config)
    _check_sources(config)
    if method.samples:
        _check_sampling(config)
    elif config.eval.win_rate_prompts:
        _check_room(config)
        if has_reward(config):
            reward_sources(config.reward)


def _check_reference(config: ConfigDict, method: Method) -> None:
    """Refuses a reference that the method, or the rest of the config, has no place for."""
    name, mode = config.algorithm.name, config.reference.mode
    if method.reference == "none" and mode != "free":
        raise UserError(
            f"reference.mode is {mode!r}, but {name} compares with no reference: leave it at "
            "'free'."
        )
    if method.reference == "needed" and mode == "free":
        raise UserError(
            f"reference.mode is 'free', but {name} reads the log-ratio of each response by itself, "
            "which says nothing without a reference; use another mode."
        )
    if mode == "free" and config.algorithm.get("divergence", "reverse_kl") != "reverse_kl":
        raise UserError(
            f"reference.mode is 'free', but algorithm.divergence {config.algorithm.divergence!r} "
            "reads each log-ratio by itself; only reverse_kl can do without a reference."
        )
    _check_other_reference(config)
    if mode == "synced" and config.model.lora.rank and config.reference.sync_mix < 1:
        raise UserError(
            "reference.mode 'synced' would mix the factors of the adapters, which is not to mix "
            "the weights that they make; with model.lora.rank set reference.sync_mix=1."
        )
    if mode == "adapter" and not config.model.lora.rank:
        raise UserError(
            "reference.mode 'adapter' is the policy with its adapters off; give it some with "
            "--config.model.lora.rank=16, or use another mode."
        )
    if mode == "adapter" and config.train.trainable:
        raise UserError(
            "reference.mode 'adapter' needs a base that is not trained; leave "
            "train.trainable empty."
        )


def _check_training(config: ConfigDict, method: Method) -> None:
    """Refuses what cannot be trained as asked."""
    try:
        re.compile(config.train.trainable)
    except re.error as error:
        raise UserError(
            f"train.trainable is {config.train.trainable!r}, which is no regular expression "
            f"({error})."
        ) from error
    if not config.train.steps and not 0 < config.train.epochs < math.inf:
        raise UserError(
            f"train.steps is 0 and train.epochs {config.train.epochs}, which is no number of "
            "steps; give either."
        )
    if method.compares_examples == "quantiles" and config.data.rows:
        raise UserError(
            f"data.rows is {config.data.rows}, but {config.algorithm.name} compares quantiles of a "
            "whole batch, which cannot be cut into micro-batches; leave it at 0, with a smaller "
            "data.batch_size if need be."
        )


def _check_sampling(config: ConfigDict) -> None:
    """Refuses what cannot be sampled, rewarded or learned from."""
    reward_sources(config.reward)
    _check_room(config)
    algorithm, sampling, data = config.algorithm, config.sampling, config.data
    if config.reference.mode == "precomputed":
        raise UserError(
            "reference.mode is 'precomputed', but the responses are yet to be sampled, so nothing "
            "can be known of them beforehand; use 'live', or 'adapter' with model.lora.rank."
        )
    if config.model.lora.rank and config.model.lora.dropout:
        raise UserError(
            f"model.lora.dropout is {config.model.lora.dropout}: the policy that is trained would "
            "not be the one that has sampled, so that ratios would not be 1 before any update; "
            "leave it at 0."
        )
    if algorithm.get("kl_in") == "loss" and algorithm.kl_estimator == "k1":
        raise UserError(
            "algorithm.kl_estimator 'k1' in the loss has a gradient of 0 on average, so it would "
            "hold the policy nowhere: use it in the reward (algorithm.kl_in='reward'), or "
            "'sequence_k2' in the loss."
        )
    if algorithm.get("kl_in") == "reward" and algorithm.kl_estimator != "k1":
        raise UserError(
            f"algorithm.kl_estimator is {algorithm.kl_estimator!r}, which in the reward has the "
            "gradient of another quantity than the KL; there only 'k1' is right. Or put it into "
            "the loss (algorithm.kl_in='loss')."
        )
    if config.reference.mode == "free" and algorithm.get("beta") and "kl_in" in algorithm:
        raise UserError(
            f"algorithm.beta is {algorithm.beta}, but without a reference (reference.mode 'free') "
            "there is no KL to weigh; set algorithm.beta=0, or use another mode."
        )
    other = METHODS[algorithm.loss] if "loss" in algorithm else None
    if other is not None and other.reference == "needed" and config.reference.mode == "free":
        raise UserError(
            f"reference.mode is 'free', but algorithm.loss {algorithm.loss!r} says nothing without "
            "a reference; use another mode."
        )
    minibatches = algorithm.get("minibatches", 1)
    if data.batch_size % minibatches:
        raise UserError(
            f"algorithm.minibatches ({minibatches}) should divide data.batch_size "
            f"({data.batch_size})."
        )
    least = method_of(algorithm.name).least_samples
    if sampling.samples < least:
        raise UserError(
            f"sampling.samples is {sampling.samples}, but {algorithm.name} compares responses to "
            f"the same prompt; it needs at least {least}."
        )


def _check_room(config: ConfigDict) -> None:
    """Refuses responses that might be longer than what a prompt leaves of `data.max_length`."""
    data, longest = config.data, max_new_tokens(config)
    if data.max_prompt_length + longest > data.max_length:
        raise UserError(
            f"data.max_prompt_length ({data.max_prompt_length}) and sampling.max_new_tokens "
            f"({longest}) are together more than data.max_length ({data.max_length}), so that a "
            "response might find no room."
        )


def _check_lengths(config: ConfigDict) -> None:
    """Refuses lengths that leave no room."""
    if config.data.max_prompt_length >= config.data.max_length:
        raise UserError(
            f"data.max_prompt_length ({config.data.max_prompt_length}) should be below "
            f"data.max_length ({config.data.max_length}), so that a response has room."
        )
    if 0 < config.data.row_length < config.data.max_length:
        raise UserError(
            f"data.row_length ({config.data.row_length}) should be at least data.max_length "
            f"({config.data.max_length}), so that every response fits a row; 0 takes max_length."
        )


def _check_sources(config: ConfigDict) -> None:
    """Refuses data that is named twice, or not at all."""
    mixture = sources(config)
    if config.data.format == "synthetic" and mixture:
        raise UserError(
            f"data.format 'synthetic' generates its data; leave "
            f"{'data.mixture' if config.data.mixture else 'data.path'} empty "
            f"(got {mixture[0]['path']!r}) or name the file's format."
        )
    if config.data.format != "synthetic" and not mixture:
        raise UserError(
            "data.path is empty: give a .jsonl, .jsonl.gz, .json or .parquet file, a directory or "
            "a hub name (--config.data.path=...), or use data.format 'synthetic'."
        )
    if config.data.format == "synthetic":
        for key in ("eval_path", "eval_split", "limit"):
            if config.data[key]:
                raise UserError(
                    f"data.{key} is {config.data[key]!r}, which means nothing where data.format "
                    "'synthetic' generates the data; use data.synthetic_pairs, data.eval_fraction."
                )
    if config.data.eval_split == config.data.split and not config.data.eval_path:
        raise UserError(
            f"data.eval_split is {config.data.eval_split!r}, which is trained on (data.split)."
        )
    if config.data.mixture and config.data.eval_split and not config.data.eval_path:
        raise UserError(
            f"data.eval_split ({config.data.eval_split!r}) is a split of data.path; with "
            "data.mixture name the held-out source in data.eval_path, or hold out a share with "
            "data.eval_fraction."
        )


def _check_other_reference(config: ConfigDict) -> None:
    """Refuses a reference of its own where there is no place for one."""
    why = {
        "adapter": "is the policy's own base, with the adapters that it starts with",
        "free": "compares with no reference",
    }.get(config.reference.mode)
    if config.reference.mode == "synced" and (config.model.lora.rank or config.train.trainable):
        why = "mixes its parameters with the policy's, which has frozen ones"
    if config.reference.init_from and why:
        raise UserError(
            f"reference.init_from is {config.reference.init_from!r}, but reference.mode "
            f"{config.reference.mode!r} {why}; leave it empty, or use 'live' or 'precomputed'."
        )


def _refuse_without_effect(config: ConfigDict) -> None:
    """Refuses values that another value makes meaningless."""
    usual = default(config.algorithm.name)
    for key, knob in knobs_of(config.algorithm.name).items():
        value, effect = get(config, key), knob.effect
        if effect and value != get(usual, key) and not effect.holds(config):
            raise UserError(
                f"{key} is {value!r}, which has an effect only where {effect.condition}; "
                f"leave it at {get(usual, key)!r}."
            )


def sources(config: ConfigDict) -> list[dict[str, Any]]:
    """The sources of the data, each with all keys that an entry of data.mixture may have.

    Raises:
      UserError: data.mixture has an entry that cannot be one, or there is a path beside it.
    """
    data = config.data
    whole = {key: data[key] for key in ("format", "subset", "split", "limit")}
    if not data.mixture:
        only = {"path": data.path, **whole, "weight": 1.0, "name": ""}
        return [only] if data.path else []
    if data.path:
        raise UserError(
            f"data.path ({data.path!r}) and data.mixture are both given; list all sources in "
            "data.mixture, or leave it empty."
        )
    entries: list[dict[str, Any]] = []
    for number, given in enumerate(data.mixture):
        _check_entry(given, f"data.mixture[{number}]")
        name = given["path"].rpartition("/")[2].partition(".")[0]
        of_files = {"subset": "", "split": "train"} if is_file(given["path"]) else {}
        entries.append({**whole, **of_files, "weight": 1.0, "name": name, **given})
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.mixture has two sources of the same name ({', '.join(names)}); give each a "
            "'name' of its own."
        )
    return entries


def held_out_source(config: ConfigDict) -> dict[str, Any] | None:
    """The source of the held-out data, as one of `sources`; None if it is a share of those."""
    data = config.data
    if not data.eval_path and not data.eval_split:
        return None
    # The split and the subset of data.path say nothing of a file.
    return {
        "path": data.eval_path or data.path,
        "format": data.format,
        "subset": "" if is_file(data.eval_path) else data.subset,
        "split": data.eval_split or ("train" if is_file(data.eval_path) else data.split),
        "limit": 0,
        "name": "",
    }


def is_file(path: str) -> bool:
    """Whether a source is a single file, by its name."""
    return path.endswith(DATA_SUFFIXES) and not as_path(path).is_dir()


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{where} should be a dict with at least a 'path'; got {entry!r}.")
    for key, value in entry.items():
        if key not in _MIXTURE_KEYS:
            raise UserError(one_of(f"a key of {where}", key, _MIXTURE_KEYS))
        if isinstance(value, bool) or not isinstance(value, _MIXTURE_KEYS[key]):
            raise UserError(f"{where}: {key!r} cannot be {value!r}.")
    formats = [name for name in DATA_FORMATS if name != "synthetic"]
    if (format := entry.get("format", "auto")) not in formats:
        raise UserError(one_of(f"{where}: 'format'", format, formats))
    weight = entry.get("weight", 1.0)
    if not 0 < weight < float("inf"):
        raise UserError(f"{where}: 'weight' should be above 0; got {weight}.")
    if (limit := entry.get("limit", 0)) < 0:
        raise UserError(f"{where}: 'limit' should be at least 0; got {limit}.")
    if not entry["path"] or not entry.get("name", "x") or "/" in entry.get("name", ""):
        raise UserError(
            f"{where}: 'path' and 'name' should not be empty, and a name has no '/'; got {entry!r}."
        )


def has_reward(config: ConfigDict) -> bool:
    """Whether a config names a reward."""
    return any(config.reward[key] for key in ("path", "function", "mixture"))


def reward_sources(reward: ConfigDict) -> list[dict[str, Any]]:
    """The rewards of a config, each with a path or a function, its weight, and its name.

    Args:
      reward: the group `reward` of a config.

    Raises:
      UserError: there is none, or one is given twice or cannot be one.
    """
    single = {key: reward[key] for key in ("path", "function") if reward[key]}
    if len(single) + bool(reward.mixture) != 1:
        given = [*single, *(["mixture"] if reward.mixture else [])]
        raise UserError(
            f"{' and '.join(f'reward.{key}' for key in given) or 'no reward'} given: give one of "
            "reward.path (a reward model), reward.function (module:function) and reward.mixture "
            "(several of them)."
        )
    entries = []
    for number, given in enumerate(reward.mixture or [single]):
        where = f"reward.mixture[{number}]" if reward.mixture else "reward"
        _check_reward(given, where)
        source = given.get("path") or given["function"]
        name = source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
        entries.append({"path": "", "function": "", "weight": 1.0, "name": name, **given})
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(
            f"reward.mixture has two rewards of the same name ({', '.join(names)}); give each a "
            "'name' of its own."
        )
    return entries


def _check_reward(entry: Any, where: str) -> None:
    """Refuses an entry of reward.mixture that cannot be one."""
    if not isinstance(entry, dict) or len(entry.keys() & {"path", "function"}) != 1:
        raise UserError(f"{where} should be a dict with a 'path' or a 'function'; got {entry!r}.")
    for key, value in entry.items():
        if key not in _REWARD_KEYS:
            raise UserError(one_of(f"a key of {where}", key, _REWARD_KEYS))
        if isinstance(value, bool) or not isinstance(value, _REWARD_KEYS[key]) or value == "":
            raise UserError(f"{where}: {key!r} cannot be {value!r}.")
    if not math.isfinite(weight := entry.get("weight", 1.0)) or not weight:
        raise UserError(f"{where}: 'weight' should be a finite number other than 0; got {weight}.")
    if "/" in entry.get("name", ""):
        raise UserError(f"{where}: 'name' should have no '/'; got {entry['name']!r}.")
    module, colon, function = entry.get("function", "m:f").partition(":")
    if not (module and colon and function) or ":" in function:
        raise UserError(
            f"{where}: the function is {entry['function']!r}; it should be module:function, such "
            "as my_rewards:politeness."
        )


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, in the config's order."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def from_flat(values: dict[str, Any]) -> ConfigDict:
    """The config that `flatten` gave these values for; keys that are not there keep defaults."""
    config = default(values["algorithm.name"])
    known = {key: values[key] for key, _ in flatten(config) if key in values}
    tuples = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    config.update_from_flattened_dict({**known, **tuples})
    return config


def trainable(config: ConfigDict) -> str:
    """The regular expression for the paths of the parameters that are trained."""
    # A reward model's head is new.
    adapters = r"_lora_[ab]$|^score$" if config.algorithm.name == "reward" else r"_lora_[ab]$"
    return config.train.trainable or (adapters if config.model.lora.rank else "")


def get(config: ConfigDict, key: str) -> Any:
    """The value under a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def unknown_key(config: ConfigDict, key: str) -> str | None:
    """The message for a dotted key that the config lacks, naming the nearest; None if it has it."""
    known = [name for name, _ in flatten(config)]
    if key in known:
        return None
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"the config has no key {key!r}.{hint}"


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What keeps a run with config `ours` from resuming one with `theirs`, a line each.

    Data may have moved, if `ours` has no fingerprints of it yet or has the same ones.
    """
    lines = []
    same_data = all(ours[key] == theirs[key] for key in FINGERPRINTS if key in ours)
    for key, here in ours.items():
        there = theirs[key]
        if key in _PATHS and same_data and _elsewhere(here) == _elsewhere(there):
            continue
        resumable = key in KNOBS and KNOBS[key].resumable
        free = (resumable and not _precomputed(key, ours)) or (
            # A constant rate does not depend on how long the run is.
            key in ("train.steps", "train.epochs") and ours.get("optimizer.schedule") == "constant"
        )
        if not free and here != there:
            lines.append(f"{key}: {here!r} now, {there!r} there")
    return lines


def _elsewhere(value: Any) -> Any:
    """A path, or an entry of data.mixture, wherever the data lies."""
    if isinstance(value, list | tuple):
        return [{key: item[key] for key in item if key != "path"} for item in value]
    return bool(value)


def _precomputed(key: str, values: dict[str, Any]) -> bool:
    """Whether the reference's log-probs were computed for what this key chooses."""
    return key == "eval.max_examples" and values["reference.mode"] == "precomputed"
