"""Any method that samples, on Anthropic's HH dialogues: `rlhf_hh.py:METHOD`.

    python -m jaxpref.main --config=configs/rlhf_hh.py:reinforce --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

goes on from the SFT run in workdir A (`configs/sft_hh.py:tiny`) with the reward model in workdir
R, which begins from A too:

    python -m jaxpref.main --config=configs/methods_hh.py:reward --workdir=R \
        --config.data.path=hh-harmless.jsonl.gz

Every method samples 32 responses in a step and has the same learning rate, so that only METHOD
changes. `METHOD,paper` is what the papers' settings share: Pythia-2.8B on the hub's data. The rest
of a paper's settings is in the recipe of its method: `ppo_hh.py`, `remax_hh.py`, `rloo_hh.py`,
`grpo_hh.py`, `rejection_sampling_hh.py` and `online_dpo_hh.py`, which without `:tiny` are these
experiments, and with it are this file's.

What `:tiny` shows is that a policy finds what its reward model likes, not that dialogues improve.
The reward model, of 1M parameters and on bytes, is right about 0.64 of held-out pairs, and it likes
short responses: by PPO, ReMax, RLOO, GRPO, rejection sampling and online DPO they went from 70
bytes to between 1 and 4 in at most 20 steps, at a KL below 4 nats (2026-11-22).
"""

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import METHODS

ONLINE = tuple(name for name, method in METHODS.items() if method.samples)
RESPONSES = 32


def get_config(argument: str = "rloo") -> ConfigDict:
    """The recipe of a method, `METHOD`, `METHOD,tiny` (the same) or `METHOD,paper`."""
    method, _, size = argument.partition(",")
    if method not in ONLINE:
        raise ValueError(one_of("the recipe's argument", method, ONLINE))
    if size not in ("", "tiny", "paper"):
        raise ValueError(one_of("the recipe's argument", size, ("paper", "tiny")))
    config = base.default(method)
    config.data.format = "hh"
    config.data.on_divergent = "skip"
    config.data.on_empty = "skip"
    config.data.on_long_prompt = "truncate"
    # Prompts are offensive in places, so none is shown unless it is asked for.
    config.sampling.shown = 0
    # Workdirs of configs/sft_hh.py and of configs/methods_hh.py:reward.
    config.model.init_from = "A"
    config.reward.path = "R"
    if size == "paper":
        config.model.dtype = "bfloat16"
        config.reference.dtype = "bfloat16"
        config.reward.dtype = "bfloat16"
        config.data.path = "Anthropic/hh-rlhf"
        config.data.eval_split = "test"
        config.data.max_prompt_length = 512
        config.data.max_length = 768
        config.sampling.max_new_tokens = 256
        config.eval.max_examples = 256
        config.train.eval_every = 50
        config.train.save_every = 50
        return config
    config.model.width = 128
    config.model.layers = 4
    config.data.max_prompt_length = 256
    config.data.max_length = 384
    config.data.row_length = 768
    config.data.batch_size = RESPONSES // config.sampling.samples
    config.sampling.max_new_tokens = 128
    config.data.rows = 4
    config.eval.max_examples = 64
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5
    if method == "ppo":
        config.critic.init_from = "R"
        config.critic.learning_rate = 2e-4
    config.train.steps = 20
    config.train.log_every = 5
    return config
