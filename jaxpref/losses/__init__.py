"""Losses as pure functions: one value per example, no reduction, no import from other rooms."""

from jaxpref.losses import divergences, weighting
from jaxpref.losses.language_modeling import nll
from jaxpref.losses.mixture import mpo
from jaxpref.losses.pairs import PreferenceOutput, smoothed_logistic
from jaxpref.losses.policy_gradient import (
    Aggregated,
    PolicyOutput,
    ValueOutput,
    aggregate,
    cispo,
    clipped_value,
    gspo,
    ppo,
    reinforce,
)
from jaxpref.losses.preference import (
    apo_down,
    apo_zero,
    bco,
    discopop,
    dpo,
    exo,
    hinge,
    ipo,
    nca,
    robust_dpo,
    sppo_hard,
)
from jaxpref.losses.quantiles import aot, aot_unpaired
from jaxpref.losses.ranked import RankedOutput, all_pairs, plackett_luce_dpo, rrhf
from jaxpref.losses.reference_free import cpo, orpo, simpo, slic_hf, unlikelihood
from jaxpref.losses.reward import (
    binary_reward,
    bradley_terry,
    ensemble_mean,
    ensemble_uncertainty,
    plackett_luce,
)
from jaxpref.losses.unpaired import (
    UnpairedOutput,
    bco_unpaired,
    kto,
    kto_kl,
)

__all__ = [
    "Aggregated",
    "PolicyOutput",
    "PreferenceOutput",
    "RankedOutput",
    "UnpairedOutput",
    "ValueOutput",
    "aggregate",
    "all_pairs",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "bco_unpaired",
    "binary_reward",
    "bradley_terry",
    "cispo",
    "clipped_value",
    "cpo",
    "discopop",
    "divergences",
    "dpo",
    "ensemble_mean",
    "ensemble_uncertainty",
    "exo",
    "gspo",
    "hinge",
    "ipo",
    "kto",
    "kto_kl",
    "mpo",
    "nca",
    "nll",
    "orpo",
    "plackett_luce",
    "plackett_luce_dpo",
    "ppo",
    "reinforce",
    "robust_dpo",
    "rrhf",
    "simpo",
    "slic_hf",
    "smoothed_logistic",
    "sppo_hard",
    "unlikelihood",
    "weighting",
]
