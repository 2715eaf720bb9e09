"""What a knob is, and every knob of a run, declared once; those of a method are in `methods`.

A declaration holds all there is to know of a knob: its default, its meaning, and what it may be.
Nothing heavy is imported here, so that a command line is checked at once.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Effect(NamedTuple):
    """When a knob has an effect: in words, and as a function of the whole config."""

    condition: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Knob:
    """One value that a user may set.

    Attributes:
      default: its value in every recipe that does not set it; also says its type.
      meaning: what it does, in a phrase.
      at_least: the lowest value, if there is one.
      above: what it has to exceed, if anything.
      at_most: the highest value, if there is one.
      below: what it has to stay under, if anything.
      choices: the values that it may have, if they are few.
      effect: when it does anything at all; None for always. Elsewhere another value than the
        default is refused.
      resumable: it may change when a run is resumed, since no update depends on it.
    """

    default: Any
    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    effect: Effect | None = None
    resumable: bool = False

    @property
    def bounds(self) -> str:
        """What a number may be, in words; empty if it may be anything."""
        lowest = self.at_least if self.above is None else self.above
        highest = self.at_most if self.below is None else self.below
        under = "" if self.below is None else "below "
        if lowest is None or highest is None:
            one = f"{'at least' if self.above is None else 'above'} {lowest}"
            other = f"{under or 'at most '}{highest}"
            return one if lowest is not None else other if highest is not None else ""
        if self.above is not None:
            return f"above {lowest} and {under or 'at most '}{highest}"
        return f"from {lowest} to {under}{highest}"

    def refusal(self, key: str, value: Any) -> str | None:
        """The message for a value that the knob cannot have; None if it can."""
        if self.choices:
            return None if value in self.choices else one_of(key, value, self.choices)
        # A NaN fails every comparison.
        fits = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if fits else f"{key} should be {self.bounds}; got {value}."


def one_of(key: str, value: object, known: Iterable[object]) -> str:
    """The message for a value outside a fixed set, with the nearest member."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key} is {value!r}; it should be one of {', '.join(names)}.{hint}"


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
    "reward_bench",
    "synthetic",
)

_SYNCED = Effect("reference.mode is 'synced'", lambda c: c.reference.mode == "synced")
_ADAPTED = Effect("model.lora.rank is above 0", lambda c: c.model.lora.rank > 0)
_FROZEN = Effect(
    "something is frozen (model.lora.rank, train.trainable)",
    lambda c: bool(c.model.lora.rank or c.train.trainable),
)

