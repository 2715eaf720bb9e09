"""Every knob, declared once; recipes in `configs/` change values, never names.

Nothing heavy is imported here, so that a command line is checked at once.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpref.errors import UserError

# Of a method that compares the policy's log-ratios of chosen and rejected responses.
_RATIOS: dict[str, Any] = {
    # Inverse temperature of the implicit reward.
    "beta": 0.1,
    # Weight of a response's tokens beyond the shorter one's length (LD-DPO). 1: none is less.
    "length_alpha": 1.0,
}
_PAIRS: dict[str, Any] = {
    **_RATIOS,
    # Weigh pairs by how likely the policy is to say them (WPO).
    "wpo": False,
    # Largest weight of a pair; its authors' code has 1. 0: as large as it comes.
    "wpo_largest": 0.0,
}
# Probability that a label is wrong.
_SMOOTHED: dict[str, Any] = {"label_smoothing": 0.0}

# The knobs of each algorithm beside its name. An algorithm has no others, so that a
# knob it would ignore is an unknown key.
ALGORITHMS: dict[str, dict[str, Any]] = {
    # Supervised fine-tuning on the first (chosen) response.
    "sft": {},
    "dpo": {
        **_PAIRS,
        # Conservative DPO.
        **_SMOOTHED,
        # reverse_kl, forward_kl, jensen_shannon or alpha (f-DPO).
        "divergence": "reverse_kl",
        # Of divergence alpha: 0 is the reverse KL, 1 the forward KL.
        "alpha": 0.5,
        # Divide log-ratios by the responses' lengths.
        "per_token": False,
    },
    "robust_dpo": {**_PAIRS, "label_smoothing": 0.1},
    # per_token: as TRL has it; the paper sums.
    "ipo": {**_PAIRS, "per_token": False},
    "hinge": _PAIRS,
    "exo": {**_PAIRS, "label_smoothing": 1e-3},
    "nca": _PAIRS,
    "sppo_hard": _PAIRS,
    # They compare quantiles of a whole batch: no weights of its pairs, no micro-batches.
    "aot": {**_RATIOS, **_SMOOTHED},
    "aot_unpaired": {**_RATIOS, **_SMOOTHED},
    "apo_zero": _PAIRS,
    "apo_down": _PAIRS,
    "discopop": {**_PAIRS, "beta": 0.05, "temperature": 0.05},
    "bco": _PAIRS,
    # A mixture of DPO's, BCO's and SFT's loss.
    "mpo": {"beta": 0.1, "dpo_weight": 0.8, "bco_weight": 0.2, "nll_weight": 1.0},
    "simpo": {"beta": 2.0, "margin": 1.0, **_SMOOTHED},
    # nll_per_token: the likelihood's term as a mean over the response tokens of the batch, as TRL
    # has it (for orpo with the prompts' tokens). Else the paper's: of a response the mean (orpo)
    # or the sum (cpo).
    "orpo": {"beta": 0.1, "nll_per_token": False},
    "cpo": {"beta": 0.1, "nll_weight": 1.0, **_SMOOTHED, "nll_per_token": False},
    "slic_hf": {"margin": 1.0, "nll_weight": 1.0},
    # Weight of the rejected responses' term.
    "unlikelihood": {"alpha": 1.0},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco_unpaired": {"beta": 0.1},
    "rrhf": {"rank_weight": 1.0},
    # DPO on rankings: their likelihood, or the mean over all pairs.
    "plackett_luce_dpo": {"beta": 0.1},
    "all_pairs_dpo": {"beta": 0.1},
    "reward": {
        # Of more than two responses: all_pairs (Bradley-Terry) or plackett_luce.
        "ranking": "all_pairs",
        # Pull of rewards to 0 on average; TRL advises 0.01.
        "center_coefficient": 0.0,
    },
}

# The policy alone is enough for these.
_WITHOUT_REFERENCE = (
    "sft",
    "simpo",
    "orpo",
    "cpo",
    "slic_hf",
    "unlikelihood",
    "rrhf",
    "reward",
)
# These read the difference of two log-ratios alone, so that a reference may be left out.
_REFERENCE_OPTIONAL = (
    *("dpo", "robust_dpo", "ipo", "hinge", "exo", "aot", "discopop", "aot_unpaired"),
    *("plackett_luce_dpo", "all_pairs_dpo"),
)

# How a record may be read; "auto" goes by its columns. See jaxpref.data.read.
DATA_FORMATS = (
    "auto",
    "explicit",
    "implicit",
    "unpaired",
    "ranked",
    "responses",
    "sft",
    "messages",
    "alpaca",
    "prompts",
    "text",
    "hh",
    "shp",
    "stack_exchange",
    "tldr",
    "tldr_sft",
    "ultrafeedback",
    "imdb",
    "cnn_dailymail",
    "synthetic",
)

# How the names of data files end.
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")

# What an entry of data.mixture may say, and of which type.
_MIXTURE_KEYS: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "format": str,
    "subset": str,
    "split": str,
    "weight": (int, float),
    "limit": int,
    "name": str,
}

# The lowest value that makes sense.
_LOWEST: dict[str, float] = {
    **dict.fromkeys(
        (
            "data.batch_size",
            "data.max_length",
            "data.max_prompt_length",
            "data.min_score_ratio",
            "data.num_proc",
            "data.synthetic_pairs",
            "reference.sync_every",
            "model.attention_block",
            "model.feed_forward",
            "model.head_dim",
            "model.heads",
            "model.kv_heads",
            "model.layers",
            "model.width",
            "train.keep",
            "train.log_every",
            "train.micro_batches",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "algorithm.alpha",
            "algorithm.bco_weight",
            "algorithm.beta",
            "algorithm.center_coefficient",
            "algorithm.desirable_weight",
            "algorithm.dpo_weight",
            "algorithm.label_smoothing",
            "algorithm.length_alpha",
            "algorithm.margin",
            "algorithm.nll_weight",
            "algorithm.rank_weight",
            "algorithm.temperature",
            "algorithm.undesirable_weight",
            "algorithm.wpo_largest",
            "data.row_length",
            "data.limit",
            "data.scored_length",
            "model.lora.dropout",
            "model.lora.rank",
            "eval.max_examples",
            "model.vocabulary_size",
            "optimizer.clip_norm",
            "optimizer.learning_rate",
            "optimizer.warmup_steps",
            "optimizer.weight_decay",
            "train.epochs",
            "train.eval_every",
            "train.save_every",
            "train.steps",
        ),
        0,
    ),
}

# Data is known by the fingerprints that a run has of it, not by where it lies.
_PATHS = ("data.path", "data.eval_path", "data.mixture")
FINGERPRINTS = ("data_fingerprint", "held_out_fingerprint")
# What may differ when a run is resumed: nothing here changes a single update.
_RESUMABLE = (
    "data.cache",
    "data.num_proc",
    "eval.",
    "mesh.",
    # The run goes on from its own checkpoint and its own reference.
    "model.init_from",
    "reference.init_from",
    "train.eval_every",
    "train.keep",
    "train.log_every",
    "train.save_every",
)


def default(algorithm: str) -> ConfigDict:
    """The config that a recipe starts from: every knob with its default.

    Args:
      algorithm: a name in `jaxpref.algorithms`.

    Returns:
      A locked config: values may change, an unknown key is an error.
    """
    config = ConfigDict()
    # Of the first weights, the order of the data, dropout, and generated data: 32 bits.
    config.seed = 0

    config.model = ConfigDict()
    # Where the weights come from. Empty: random; else a jaxpref workdir, or a Hugging Face
    # directory or hub name, which bring their own shape; of PEFT adapters too, which are merged
    # into their base.
    config.model.init_from = ""
    # Keys of a Hugging Face config.json to ignore where jaxpref does not know them.
    config.model.ignore_keys = ()
    # The shape of a model with random weights.
    # 0: as many as the tokenizer has.
    config.model.vocabulary_size = 0
    config.model.width = 128
    config.model.layers = 4
    config.model.heads = 4
    config.model.kv_heads = 4
    config.model.head_dim = 32
    config.model.feed_forward = 384
    config.model.rope_theta = 10_000.0
    config.model.norm_epsilon = 1e-6
    config.model.tied_head = True
    # Of activations and products; parameters have a dtype of their own.
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"
    # Of parameters that are not trained: float32, bfloat16, nf4 (four bits a weight in the
    # layers' matrices, QLoRA).
    config.model.frozen_dtype = "float32"
    # What the backward pass computes again: none, dots (all but products with weights), full.
    config.model.remat = "dots"
    # Queries a block of attention.
    config.model.attention_block = 128
    # Low-rank adapters (LoRA), which alone are trained. Rank 0: none.
    config.model.lora = ConfigDict()
    config.model.lora.rank = 0
    config.model.lora.alpha = 16.0
    # Products that have one: query, key, value, out, gate, up, down. Empty: all; of a mixture of
    # experts, those of attention.
    config.model.lora.targets = ()
    config.model.lora.dropout = 0.0

    config.tokenizer = ConfigDict()
    # "auto" (that of model.init_from, else "bytes"), "bytes" (ByT5's, needs no files), a
    # directory, or a hub name.
    config.tokenizer.name = "auto"
    # Begin prompts that are texts with BOS: auto (where the tokenizer itself puts it before a
    # text), always, never. Of conversations the chat template alone decides.
    config.tokenizer.bos = "auto"
    # Read "</s>" and the like inside the data as special tokens rather than as text.
    config.tokenizer.parse_special_tokens = False
    # How conversations read, in place of the tokenizer's own template: alpaca, hh, a Jinja file.
    config.tokenizer.chat_template = ""

    config.data = ConfigDict()
    # A .jsonl, .jsonl.gz, .json or .parquet file, a directory of them, or a name on the hub.
    config.data.path = ""
    # In its place several sources: dicts with a path, and if need be format, subset, split,
    # limit (else those of data), weight (share of the examples in a step, against the other
    # weights; else 1) and name (in metrics; else the file's).
    config.data.mixture = ()
    # How a record is read: auto (by its columns), explicit (prompt, chosen, rejected), implicit
    # (chosen, rejected: conversations that begin alike), unpaired (prompt, completion, label),
    # ranked (prompt, responses, scores), responses (prompt, responses: to be scored), sft
    # (prompt, completion), messages (a conversation), alpaca (instruction, input, output),
    # prompts (prompt), text (text: every token is scored); the data sets hh, shp, stack_exchange,
    # tldr, tldr_sft, ultrafeedback, imdb, cnn_dailymail; synthetic, which is generated. A prompt
    # is a text or a list of messages.
    config.data.format = "auto"
    # Of a directory or a hub data set: a folder in it, and the split.
    config.data.subset = ""
    config.data.split = "train"
    # Held-out data: a source of its own (eval_split: of data.path), else this share of the
    # prompts of data.path.
    config.data.eval_path = ""
    config.data.eval_split = ""
    config.data.eval_fraction = 0.05
    # Examples read of a source, the first ones. 0: all.
    config.data.limit = 0
    # Of more than two ranked responses, for an algorithm that needs pairs: best_worst (one pair),
    # adjacent (neighbours in the ranking) or all.
    config.data.ranked_pairs = "best_worst"
    # Pairs of format shp with a lower ratio of their scores are dropped.
    config.data.min_score_ratio = 2.0
    # Drop examples whose tokens, prompt and responses, are there before.
    config.data.deduplicate = False
    # Processes that tokenise.
    config.data.num_proc = 1
    # A directory where tokenised data is kept for other runs. Empty: none.
    config.data.cache = ""
    # Groups (prompts with their responses) in a step, over all devices.
    config.data.batch_size = 64
    # Tokens of prompt plus response; what is longer is cut.
    config.data.max_length = 512
    # Tokens that a prompt keeps (its end) when prompt plus response are too long.
    config.data.max_prompt_length = 256
    # Tokens a row. 0: max_length.
    config.data.row_length = 0
    # Scored tokens a row. 0: what the data's share of responses calls for.
    config.data.scored_length = 0
    # Turns of the assistant in a conversation that are trained, after the first question, or from
    # where chosen and rejected part: all, or the last, whose prompt is all before it.
    config.data.turns = "all"
    # A response that follows a message of the assistant: error, continue (that message's text is
    # the beginning of the turn) or skip.
    config.data.on_assistant_prompt = "error"
    # Rows whose prompts differ between chosen and rejected: error or skip.
    config.data.on_divergent = "error"
    # Rows with an empty response: error or skip.
    config.data.on_empty = "error"
    # Responses with equal scores where one has to be the better: error, or skip (of a ranking,
    # all but the first of each score).
    config.data.on_tie = "error"
    # Pairs whose chosen response has the lower score, or a margin below 0: error, keep (the order
    # is the record's) or skip.
    config.data.on_contradiction = "error"
    # Responses that equal their rival: keep or skip.
    config.data.on_identical = "keep"
    # Prompts over max_prompt_length in examples over max_length: error, truncate or skip.
    config.data.on_long_prompt = "error"
    # Pairs that format "synthetic" generates.
    config.data.synthetic_pairs = 4096

    config.algorithm = ConfigDict({"name": algorithm, **algorithm_knobs(algorithm)})

    config.reference = ConfigDict()
    # live (a frozen copy of the initial policy), precomputed (its log-probs, once), adapter (the
    # policy's base, with the adapters that it starts with where they are trained), synced (live,
    # and mixed with the policy now and then: TR-DPO), free (none).
    config.reference.mode = "free" if algorithm in _WITHOUT_REFERENCE else "live"
    # Of modes live, precomputed and synced: another policy in place of the initial one, as a
    # jaxpref workdir, or a Hugging Face directory or hub name, with the policy's tokenizer.
    # Empty: the policy that training starts from.
    config.reference.init_from = ""
    # Of mode synced: the policy's share after a mix, and the updates between two.
    config.reference.sync_mix = 0.6
    config.reference.sync_every = 512
    # Of the live copy: float32 or bfloat16.
    config.reference.dtype = "float32"

    config.optimizer = ConfigDict()
    # adamw or rmsprop.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-6
    # After the warm-up: constant, linear or cosine (both fall to 0 as the last step ends).
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    # Decay of the first moment (adamw), or momentum (rmsprop).
    config.optimizer.b1 = 0.9
    # Decay of the second moment.
    config.optimizer.b2 = 0.999
    config.optimizer.epsilon = 1e-8
    # Decoupled, on matrices only: norms and biases do not decay.
    config.optimizer.weight_decay = 0.0
    # Largest global norm of a gradient. 0: no clipping.
    config.optimizer.clip_norm = 1.0

    config.mesh = ConfigDict()
    # Devices along each axis; -1: all that the other axes leave.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.train = ConfigDict()
    # Updates in all. 0: train.epochs passes over the data.
    config.train.steps = 0
    config.train.epochs = 1.0
    # Parameters to train, as a regular expression for paths such as layers/query. Empty: the
    # adapters (and a reward model's head) if there are any, else all.
    config.train.trainable = ""
    # Parts of a batch whose gradients are added up before the update. Held-out data is looked at
    # in parts of that size, KTO's reference point there being that of a part.
    config.train.micro_batches = 1
    config.train.log_every = 10
    # 0: only before the first and after the last step.
    config.train.eval_every = 0
    # 0: only after the last step.
    config.train.save_every = 0
    # Checkpoints kept: with two, one is left if the last turns out to be bad.
    config.train.keep = 2

    config.eval = ConfigDict()
    # Held-out groups used. 0: all.
    config.eval.max_examples = 0

    return config.lock()


def algorithm_knobs(name: str) -> dict[str, Any]:
    """The knobs of an algorithm with their defaults.

    Raises:
      UserError: there is no such algorithm.
    """
    if name not in ALGORITHMS:
        raise UserError(one_of("algorithm.name", name, ALGORITHMS))
    return ALGORITHMS[name]


def check(config: ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is read or computed.

    Raises:
      UserError: naming the key, its value and what it may be.
    """
    name = config.algorithm.name
    unused = sorted(set(config.algorithm) - {"name", *algorithm_knobs(name)})
    missing = sorted({*algorithm_knobs(name)} - set(config.algorithm))
    if unused or missing:
        raise UserError(
            f"algorithm.name is {name!r}, whose knobs are {sorted(algorithm_knobs(name))}, but the "
            f"config has {sorted(set(config.algorithm) - {'name'})}: start from a recipe for "
            f"{name} rather than changing algorithm.name on the command line."
        )
    for key, known in {
        "data.format": DATA_FORMATS,
        "data.on_assistant_prompt": ("error", "continue", "skip"),
        "data.on_contradiction": ("error", "keep", "skip"),
        "data.on_divergent": ("error", "skip"),
        "data.on_empty": ("error", "skip"),
        "data.on_tie": ("error", "skip"),
        "data.on_identical": ("keep", "skip"),
        "data.on_long_prompt": ("error", "truncate", "skip"),
        "data.ranked_pairs": ("best_worst", "adjacent", "all"),
        "data.turns": ("all", "last"),
        "tokenizer.bos": ("auto", "always", "never"),
        "reference.mode": ("live", "precomputed", "adapter", "synced", "free"),
        "reference.dtype": ("float32", "bfloat16"),
        "optimizer.name": ("adamw", "rmsprop"),
        "optimizer.schedule": ("constant", "linear", "cosine"),
        "model.remat": ("none", "dots", "full"),
        "model.dtype": ("float32", "bfloat16"),
        "model.frozen_dtype": ("float32", "bfloat16", "nf4"),
        # In bfloat16 a small update leaves most parameters where they were.
        "model.param_dtype": ("float32",),
        "algorithm.divergence": ("reverse_kl", "forward_kl", "jensen_shannon", "alpha"),
        "algorithm.ranking": ("all_pairs", "plackett_luce"),
    }.items():
        if key.startswith("algorithm.") and key.partition(".")[2] not in config.algorithm:
            continue
        if (value := get(config, key)) not in known:
            raise UserError(one_of(key, value, known))
    if name in _WITHOUT_REFERENCE and config.reference.mode != "free":
        raise UserError(
            f"reference.mode is {config.reference.mode!r}, but {name} compares with no reference: "
            "leave it at 'free'."
        )
    if config.reference.mode == "free" and name not in (*_WITHOUT_REFERENCE, *_REFERENCE_OPTIONAL):
        raise UserError(
            f"reference.mode is 'free', but {name} reads the log-ratio of each response by itself, "
            "which says nothing without a reference; use another mode."
        )
    if config.reference.mode == "free" and config.algorithm.get("divergence") not in (
        None,
        "reverse_kl",
    ):
        raise UserError(
            f"reference.mode is 'free', but algorithm.divergence {config.algorithm.divergence!r} "
            "reads each log-ratio by itself; only reverse_kl can do without a reference."
        )
    _check_other_reference(config)
    if not 0 < config.reference.sync_mix <= 1:
        raise UserError(
            f"reference.sync_mix should be above 0 and at most 1; got {config.reference.sync_mix}."
        )
    if (
        config.reference.mode == "synced"
        and config.model.lora.rank
        and config.reference.sync_mix < 1
    ):
        raise UserError(
            "reference.mode 'synced' would mix the factors of the adapters, which is not to mix "
            "the weights that they make; with model.lora.rank set reference.sync_mix=1."
        )
    _refuse_without_effect(config)
    if config.reference.mode == "adapter" and not config.model.lora.rank:
        raise UserError(
            "reference.mode 'adapter' is the policy with its adapters off; give it some with "
            "--config.model.lora.rank=16, or use another mode."
        )
    if config.reference.mode == "adapter" and config.train.trainable:
        raise UserError(
            "reference.mode 'adapter' needs a base that is not trained; leave "
            "train.trainable empty."
        )
    if config.model.lora.dropout >= 1:
        raise UserError(f"model.lora.dropout should be below 1; got {config.model.lora.dropout}.")
    try:
        re.compile(config.train.trainable)
    except re.error as error:
        raise UserError(
            f"train.trainable is {config.train.trainable!r}, which is no regular expression "
            f"({error})."
        ) from error
    for key, value in flatten(config):
        lowest = _LOWEST.get(key)
        if lowest is not None and not value >= lowest:
            raise UserError(f"{key} should be at least {lowest}; got {value}.")
    if config.seed not in range(2**32):
        raise UserError(f"seed should be from 0 to {2**32 - 1}; got {config.seed}.")
    if not config.train.steps and not 0 < config.train.epochs < math.inf:
        raise UserError(
            f"train.steps is 0 and train.epochs {config.train.epochs}, which is no number of "
            "steps; give either."
        )
    for key in ("beta", "temperature"):
        if config.algorithm.get(key, 1.0) <= 0:
            raise UserError(f"algorithm.{key} should be above 0; got {config.algorithm[key]}.")
    if config.algorithm.get("temperature", 0.0) >= 1:
        raise UserError(
            f"algorithm.temperature should be below 1; got {config.algorithm.temperature}."
        )
    if name == "dpo" and config.algorithm.alpha > 1:
        raise UserError(f"algorithm.alpha should be from 0 to 1; got {config.algorithm.alpha}.")
    if name in ("aot", "aot_unpaired") and config.train.micro_batches > 1:
        raise UserError(
            f"train.micro_batches is {config.train.micro_batches}, but {name} compares quantiles "
            "of a whole batch; leave it at 1, with a smaller data.batch_size if need be."
        )
    if config.algorithm.get("label_smoothing", 0.0) >= 0.5:
        raise UserError(
            f"algorithm.label_smoothing should be below 0.5, where labels say nothing; got "
            f"{config.algorithm.label_smoothing}."
        )
    if name == "exo" and not config.algorithm.label_smoothing:
        raise UserError("algorithm.label_smoothing should be above 0 for exo; TRL has 0.001.")
    if config.algorithm.get("length_alpha", 1.0) > 1:
        raise UserError(
            f"algorithm.length_alpha should be from 0 to 1; got {config.algorithm.length_alpha}."
        )
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
    if (
        config.data.batch_size % max(config.train.micro_batches, 1)
        or config.train.micro_batches < 1
    ):
        raise UserError(
            f"train.micro_batches ({config.train.micro_batches}) should divide data.batch_size "
            f"({config.data.batch_size})."
        )
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
    if not 0 <= config.data.eval_fraction < 1:
        raise UserError(
            f"data.eval_fraction should be from 0 to below 1; got {config.data.eval_fraction}."
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
    chosen, mode, lora = config.algorithm, config.reference.mode, config.model.lora
    active: dict[str, tuple[bool, str]] = {
        "reference.dtype": (mode == "live", "reference.mode is 'live'"),
        "reference.sync_mix": (mode == "synced", "reference.mode is 'synced'"),
        "reference.sync_every": (mode == "synced", "reference.mode is 'synced'"),
        "model.lora.alpha": (lora.rank > 0, "model.lora.rank is above 0"),
        "model.lora.dropout": (lora.rank > 0, "model.lora.rank is above 0"),
        "model.lora.targets": (lora.rank > 0, "model.lora.rank is above 0"),
        "model.frozen_dtype": (
            bool(trainable(config)),
            "something is frozen (model.lora.rank, train.trainable)",
        ),
        "train.epochs": (not config.train.steps, "train.steps is 0"),
    }
    if chosen.name == "dpo":
        active["algorithm.alpha"] = (
            chosen.divergence == "alpha",
            "algorithm.divergence is 'alpha'",
        )
    if "wpo_largest" in chosen:
        active["algorithm.wpo_largest"] = (chosen.wpo, "algorithm.wpo is True")
    usual = default(chosen.name)
    for key, (has_effect, condition) in active.items():
        if not has_effect and get(config, key) != get(usual, key):
            raise UserError(
                f"{key} is {get(config, key)!r}, which has an effect only where {condition}; "
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
    return path.endswith(DATA_SUFFIXES) and not Path(path).is_dir()


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


def one_of(key: str, value: object, known: Iterable[str]) -> str:
    """The message for a value outside a fixed set, with the nearest member."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key} is {value!r}; it should be one of {', '.join(known)}.{hint}"


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
        free = (key.startswith(_RESUMABLE) and not _precomputed(key, ours)) or (
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
