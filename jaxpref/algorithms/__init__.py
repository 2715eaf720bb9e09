"""One file a family of methods: config to an `Algorithm`. Here losses meet models."""

from collections.abc import Callable

from ml_collections import ConfigDict

from jaxpref.algorithms import pairs, ranked, reward, sft, unpaired
from jaxpref.algorithms.base import Algorithm, Objective, response_logps, response_scalars
from jaxpref.models import Decoder, without_adapters

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


def build(config: ConfigDict, model: Decoder, reference: Decoder | None = None) -> Algorithm:
    """The algorithm that a checked config names.

    Args:
      config: the whole config.
      model: the policy's model.
      reference: the reference's; by default the policy's, without its adapters where
        `reference.mode` says so.
    """
    builder = _BUILDERS[config.algorithm.name]
    if reference is None:
        reference = without_adapters(model) if config.reference.mode == "adapter" else model
    reference_logps = builder(config, reference).reference_logps
    return builder(config, model)._replace(reference_logps=reference_logps)