KNOBS: dict[str, Knob] = {
    "seed": Knob(
        0,
        "of random first weights, the order of the data, dropout, and generated data",
        at_least=0,
        at_most=2**32 - 1,
    ),
    "model.init_from": Knob(
        "",
        "where the first weights come from: empty for random ones; a jaxpref workdir; or a Hugging "
        "Face directory or hub name, which brings a shape of its own. PEFT adapters are merged "
        "into their base.",
        resumable=True,
    ),
    "model.ignore_keys": Knob(
        (), "keys of a Hugging Face config.json to ignore where jaxpref does not know them"
    ),
    "model.vocabulary_size": Knob(
        0,
        "rows of the embedding of a model with random weights; 0: as many as the tokenizer has ids",
        at_least=0,
    ),
    "model.width": Knob(128, "size of a hidden state, with random weights", at_least=1),
    "model.layers": Knob(4, "number of layers, with random weights", at_least=1),
    "model.heads": Knob(4, "query heads a layer, with random weights", at_least=1),
    "model.kv_heads": Knob(
        4, "key and value heads a layer, with random weights; divides model.heads", at_least=1
    ),
    "model.head_dim": Knob(32, "size of a head, with random weights; even", at_least=1),
    "model.feed_forward": Knob(
        384, "inner size of the feed-forward layers, with random weights", at_least=1
    ),
    "model.rope_theta": Knob(
        10_000.0, "base of the rotary positions' wavelengths, with random weights"
    ),
    "model.norm_epsilon": Knob(1e-6, "added to the mean square in norms, with random weights"),
    "model.tied_head": Knob(True, "use the embedding as the LM head too, with random weights"),
    "model.dtype": Knob(
        "float32",
        "dtype of activations and matrix products; parameters have a dtype of their own",
        choices=("float32", "bfloat16"),
    ),
    "model.param_dtype": Knob(
        "float32",
        "dtype of the parameters that are trained: in bfloat16 a small update would leave most of "
        "them where they were",
        choices=("float32",),
    ),
    "model.frozen_dtype": Knob(
        "float32",
        "dtype of the parameters that are not trained; nf4 keeps the layers' matrices in four bits "
        "a weight (QLoRA)",
        choices=("float32", "bfloat16", "nf4"),
        effect=_FROZEN,
    ),
    "model.remat": Knob(
        "dots",
        "what the backward pass computes again in place of keeping it: nothing, all but the "
        "products with weights, or everything",
        choices=("none", "dots", "full"),
    ),
    "model.attention": Knob(
        "auto",
        "what computes attention: a kernel for TPUs (splash), or XLA block by block (blockwise); "
        "auto: the kernel where it can be had",
        choices=("auto", "blockwise", "splash"),
        resumable=True,
    ),
    "model.attention_block": Knob(
        128, "queries that attention computes at a time, block by block", at_least=1
    ),
    "model.lora.rank": Knob(
        0, "rank of low-rank adapters (LoRA), which alone are then trained; 0: none", at_least=0
    ),
    "model.lora.alpha": Knob(
        16.0, "scale of the adapters: their product counts alpha / rank times", effect=_ADAPTED
    ),
    "model.lora.targets": Knob(
        (),
        "products that have an adapter, of query, key, value, out, gate, up, down; empty: all, or "
        "those of attention in a mixture of experts",
        effect=_ADAPTED,
    ),
    "model.lora.dropout": Knob(
        0.0,
        "share of the adapters' inputs that are set to 0 in training",
        at_least=0,
        below=1,
        effect=_ADAPTED,
    ),
    "tokenizer.name": Knob(
        "auto",
        "auto (the tokenizer of model.init_from, else bytes), bytes (ByT5's, which needs no "
        "files), a directory, or a hub name",
    ),
    "tokenizer.bos": Knob(
        "auto",
        "whether prompts that are texts begin with BOS; auto: where the tokenizer itself puts it "
        "before a text. Of conversations the chat template alone decides.",
        choices=("auto", "always", "never"),
    ),
    "tokenizer.parse_special_tokens": Knob(
        False, 'read "</s>" and the like inside the data as special tokens rather than as text'
    ),
    "tokenizer.chat_template": Knob(
        "",
        "how conversations read, in place of the tokenizer's own template: alpaca, hh, or a Jinja "
        "file",
    ),
    "data.path": Knob(
        "", "a .jsonl, .jsonl.gz, .json or .parquet file, a directory of them, or a hub name"
    ),
    "data.mixture": Knob(
        (),
        "several sources in place of data.path: dicts with a path, and if need be format, subset, "
        "split, limit (else those of data), weight (share of the examples in a step, against the "
        "other weights; else 1) and name (in metrics; else the file's)",
    ),
    "data.format": Knob(
        "auto",
        "how a record is read; auto goes by its columns. A prompt is a text or a list of messages.",
        choices=DATA_FORMATS,
    ),
    "data.subset": Knob("", "a folder in a directory or in a hub data set"),
    "data.split": Knob("train", "the split of a directory or of a hub data set"),
    "data.eval_path": Knob("", "held-out data, as a source of its own"),
    "data.eval_split": Knob("", "held-out data, as another split of data.path"),
    "data.eval_fraction": Knob(
        0.05,
        "share of the prompts that is held out, where no held-out source is named",
        at_least=0,
        below=1,
    ),
    "data.limit": Knob(0, "examples that are read of a source, the first ones; 0: all", at_least=0),
    "data.ranked_pairs": Knob(
        "best_worst",
        "which pairs are made of more than two ranked responses, for a method that needs pairs: "
        "one, those that are neighbours in the ranking, or all",
        choices=("best_worst", "adjacent", "all"),
    ),
    "data.min_score_ratio": Knob(
        2.0, "pairs of format shp with a lower ratio of their scores are dropped", at_least=1
    ),
    "data.deduplicate": Knob(
        False, "drop examples whose tokens, of prompt and responses, came before"
    ),
    "data.num_proc": Knob(1, "processes that tokenise", at_least=1, resumable=True),
    "data.cache": Knob(
        "",
        "a directory where tokenised data is kept for other runs; empty: none",
        resumable=True,
    ),
    "data.batch_size": Knob(
        64, "groups (a prompt with its responses) in a step, over all devices", at_least=1
    ),
    "data.max_length": Knob(
        512, "tokens of a prompt plus a response; what is longer is cut", at_least=1
    ),
    "data.max_prompt_length": Knob(
        256,
        "tokens that a prompt keeps, its last ones, where prompt plus response are too long",
        at_least=1,
    ),
    "data.row_length": Knob(0, "tokens in a row of the batch; 0: data.max_length", at_least=0),
    "data.scored_length": Knob(
        0,
        "scored tokens in a row of the batch; 0: what the data's share of responses calls for, or "
        "its longest responses, where a device has few rows",
        at_least=0,
    ),
    "data.rows": Knob(
        0,
        "rows of a micro-batch, over all devices. A step has as many micro-batches as its groups "
        "need, and adds up their gradients; memory grows with the rows, while what a step computes "
        "does not depend on them, but for dropout's random numbers. 0: an eighth of what an "
        "average batch needs (where responses are sampled, one with the longest), or 2,048 tokens "
        "a device if that is more; for methods that compare the examples of a step (aot, "
        "aot_unpaired, kto) all of a batch",
        at_least=0,
        resumable=True,
    ),
    "data.turns": Knob(
        "all",
        "turns of the assistant that are trained in a conversation, after the first question, or "
        "from where chosen and rejected part: all, or the last, whose prompt is all before it",
        choices=("all", "last"),
    ),
    "data.on_assistant_prompt": Knob(
        "error",
        "what is done with a response that follows a message of the assistant; continue: that "
        "message's text begins the turn",
        choices=("error", "continue", "skip"),
    ),
    "data.on_divergent": Knob(
        "error",
        "what is done with rows whose prompts differ between chosen and rejected",
        choices=("error", "skip"),
    ),
    "data.on_empty": Knob(
        "error", "what is done with rows that have an empty response", choices=("error", "skip")
    ),
    "data.on_tie": Knob(
        "error",
        "what is done with responses of equal scores where one has to be the better; skip keeps "
        "the first of each score of a ranking",
        choices=("error", "skip"),
    ),
    "data.on_contradiction": Knob(
        "error",
        "what is done with pairs whose chosen response has the lower score, or whose margin is "
        "below 0; keep: the record's order counts",
        choices=("error", "keep", "skip"),
    ),
    "data.on_identical": Knob(
        "keep", "what is done with responses that equal their rival", choices=("keep", "skip")
    ),
    "data.on_long_prompt": Knob(
        "error",
        "what is done with prompts over data.max_prompt_length in examples over data.max_length",
        choices=("error", "truncate", "skip"),
    ),
    "data.synthetic_pairs": Knob(4096, "pairs that format synthetic generates", at_least=1),
    "reference.mode": Knob(
        "live",
        "where the reference's log-probs come from: a frozen copy of the first policy; its "
        "log-probs, computed once; the policy's base, with the adapters that it starts with where "
        "they are trained; a copy that is mixed with the policy now and then (TR-DPO); or none, "
        "which is the default of methods without a reference",
        choices=("live", "precomputed", "adapter", "synced", "free"),
    ),
    "reference.init_from": Knob(
        "",
        "another policy as the reference, in modes live, precomputed and synced: a jaxpref "
        "workdir, or a Hugging Face directory or hub name, with the policy's tokenizer; empty: "
        "the policy that training starts from",
        resumable=True,
    ),
    "reference.sync_mix": Knob(
        0.6, "the policy's share in the reference after a mix", above=0, at_most=1, effect=_SYNCED
    ),
    "reference.sync_every": Knob(512, "updates between two mixes", at_least=1, effect=_SYNCED),
    "reference.dtype": Knob(
        "float32",
        "dtype of the frozen copy's parameters",
        choices=("float32", "bfloat16"),
        effect=Effect("reference.mode is 'live'", lambda c: c.reference.mode == "live"),
    ),
    "optimizer.name": Knob("adamw", "the rule of the updates", choices=("adamw", "rmsprop")),
    "optimizer.learning_rate": Knob(1e-6, "after the warm-up, before any decay", at_least=0),
    "optimizer.schedule": Knob(
        "constant",
        "the learning rate after the warm-up; linear and cosine fall to 0 as the last step ends",
        choices=("constant", "linear", "cosine"),
    ),
    "optimizer.warmup_steps": Knob(
        0, "steps in which the learning rate rises from 0, linearly", at_least=0
    ),
    "optimizer.b1": Knob(0.9, "decay of the first moment (adamw), or momentum (rmsprop)"),
    "optimizer.b2": Knob(0.999, "decay of the second moment"),
    "optimizer.epsilon": Knob(1e-8, "added to the root of the second moment"),
    "optimizer.weight_decay": Knob(
        0.0, "decoupled weight decay, on matrices alone: norms and biases do not decay", at_least=0
    ),
    "optimizer.clip_norm": Knob(
        1.0, "largest global norm of a gradient; 0: no clipping", at_least=0
    ),
    "mesh.data": Knob(
        -1, "devices that share a batch; -1: all that the other axes leave", resumable=True
    ),
    "mesh.fsdp": Knob(
        1, "devices that share a batch and split the parameters by width", resumable=True
    ),
    "mesh.tensor": Knob(
        1, "devices that split heads, feed-forward layers and vocabulary", resumable=True
    ),
    "train.steps": Knob(0, "updates in all; 0: train.epochs passes over the data", at_least=0),
    "train.epochs": Knob(
        1.0,
        "passes over the data",
        at_least=0,
        effect=Effect("train.steps is 0", lambda c: not c.train.steps),
    ),
    "train.trainable": Knob(
        "",
        "parameters to train, as a regular expression for paths such as layers/query; empty: the "
        "adapters, with a reward model's head, if there are any, else all",
    ),
    "train.log_every": Knob(
        10, "steps between two lines of measurements", at_least=1, resumable=True
    ),
    "train.eval_every": Knob(
        0,
        "steps between two evaluations; 0: only before the first and after the last step",
        at_least=0,
        resumable=True,
    ),
    "train.save_every": Knob(
        0,
        "steps between two checkpoints; 0: only after the last step",
        at_least=0,
        resumable=True,
    ),
    "train.hang_seconds": Knob(
        1800.0,
        "seconds without an end of a step, or of a batch of an evaluation, after which a run in "
        "several processes is given up, since one of them hangs; four times that at first; 0: "
        "never",
        at_least=0,
        resumable=True,
    ),
    "train.keep": Knob(
        2,
        "checkpoints that are kept: with two, one is left if the last turns out to be bad",
        at_least=1,
        resumable=True,
    ),
    "train.best_metric": Knob(
        "",
        "a measurement of evaluations, such as eval/loss, by which the best checkpoint is kept "
        "beside the last ones, and saved after that evaluation; empty: none",
        resumable=True,
    ),
    "train.best_mode": Knob(
        "min",
        "which value of it is the best, the lowest or the highest",
        choices=("min", "max"),
        effect=Effect("train.best_metric is set", lambda c: bool(c.train.best_metric)),
        resumable=True,
    ),
    "eval.max_examples": Knob(
        0,
        "held-out groups that are used, the first ones; 0: all. With reference.mode precomputed "
        "it stays what it was when a run is resumed",
        at_least=0,
        resumable=True,
    ),
    "eval.win_rate_prompts": Knob(
        0,
        "held-out prompts, the first ones, whose responses are sampled at each evaluation: how "
        "often they are better than what the reference says to the same prompts before the first "
        "step, their reward, length, and KL to the reference; 0: none",
        at_least=0,
        effect=Effect("algorithm.name is not 'reward'", lambda c: c.algorithm.name != "reward"),
    ),
}

