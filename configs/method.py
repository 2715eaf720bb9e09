"""Any method on data of your own, from a Hugging Face model: `method.py:METHOD`.

    python -m jaxpref.main --config=configs/method.py:kto --workdir=W \
        --config.model.init_from=MODEL --config.data.path=FILE

MODEL is a directory or a hub name, or the workdir of an earlier run; FILE is a file, a
directory or a hub name, whose columns tell how it is read (docs/data.md has the table). The
methods are those of `algorithm.name`. `METHOD,lora` trains low-rank adapters alone, with the
base as the reference, so that neither a second copy nor its optimizer state is kept.

The settings are those that a method's paper gives for models of 1 to 10 billion parameters, or
else DPO's in TRL; with adapters the learning rate is ten times that, as is usual. A smaller
model wants a higher one. On a GPU or TPU set `--config.model.dtype=bfloat16`.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import OFFLINE

# What a method sets otherwise than DPO.
PAPERS: dict[str, dict[str, Any]] = {
    # As TRL has it.
    "sft": {"learning_rate": 2e-5},
    # With more the loss, which has no lower bound, soon is all that it lowers.
    "unlikelihood": {"alpha": 0.05},
    # Liu et al. 2023 (2309.06657).
    "hinge": {"beta": 0.05},
    # Chen et al. 2024 (2402.05369).
    "nca": {"learning_rate": 5e-6, "beta": 0.01},
    # Wu et al. 2024 (2405.00675): eta is 1000.
    "sppo_hard": {"learning_rate": 5e-7, "beta": 1e-3},
    # D'Oosterlinck et al. 2024 (2408.06266).
    "apo_zero": {"learning_rate": 2e-7},
    "apo_down": {"learning_rate": 2e-7},
    # Lu et al. 2024 (2406.08414).
    "discopop": {"learning_rate": 5e-7, "beta": 0.05},
    # Ethayarajh et al. 2024 (2402.01306), and for BCO the same.
    "kto": {"learning_rate": 5e-7},
    "bco": {"learning_rate": 5e-7},
    "bco_unpaired": {"learning_rate": 5e-7},
    # Meng et al. 2024 (2405.14734): from 3e-7 to 1e-6.
    "simpo": {"learning_rate": 5e-7},
    # Hong et al. 2024 (2403.07691).
    "orpo": {"learning_rate": 8e-6},
    # Yuan et al. 2023 (2304.05302).
    "rrhf": {"learning_rate": 2e-5},
    # Ouyang et al. 2022 (2203.02155), of the model with 6B parameters.
    "reward": {"learning_rate": 9e-6},
}


def get_config(argument: str = "dpo") -> ConfigDict:
    """The recipe of a method, `METHOD` or `METHOD,lora`."""
    method, _, kind = argument.partition(",")
    if method not in OFFLINE:
        raise ValueError(one_of("the recipe's argument", method, OFFLINE))
    if kind not in ("", "lora"):
        raise ValueError(one_of("what follows the method", kind, ("lora",)))
    config = base.default(method)
    knobs = {"learning_rate": 1e-6, **PAPERS.get(method, {})}
    config.optimizer.learning_rate = knobs.pop("learning_rate")
    config.algorithm.update(knobs)
    config.optimizer.schedule = "linear"
    config.data.batch_size = 16
    config.data.max_length = 1024
    config.data.max_prompt_length = 512
    config.data.on_long_prompt = "truncate"
    config.train.eval_every = 200
    config.train.save_every = 200
    if kind == "lora":
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.optimizer.learning_rate *= 10
        if config.reference.mode == "live":
            config.reference.mode = "adapter"
    return config
