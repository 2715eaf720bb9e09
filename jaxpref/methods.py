"""Every method, declared once: its data, its reference, its knobs.

What a method computes is the loss of its name in `jaxpref.losses`; `jaxpref.algorithms` joins the
two. Nothing heavy is imported here, so that a command line is checked at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpref.knobs import Effect, Knob


@dataclasses.dataclass(frozen=True)
class Method:
    """What there is to know of a method beside its loss.

    Attributes:
      summary: what it is, in a phrase, with its paper.
      family: the module of `jaxpref.algorithms` that builds it.
      data: the kind of examples that it trains on, see `jaxpref.data.convert`.
      data_where: other kinds, and where it trains on them; `config.data_kind` chooses.
      reference: whether it compares the policy with a reference: "needed"; "optional" where the
        loss reads differences of log-ratios alone, so that a reference may be left out; "none".
      knobs: its own knobs by name, beside `algorithm.name`. There are no others, so that a knob
        it would ignore is an unknown key.
      takes: what its loss takes beside log-probs and knobs, by the names of the loss's arguments.
      reads: what it takes of the values that a data set has for each example beside the tokens.
      running: the metrics whose means over all steps so far it reads.
      groups: the groups of knobs that it has beside those of every run, see `knobs.GROUPS`.
      defaults: what it sets otherwise than those groups, by dotted key.
      least_samples: the fewest responses to a prompt that it can learn from, where it samples.
      compares_examples: how it compares the examples of a step with each other: not at all (""),
        by their "quantiles", so that a batch cannot be cut into micro-batches, or with a "mean",
        which takes another forward pass over a batch that is cut.
    """

    summary: str
    family: str
    data: str
    reference: str
    knobs: Mapping[str, Knob] = dataclasses.field(default_factory=dict)
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    compares_examples: str = ""
    data_where: Mapping[str, Effect] = dataclasses.field(default_factory=dict)
    groups: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    least_samples: int = 1

    @property
    def samples(self) -> bool:
        """Whether it trains on responses that the policy samples."""
        return "sampling" in self.groups

    @property
    def speaks(self) -> bool:
        """Whether its model is a language model, which can answer prompts."""
        return self.family != "reward"


_BINARY = Effect("algorithm.ranking is 'binary'", lambda c: c.algorithm.ranking == "binary")
_COMPARED = Effect("algorithm.ranking is not 'binary'", lambda c: c.algorithm.ranking != "binary")

# The running mean that BCO's shift is.
MEAN_REWARD = "rewards/mean"
_LENGTHS = ("chosen_lengths", "rejected_lengths")


def _beta(default: float = 0.1) -> Knob:
    return Knob(default, "inverse temperature of the implicit reward", above=0)


def _weight(default: float, of: str) -> Knob:
    return Knob(default, f"weight of {of}", at_least=0)


_BETA = {"beta": _beta()}
_RATIOS = {
    **_BETA,
    "length_alpha": Knob(
        1.0,
        "weight of a response's tokens beyond the shorter one's length (LD-DPO, arXiv 2409.06411); "
        "1: the same as of all others",
        at_least=0,
        at_most=1,
    ),
}
_PAIRS = {
    **_RATIOS,
    "wpo": Knob(
        False, "weigh pairs by how likely the policy is to say them (WPO, arXiv 2406.11827)"
    ),
    "wpo_largest": Knob(
        0.0,
        "largest weight of a pair, which is 1 in its authors' code; 0: as large as it comes",
        at_least=0,
        effect=Effect("algorithm.wpo is True", lambda c: c.algorithm.wpo),
    ),
}
_WRONG_LABELS = "probability that a label is wrong; at 0.5 labels would say nothing"
_SMOOTHED = {"label_smoothing": Knob(0.0, _WRONG_LABELS, at_least=0, below=0.5)}
_PER_TOKEN = Knob(False, "divide log-ratios by the responses' lengths, as TRL does for ipo")
_NLL_PER_TOKEN = Knob(
    False,
    "the likelihood's term as a mean over the response tokens of the batch, as TRL has it (for "
    "orpo with the prompts' tokens); else the paper's: the mean (orpo) or sum (cpo) of a response",
)
_NLL_WEIGHT = {"nll_weight": _weight(1.0, "the chosen response's negative log-likelihood")}


_KL = {
    "beta": Knob(0.05, "coefficient of the KL to the reference; 0: none", at_least=0),
    "kl_in": Knob(
        "reward",
        "where the KL counts: in the reward, or in the loss as a term of its own",
        choices=("reward", "loss"),
    ),
    "kl_estimator": Knob(
        "k1",
        "how the KL is estimated: k1 in the reward; in the loss sequence_k2, whose gradient is "
        "that of the KL, or k2 or k3 of tokens, which are biased (see advantages.kl_estimates)",
        choices=("k1", "sequence_k2", "k2", "k3"),
    ),
    "kl_target": Knob(
        0.0,
        "KL of a response, in nats, that beta is adapted to (Ziegler et al. 2019, arXiv "
        "1909.08593, section 2.2); 0: beta stays as it is",
        at_least=0,
    ),
    "kl_horizon": Knob(
        10_000,
        "responses in which beta adapts to its target",
        at_least=1,
        effect=Effect("algorithm.kl_target is above 0", lambda c: c.algorithm.kl_target > 0),
    ),
    "largest_kl": Knob(
        0.0,
        "KL of a response to the reference, in nats, at which the run stops, with the checkpoint "
        "before kept; 0: never",
        at_least=0,
    ),
}
_SEVERAL = Effect(
    "algorithm.epochs or algorithm.minibatches is above 1",
    lambda c: c.algorithm.epochs * c.algorithm.minibatches > 1,
)


def _policy_gradient(
    summary: str,
    *,
    epochs: int = 1,
    aggregation: str = "sum",
    **facts: Any,
) -> Method:
    """A policy gradient on sampled responses, with what all of them may set."""
    knobs = {
        **_KL,
        "epochs": Knob(epochs, "passes over the sampled responses in a step", at_least=1),
        "minibatches": Knob(
            1, "updates that a pass is divided into; divides data.batch_size", at_least=1
        ),
        "ratio": Knob(
            "token",
            "what is clipped where a step has several updates: each token's ratio (PPO), a "
            "response's (GSPO, arXiv 2507.18071), or the weight of a token's gradient (CISPO, "
            "arXiv 2506.13585)",
            choices=("token", "sequence", "cispo"),
        ),
        "clip": Knob(
            0.2, "how far a ratio may fall below 1, or, without clip_high, exceed it", above=0
        ),
        "clip_high": Knob(
            0.0,
            "how far a ratio may exceed 1 (DAPO's clip-higher, arXiv 2503.14476); of cispo the "
            "largest weight less 1. 0: as clip",
            at_least=0,
        ),
        "stop_kl": Knob(
            0.0,
            "KL of a token to the policy that sampled, in nats, at which a step makes no further "
            "updates; 0: never",
            at_least=0,
            effect=_SEVERAL,
        ),
        "aggregation": Knob(
            aggregation,
            "how token losses add up: sum (over a response, mean over responses: the exact policy "
            "gradient), response (mean over a response), token (mean over all tokens of an "
            "update), constant (sum over sampling.max_new_tokens); see losses.aggregate",
            choices=("sum", "response", "token", "constant"),
        ),
        "entropy_bonus": Knob(0.0, "weight of the policy's entropy, in nats a token", at_least=0),
        "importance_cap": Knob(
            0.0,
            "largest weight by which tokens are corrected for what the sampler and the trainer "
            "compute differently; 0: no correction",
            at_least=0,
        ),
        **facts.pop("knobs", {}),
    }
    groups = ("sampling", "reward", *facts.pop("groups", ()))
    return Method(summary, "policy_gradient", "prompts", "optional", knobs, groups=groups, **facts)


def _pairs(summary: str, knobs: Mapping[str, Knob], **facts: object) -> Method:
    facts = {"reference": "needed", **facts}
    return Method(summary, "pairs", "pairs", knobs=knobs, **facts)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "sft": Method(
        "maximum likelihood of the (chosen) response",
        "sft",
        "sft",
        "none",
    ),
    "dpo": _pairs(
        "DPO (arXiv 2305.18290), with label smoothing, f-divergences, LD-DPO and WPO",
        {
            **_PAIRS,
            **_SMOOTHED,
            "divergence": Knob(
                "reverse_kl",
                "what holds the policy near the reference (f-DPO, arXiv 2309.16240)",
                choices=("reverse_kl", "forward_kl", "jensen_shannon", "alpha"),
            ),
            "alpha": Knob(
                0.5,
                "of divergence alpha: 0 is the reverse KL, 1 the forward KL",
                at_least=0,
                at_most=1,
                effect=Effect(
                    "algorithm.divergence is 'alpha'", lambda c: c.algorithm.divergence == "alpha"
                ),
            ),
            "per_token": _PER_TOKEN,
        },
        reference="optional",
        takes=_LENGTHS,
    ),
    "robust_dpo": _pairs(
        "DPO for labels that are wrong at a known rate (arXiv 2403.00409)",
        {**_PAIRS, "label_smoothing": Knob(0.1, _WRONG_LABELS, at_least=0, below=0.5)},
        reference="optional",
    ),
    "ipo": _pairs(
        "squared distance of the margin from a target (arXiv 2310.12036)",
        {**_PAIRS, "per_token": _PER_TOKEN},
        reference="optional",
        takes=_LENGTHS,
    ),
    "hinge": _pairs(
        "hinge of DPO's margin (SLiC-HF's loss on log-ratios, arXiv 2309.06657)",
        _PAIRS,
        reference="optional",
    ),
    "exo": _pairs(
        "reverse KL to the smoothed labels (arXiv 2402.00856)",
        {
            **_PAIRS,
            "label_smoothing": Knob(
                1e-3, f"{_WRONG_LABELS}, and at 0 the loss is infinite", above=0, below=0.5
            ),
        },
        reference="optional",
    ),
    "nca": _pairs("noise contrast of each response with the reference (arXiv 2402.05369)", _PAIRS),
    "sppo_hard": _pairs("self-play with hard labels (arXiv 2405.00675)", _PAIRS),
    "aot": _pairs(
        "log-ratio margins of policy and reference compared by quantile (arXiv 2406.05882)",
        {**_RATIOS, **_SMOOTHED},
        reference="optional",
        takes=("where",),
        compares_examples="quantiles",
    ),
    "aot_unpaired": _pairs(
        "log-ratios of chosen and rejected responses compared by quantile (arXiv 2406.05882)",
        {**_RATIOS, **_SMOOTHED},
        reference="optional",
        takes=("where",),
        compares_examples="quantiles",
    ),
    "apo_zero": _pairs("pushes chosen rewards up, rejected ones down (arXiv 2408.06266)", _PAIRS),
    "apo_down": _pairs("pushes both down, rejected ones further (arXiv 2408.06266)", _PAIRS),
    "discopop": _pairs(
        "a loss found by a language model (arXiv 2406.08414)",
        {
            **_PAIRS,
            "beta": _beta(0.05),
            "temperature": Knob(
                0.05,
                "how sharply it passes from the logistic to the exponential loss",
                above=0,
                below=1,
            ),
        },
        reference="optional",
    ),
    "bco": _pairs(
        "each response classified, with the mean reward as threshold (arXiv 2404.04656)",
        _PAIRS,
        takes=("shift",),
        running=(MEAN_REWARD,),
    ),
    "mpo": _pairs(
        "a mixture of dpo, bco and sft (arXiv 2411.10442)",
        {
            **_BETA,
            "dpo_weight": _weight(0.8, "DPO's loss"),
            "bco_weight": _weight(0.2, "BCO's loss"),
            "nll_weight": _weight(1.0, "the chosen response's negative log-likelihood a token"),
        },
        takes=("chosen_lengths", "shift"),
        running=(MEAN_REWARD,),
    ),
    "simpo": _pairs(
        "margin of the mean log-probs a token (arXiv 2405.14734)",
        {
            "beta": _beta(2.0),
            "margin": Knob(1.0, "margin that the rewards should have", at_least=0),
            **_SMOOTHED,
        },
        reference="none",
        takes=_LENGTHS,
    ),
    "orpo": _pairs(
        "likelihood, and the odds ratio of the two responses (arXiv 2403.07691)",
        {
            "beta": Knob(0.1, "weight of the odds ratio's term", above=0),
            "nll_per_token": _NLL_PER_TOKEN,
        },
        reference="none",
        takes=_LENGTHS,
    ),
    "cpo": _pairs(
        "DPO against a uniform reference, and likelihood (arXiv 2401.08417)",
        {**_BETA, **_NLL_WEIGHT, **_SMOOTHED, "nll_per_token": _NLL_PER_TOKEN},
        reference="none",
    ),
    "slic_hf": _pairs(
        "hinge of the log-probs' margin, and likelihood (arXiv 2305.10425)",
        {"margin": Knob(1.0, "margin in nats that is enough", at_least=0), **_NLL_WEIGHT},
        reference="none",
    ),
    "unlikelihood": _pairs(
        "likelihood of the chosen response, unlikelihood of the rejected one (arXiv 2305.18290)",
        {"alpha": _weight(1.0, "the rejected responses' term")},
        reference="none",
    ),
    "kto": Method(
        "single responses, good or bad, by prospect theory (arXiv 2402.01306)",
        "unpaired",
        "mismatched",
        "needed",
        {
            **_BETA,
            "desirable_weight": _weight(1.0, "responses labelled good"),
            "undesirable_weight": _weight(1.0, "responses labelled bad"),
        },
        reads=("labels",),
        compares_examples="mean",
    ),
    "bco_unpaired": Method(
        "single responses, good or bad, with the mean reward as threshold (arXiv 2404.04656)",
        "unpaired",
        "unpaired",
        "needed",
        _BETA,
        reads=("labels",),
        running=(MEAN_REWARD,),
    ),
    "rrhf": Method(
        "log-probs in the order of scores, and likelihood of the best (arXiv 2304.05302)",
        "ranked",
        "ranked",
        "none",
        {"rank_weight": _weight(1.0, "the ranking's term")},
        reads=("scores",),
    ),
    "plackett_luce_dpo": Method(
        "DPO on rankings, by their likelihood (arXiv 2305.18290, appendix A.3)",
        "ranked",
        "ranked",
        "optional",
        _BETA,
    ),
    "all_pairs_dpo": Method(
        "DPO on rankings, as the mean over all their pairs", "ranked", "ranked", "optional", _BETA
    ),
    "reward": Method(
        "a reward model: Bradley-Terry or Plackett-Luce with margins and centering, or of labels",
        "reward",
        "ranked",
        "none",
        {
            "ranking": Knob(
                "all_pairs",
                "whose likelihood is maximised: that of all pairs of responses (Bradley-Terry), of "
                "the ranking, or of labels of single responses (binary, with the reward as their "
                "log-odds)",
                choices=("all_pairs", "plackett_luce", "binary"),
            ),
            "center_coefficient": Knob(
                0.0,
                "pull of the rewards to 0 on average; TRL advises 0.01",
                at_least=0,
                effect=_COMPARED,
            ),
        },
        reads=("margins", "labels"),
        data_where={"unpaired": _BINARY},
    ),
}

# Methods on pairs that look at each pair by itself, and so can learn from sampled ones.
PAIRWISE = tuple(
    name
    for name, method in METHODS.items()
    if method.family == "pairs" and not method.compares_examples
)

# Methods that learn from what the policy samples.
METHODS |= {
    "ppo": _policy_gradient(
        "PPO with a critic (arXiv 1707.06347), as in RLHF (arXiv 2203.02155)",
        epochs=4,
        aggregation="token",
        groups=("critic",),
        defaults={"sampling.samples": 1},
        knobs={
            "gamma": Knob(1.0, "discount of a token", above=0, at_most=1),
            "lam": Knob(
                0.95,
                "lambda of the advantages (GAE); below 1 biased where the critic errs",
                at_least=0,
                at_most=1,
            ),
            "whiten": Knob(True, "give advantages mean 0 and variance 1 over a step"),
            "value_clip": Knob(
                0.2,
                "how far a value may move from the one before the step's updates; 0: anywhere",
                at_least=0,
            ),
        },
    ),
    "reinforce": _policy_gradient(
        "REINFORCE with a moving average of rewards as its baseline (arXiv 2402.14740)",
        defaults={"sampling.samples": 1},
        knobs={
            "gamma": Knob(1.0, "discount of a token", above=0, at_most=1),
            "baseline_decay": Knob(
                0.9, "decay of the moving average; 0: the step before alone", at_least=0, below=1
            ),
        },
    ),
    "remax": _policy_gradient(
        "REINFORCE with the greedy response's reward as its baseline (arXiv 2310.10505)",
        defaults={"sampling.samples": 1},
        knobs={"gamma": Knob(1.0, "discount of a token", above=0, at_most=1)},
    ),
    "rloo": _policy_gradient(
        "REINFORCE with the other responses' mean reward as baseline (arXiv 2402.14740)",
        least_samples=2,
    ),
    "grpo": _policy_gradient(
        "rewards compared within the group, and their variants (arXiv 2402.03300)",
        aggregation="response",
        defaults={"sampling.samples": 8},
        least_samples=2,
        knobs={
            "scale": Knob(
                "group",
                "standard deviation that advantages are divided by: of the group, of the batch, or "
                "none (Dr. GRPO, arXiv 2503.20783)",
                choices=("group", "batch", "none"),
            )
        },
    ),
    "reinforce_pp": _policy_gradient(
        "REINFORCE++: returns whitened over the whole step (arXiv 2501.03262)",
        aggregation="token",
        defaults={"sampling.samples": 1},
        knobs={
            "gamma": Knob(1.0, "discount of a token", above=0, at_most=1),
            "group_baseline": Knob(
                False, "subtract the mean of a prompt's rewards first; wants several samples"
            ),
        },
    ),
    "rejection_sampling": Method(
        "fine-tuning on the best of several responses, as in Llama 2 (arXiv 2307.09288)",
        "selection",
        "prompts",
        "optional",
        {
            "pool": Knob(
                True,
                "let the best response of earlier passes over the prompts take part in the choice; "
                "they are kept in the workdir",
            )
        },
        groups=("sampling", "reward"),
        defaults={"sampling.samples": 8},
        least_samples=2,
    ),
    "online_dpo": Method(
        "DPO, or another loss on pairs, of the best and the worst response (arXiv 2402.04792)",
        "selection",
        "prompts",
        "optional",
        {
            **_BETA,
            "loss": Knob(
                "dpo",
                "a method on pairs, with its own defaults but for beta",
                choices=PAIRWISE,
            ),
        },
        groups=("sampling", "reward"),
        defaults={"sampling.samples": 2},
        least_samples=2,
    ),
}

# Methods that train on data alone.
OFFLINE = tuple(name for name, method in METHODS.items() if not method.samples)