_TRUNCATED = " Elsewhere than at its default the policy is trained on what it would not say."

# Knobs of methods that sample responses: how, and what these are rewarded by.
SAMPLING_KNOBS: dict[str, Knob] = {
    "sampling.samples": Knob(4, "responses sampled for each prompt of a step", at_least=1),
    "sampling.max_new_tokens": Knob(
        128,
        "tokens after which a response is cut; with the prompt's at most data.max_length",
        at_least=1,
    ),
    "sampling.temperature": Knob(
        1.0,
        "what logits are divided by, in sampling and in all log-probs of policy and reference",
        above=0,
    ),
    "sampling.top_k": Knob(
        0, "tokens that may be drawn, the most probable ones; 0: all." + _TRUNCATED, at_least=0
    ),
    "sampling.top_p": Knob(
        1.0,
        "the most probable tokens that together reach this may be drawn; 1: all." + _TRUNCATED,
        above=0,
        at_most=1,
    ),
    "sampling.min_p": Knob(
        0.0,
        "tokens at least this share as probable as the most probable one may be drawn; 0: all."
        + _TRUNCATED,
        at_least=0,
        at_most=1,
    ),
    "sampling.stop_token_ids": Knob(
        (), "ids that end a response, beside EOS and what ends a turn in a conversation"
    ),
    "sampling.cache_dtype": Knob(
        "auto",
        "dtype of the keys and values that are remembered; auto: model.dtype",
        choices=("auto", "float32", "bfloat16"),
    ),
    "sampling.at_once": Knob(
        0,
        "prompts that are decoded together; those that are done make room for others. 0: all of a "
        "step",
        at_least=0,
    ),
    "sampling.compare": Knob(
        (),
        "workdirs of other policies, whose responses to the held-out prompts are measured once, "
        "before the first step, and stand beside this run's in its closing table",
        resumable=True,
    ),
    "sampling.shown": Knob(
        3,
        "held-out prompts whose responses are shown and kept at each evaluation",
        at_least=0,
        resumable=True,
    ),
}

