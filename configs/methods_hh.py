"""Any method on Anthropic's HH dialogues: `methods_hh.py:METHOD`.

    python -m jaxpref.main --config=configs/methods_hh.py:ipo --workdir=B \
        --config.data.path=hh-harmless.jsonl.gz

goes on from the SFT run in workdir A (`configs/sft_hh.py:tiny`), so that methods are
compared from the same policy on the same batches in the same order: only METHOD changes.
`METHOD,paper` is Pythia-2.8B on the hub's data, as in `configs/dpo_hh.py`. The methods are
those of `algorithm.name`; what each of them sets otherwise than DPO is in the table below.
HH's pairs are split into single responses for the unpaired methods.

On the 1,734 pairs of harmless-base's test split `:reward` took 2.6 minutes on two CPU cores
(2026-11-21) and reached an accuracy of 0.64 on 86 held-out pairs, but no lower loss: a
byte-level model of 1M parameters learns little from so few. The others have not been run
here; `benchmarks/methods.py` compares all of them where the true reward is known.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpref import config as base

# What a method sets otherwise than `configs/dpo_hh.py`; a learning rate counts at the paper's
# size only. The other methods have DPO's settings.
METHODS: dict[str, dict[str, Any]] = {
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
    """The recipe of a method, `METHOD` or `METHOD,paper`."""
    method, _, size = argument.partition(",")
    if method not in base.ALGORITHMS:
        raise ValueError(base.one_of("the recipe's argument", method, base.ALGORITHMS))
    if size not in ("", "paper"):
        raise ValueError(base.one_of("the size after the method", size, ("paper",)))
    dpo = runpy.run_path(str(Path(__file__).parent / "dpo_hh.py"))["get_config"]
    config = base.default(method)
    own = ("algorithm.", "reference.")
    shared = {k: v for k, v in base.flatten(dpo(size or "tiny")) if not k.startswith(own)}
    config.update_from_flattened_dict(shared)
    knobs = dict(METHODS.get(method, {}))
    learning_rate = knobs.pop("learning_rate", config.optimizer.learning_rate)
    if size:
        config.optimizer.learning_rate = learning_rate
    config.algorithm.update(knobs)
    return config
