"""One file a family of methods: config to an `Algorithm`. Here losses meet models."""

from collections.abc import Callable

from ml_collections import ConfigDict

from jaxpref.algorithms import pairs, ranked, reward, sft, unpaired
from jaxpref.algorithms.base import Algorithm, Objective, response_logps, response_scalars
from jaxpref.models import Decoder

__all__ = ["Algorithm", "Objective", "build", "response_logps", "response_scalars"]

_Builder = Callable[[ConfigDict, Decoder], Algorithm]

_WITH_REFERENCE = (
    *("dpo", "robust_dpo", "ipo", "hinge", "exo", "nca", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "bco", "mpo"),
)
_WITHOUT_REFERENCE = ("simpo", "orpo", "cpo", "slic_hf", "unlikelihood")

_BUILDERS: dict[str, _Builder] = {
    "sft": sft.build,
    **dict.fromkeys(_WITH_REFERENCE, pairs.with_reference),
    **dict.fromkeys(_WITHOUT_REFERENCE, pairs.without_reference),
    "kto": unpaired.kto,
    "bco_unpaired": unpaired.bco,
    "rrhf": ranked.rrhf,
    "plackett_luce_dpo": ranked.dpo,
    "all_pairs_dpo": ranked.dpo,
    "reward": reward.build,
}


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """The algorithm that a checked config names.

    Args:
      config: the whole config.
      model: the policy's model.
    """
    return _BUILDERS[config.algorithm.name](config, model)
