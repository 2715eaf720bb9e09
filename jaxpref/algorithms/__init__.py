"""One file a method: config to (kind, prepare, loss). Here losses meet models."""

from collections.abc import Callable

from ml_collections import ConfigDict

from jaxpref.algorithms import dpo, sft
from jaxpref.algorithms.base import Algorithm, Objective, response_logps, response_scalars
from jaxpref.models import Decoder

__all__ = ["Algorithm", "Objective", "build", "response_logps", "response_scalars"]

_BUILDERS: dict[str, Callable[[ConfigDict, Decoder], Algorithm]] = {
    "dpo": dpo.build,
    "sft": sft.build,
}


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """The algorithm that a checked config names.

    Args:
      config: the whole config.
      model: the policy's model.
    """
    return _BUILDERS[config.algorithm.name](config, model)