REWARD_KNOBS: dict[str, Knob] = {
    "reward.path": Knob(
        "",
        "a reward model: the workdir of a run of algorithm reward, or a Hugging Face directory or "
        "hub name with a sequence classifier of one label",
    ),
    "reward.function": Knob(
        "",
        "a Python function as module:function, called as TRL calls its reward functions (see "
        "jaxpref.rewards.from_function)",
    ),
    "reward.mixture": Knob(
        (),
        "several rewards in place of reward.path and reward.function: dicts with a path or a "
        "function, and if need be weight (its factor in the sum; else 1) and name (in metrics; "
        "else the path's or the function's)",
    ),
    "reward.max_length": Knob(
        0,
        "tokens of a prompt plus a response that a reward model reads; what is longer is cut. 0: "
        "as many as its run did, or as the responses may have if that is more",
        at_least=0,
    ),
    "reward.batch_size": Knob(
        16, "rows of tokens that a reward model scores at a time", at_least=1
    ),
    "reward.dtype": Knob(
        "float32", "dtype of a reward model's parameters", choices=("float32", "bfloat16")
    ),
    "reward.normalize": Knob(
        False,
        "subtract the mean of all rewards so far and divide by their standard deviation, before "
        "anything is clipped or subtracted",
    ),
    "reward.clip": Knob(0.0, "largest size of a reward, before penalties; 0: any", at_least=0),
    "reward.length_penalty": Knob(
        0.0, "what is subtracted from a response's reward for each of its tokens", at_least=0
    ),
    "reward.truncation_penalty": Knob(
        0.0,
        "what is subtracted from the reward of a response that was cut by length",
        at_least=0,
    ),
}

