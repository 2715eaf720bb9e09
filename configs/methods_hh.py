"""Any method on Anthropic's HH dialogues: `methods_hh.py:METHOD`.

    python -m jaxpref.main --config=configs/methods_hh.py:ipo --workdir=B \
        --config.data.path=hh-harmless.jsonl.gz

goes on from the SFT run in workdir A (`configs/sft_hh.py:tiny`), so that methods are
compared from the same policy on the same batches in the same order: only METHOD changes.
`METHOD,paper` is Pythia-2.8B on the hub's data, as in `configs/dpo_hh.py`. The methods are
those of `algorithm.name`; what each of them sets otherwise than DPO is in `configs/method.py`.
HH's pairs are split into single responses for the unpaired methods.

On the 1,734 pairs of harmless-base's test split `:reward` took 2.6 minutes on two CPU cores
(2026-11-21) and reached an accuracy of 0.64 on 86 held-out pairs, but no lower loss: a
byte-level model of 1M parameters learns little from so few. The others have not been run
here; `benchmarks/methods.py` compares all of them where the true reward is known.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import OFFLINE


def get_config(argument: str = "dpo") -> ConfigDict:
    """The recipe of a method, `METHOD` or `METHOD,paper`."""
    method, _, size = argument.partition(",")
    if method not in OFFLINE:
        raise ValueError(one_of("the recipe's argument", method, OFFLINE))
    if size not in ("", "paper"):
        raise ValueError(one_of("the size after the method", size, ("paper",)))
    here = Path(__file__).parent
    dpo = runpy.run_path(str(here / "dpo_hh.py"))["get_config"]
    config = base.default(method)
    own = ("algorithm.", "reference.", "sampling.", "reward.")
    shared = {k: v for k, v in base.flatten(dpo(size or "tiny")) if not k.startswith(own)}
    config.update_from_flattened_dict(shared)
    knobs = dict(runpy.run_path(str(here / "method.py"))["PAPERS"].get(method, {}))
    learning_rate = knobs.pop("learning_rate", config.optimizer.learning_rate)
    if size:
        config.optimizer.learning_rate = learning_rate
    config.algorithm.update(knobs)
    return config
