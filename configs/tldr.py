"""Any method on summaries of Reddit posts (TL;DR): `tldr.py:METHOD`.

Paper: Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290), section 6.2 and
appendix B: GPT-J, batches of 64, RMSprop at 1e-6 after a linear warm-up of 150 steps, and for
summaries a beta of 0.5. PPO has the settings of Huang et al. 2024 (arXiv 2403.17031) for the same
task, which `configs/ppo_hh.py` lists, here with GPT-J. The posts are those of Stiennon et al. 2020
(arXiv 2009.01325), in TRL's copy on the hub:

    python -m jaxpref.main --config=configs/tldr.py:sft --workdir=A
    python -m jaxpref.main --config=configs/tldr.py:dpo --workdir=B
    python -m jaxpref.main --config=configs/tldr.py:reward --workdir=R
    python -m jaxpref.main --config=configs/tldr.py:ppo --workdir=P

The papers' setting has not been run here: it needs accelerators. `METHOD,tiny` is a byte-level
decoder of 1M parameters, for a laptop and with data of your own (`--config.data.path=FILE`); it
shows that all of it runs, not what a summary is. `configs/experiments/tldr.py` does all runs of
either size, and has a judge compare what they say.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.knobs import one_of
from jaxpref.methods import METHODS


def get_config(argument: str = "dpo") -> ConfigDict:
    """The recipe of a method, `METHOD`, `METHOD,paper` (the same) or `METHOD,tiny`."""
    method, _, size = argument.partition(",")
    if method not in METHODS:
        raise ValueError(one_of("the recipe's argument", method, METHODS))
    if size not in ("", "paper", "tiny"):
        raise ValueError(one_of("the size after the method", size, ("paper", "tiny")))
    config = _hh(method, size or "paper")
    config.data.format = "auto"
    if size == "tiny":
        return config
    config.model.init_from = "EleutherAI/gpt-j-6b" if method == "sft" else "A"
    config.data.path = f"trl-lib/{'tldr' if method == 'sft' else 'tldr-preference'}"
    config.data.eval_split = "validation"
    config.data.max_prompt_length = 512
    config.data.max_length = 640
    if method == "dpo":
        config.algorithm.beta = 0.5
    if METHODS[method].samples:
        config.sampling.max_new_tokens = 53
    return config


def _hh(method: str, size: str) -> ConfigDict:
    """The same method on dialogues: the papers have the same settings for both."""
    if method in ("sft", "ppo"):
        recipe, argument = f"{method}_hh", size
    elif METHODS[method].samples:
        recipe, argument = "rlhf_hh", f"{method},{size}"
    else:
        recipe, argument = "methods_hh", method if size == "tiny" else f"{method},{size}"
    path = Path(__file__).with_name(f"{recipe}.py")
    return runpy.run_path(str(path))["get_config"](argument)
