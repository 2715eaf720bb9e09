"""jaxpref: align language models with human preferences, in JAX.

The rooms load on first use, so that a command line that only needs the config
answers before JAX is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpref import (
        advantages,
        algorithms,
        checkpoint,
        config,
        data,
        errors,
        evaluation,
        experience,
        knobs,
        logprobs,
        losses,
        measurements,
        methods,
        metrics,
        models,
        optimizer,
        packing,
        reference,
        sharding,
        tokenizer,
        train,
    )

__version__ = "0.1.0"

__all__ = [
    "advantages",
    "algorithms",
    "checkpoint",
    "config",
    "data",
    "errors",
    "evaluation",
    "experience",
    "knobs",
    "logprobs",
    "losses",
    "measurements",
    "methods",
    "metrics",
    "models",
    "optimizer",
    "packing",
    "reference",
    "sharding",
    "tokenizer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"jaxpref.{name}")
    raise AttributeError(f"module 'jaxpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