_EVALUATED = Effect("eval.win_rate_prompts is above 0", lambda c: c.eval.win_rate_prompts > 0)
# What methods on data have of the two groups above, for what they sample at evaluations.
EVALUATION_KNOBS: dict[str, Knob] = {
    key: dataclasses.replace(knob, effect=_EVALUATED)
    for key, knob in {
        "sampling.max_new_tokens": Knob(
            0,
            "tokens after which a response is cut; 0: what data.max_prompt_length leaves of "
            "data.max_length",
            at_least=0,
        ),
        "sampling.temperature": dataclasses.replace(
            SAMPLING_KNOBS["sampling.temperature"],
            meaning="what logits are divided by, in sampling and in the KL of what is sampled",
        ),
        **{
            key: {**SAMPLING_KNOBS, **REWARD_KNOBS}[key]
            for key in (
                "sampling.stop_token_ids",
                "sampling.shown",
                "reward.path",
                "reward.function",
                "reward.mixture",
                "reward.max_length",
                "reward.batch_size",
                "reward.dtype",
            )
        },
    }.items()
}

# Knobs of methods with a critic.
CRITIC_KNOBS: dict[str, Knob] = {
    "critic.init_from": Knob(
        "",
        "where the critic's first weights come from: empty for the policy's with a head of zeros; "
        "or a reward model's workdir, of the same shape as the policy",
        resumable=True,
    ),
    "critic.learning_rate": Knob(
        1e-5, "of the critic; schedule and all else is the policy's optimizer's", at_least=0
    ),
    "critic.clip_norm": Knob(
        1.0, "largest global norm of the critic's gradient; 0: no clipping", at_least=0
    ),
    "critic.warmup": Knob(0, "first steps in which the critic alone is trained", at_least=0),
}

# Groups of knobs that only some methods have, by the name that stands before the dot.
GROUPS: dict[str, dict[str, Knob]] = {
    "sampling": SAMPLING_KNOBS,
    "reward": REWARD_KNOBS,
    "critic": CRITIC_KNOBS,
}
