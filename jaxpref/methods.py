"""Every method, declared once: its data, its reference, its knobs.

What a method computes is the loss of its name in `jaxpref.losses`; `jaxpref.algorithms` joins the
two. Nothing heavy is imported here, so that a command line is checked at once.
"""

import dataclasses
from collections.abc import Mapping

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
      whole_batch: whether it compares the examples of a step with each other, so that a batch
        cannot be cut into micro-batches.
    """

    summary: str
    family: str
    data: str
    reference: str
    knobs: Mapping[str, Knob] = dataclasses.field(default_factory=dict)
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    whole_batch: bool = False
    data_where: Mapping[str, Effect] = dataclasses.field(default_factory=dict)


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
        whole_batch=True,
    ),
    "aot_unpaired": _pairs(
        "log-ratios of chosen and rejected responses compared by quantile (arXiv 2406.05882)",
        {**_RATIOS, **_SMOOTHED},
        reference="optional",
        takes=("where",),
        whole_batch=True,
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
