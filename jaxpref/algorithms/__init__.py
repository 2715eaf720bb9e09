"""One file a family of methods: config to an `Algorithm`. Here losses meet models."""

from collections.abc import Callable

from ml_collections import ConfigDict

from jaxpref.algorithms import pairs, ranked, reward, sft, unpaired
from jaxpref.algorithms.base import Algorithm, Objective, response_logps, response_scalars
from jaxpref.methods import METHODS
from jaxpref.models import Decoder, without_adapters

__all__ = ["Algorithm", "Objective", "build", "response_logps", "response_scalars"]

_Builder = Callable[[ConfigDict, Decoder], Algorithm]

_FAMILIES: dict[str, _Builder] = {
    "sft": sft.build,
    "pairs": pairs.build,
    "unpaired": unpaired.build,
    "ranked": ranked.build,
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
    builder = _FAMILIES[METHODS[config.algorithm.name].family]
    if reference is None:
        reference = without_adapters(model) if config.reference.mode == "adapter" else model
    reference_logps = builder(config, reference).reference_logps
    return builder(config, model)._replace(reference_logps=reference_logps)
