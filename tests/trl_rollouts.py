"""What TRL's own code gives for GRPO and RLOO on rollouts drawn at random.

`python tests/trl_rollouts.py` (with the extra `torch`) writes `fixtures/trl_rollouts.json`, which
stands in for TRL where it is not installed.

Both trainers run from the sampled tokens and their rewards to the gradient: advantages, log-probs
under three models, the loss, and micro-batches. Only sampling and the reward function are stood in
for, and the models are small: a hidden state is that of the last token alone.
"""

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "trl_rollouts.json"
PROMPTS, SAMPLES, LONGEST, VOCABULARY, WIDTH = 3, 4, 5, 11, 3
PAD, EOS = 0, 1
TEMPERATURE = 0.7
# Groups of 4 in micro-batches of 6: one group is cut in two.
MICRO_BATCHES = 2


def inputs() -> dict[str, np.ndarray]:
    """Hidden states by token of three models, their head, prompts, responses and their rewards."""
    # With this seed the ratios lie on both sides of every bound.
    rng = np.random.default_rng(6)
    rows = PROMPTS * SAMPLES
    sampler = rng.normal(size=(VOCABULARY, WIDTH))
    lengths = rng.integers(1, LONGEST + 1, rows)
    here = np.arange(LONGEST) < lengths[:, None]
    responses = np.where(here, rng.integers(2, VOCABULARY, (rows, LONGEST)), PAD)
    # Every third response was cut.
    cut = np.arange(rows) % 3 == 0
    responses[~cut, lengths[~cut] - 1] = EOS
    rewards = rng.normal(size=rows)
    # A group without variance.
    rewards[-SAMPLES:] = 0.5
    return {
        "old": sampler.astype(np.float32),
        "policy": (sampler + 0.3 * rng.normal(size=sampler.shape)).astype(np.float32),
        "reference": (sampler + 0.5 * rng.normal(size=sampler.shape)).astype(np.float32),
        "head": rng.normal(size=sampler.shape).astype(np.float32),
        "prompts": np.repeat(rng.integers(2, VOCABULARY, PROMPTS), SAMPLES).astype(np.int32),
        "responses": responses.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "cut": cut,
        "rewards": rewards.astype(np.float32),
    }


# TRL's options of each case; those of GRPO that are not given are in `_DEFAULTS`.
GRPO = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
    "kl": {"beta": 0.3},
    "dapo_truncated": {"loss_type": "dapo", "mask_truncated_completions": True},
    "grpo_truncated": {"mask_truncated_completions": True},
}
RLOO = {
    "rloo": {},
    "rloo_kl": {"beta": 0.3},
    "rloo_truncated": {"mask_truncated_completions": True},
}
_DEFAULTS = {
    "loss_type": "grpo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": None,
    "beta": 0.0,
    "mask_truncated_completions": False,
}


def values() -> dict[str, dict]:
    """Of each case the advantages, the loss, and its gradient by the policy's hidden states."""
    from trl import GRPOTrainer, RLOOTrainer

    found = {name: _step(GRPOTrainer, options) for name, options in GRPO.items()}
    return found | {name: _step(RLOOTrainer, options) for name, options in RLOO.items()}


def _step(kind, options) -> dict:
    """One step of a trainer: the rollouts are scored, then the losses of micro-batches add up."""
    import torch

    x = inputs()
    policy = _model(x["policy"], x["head"])
    trainer = _trainer(kind, x, {**_DEFAULTS, **options})
    rows = [{"prompt": str(i)} for i in range(PROMPTS * SAMPLES)]
    # Of a step's two micro-batches and two epochs: the sampler's own log-probs are computed.
    scored = kind._generate_and_score_completions(trainer, rows)
    trainer.model = policy
    total = 0.0
    for part in np.split(np.arange(len(rows)), MICRO_BATCHES):
        micro = {k: v if v.dim() == 0 else v[part] for k, v in scored.items()}
        total = total + kind._compute_loss(trainer, policy, micro)
    if kind.__name__ == "RLOOTrainer":
        # transformers' Trainer does it for RLOO; GRPO's loss does it itself.
        total = total / MICRO_BATCHES
    (gradient,) = torch.autograd.grad(total, policy.table)
    return {
        "advantages": scored["advantages"].tolist(),
        "loss": total.item(),
        "gradient": gradient.tolist(),
    }


def _model(table, head):
    """A model whose hidden state depends on the last token alone, under TRL's fused LM head."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    class Bigram(torch.nn.Module):
        is_gradient_checkpointing = False
        config = SimpleNamespace(get_text_config=SimpleNamespace)

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor(table))
            self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = torch.nn.Parameter(torch.tensor(head), requires_grad=False)

        def forward(self):
            raise NotImplementedError

        def base_model(self, input_ids, **_):
            return SimpleNamespace(last_hidden_state=self.table[input_ids])

        def get_output_embeddings(self):
            return self.head

    model = Bigram()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model


def _trainer(kind, x, options):
    """What a trainer's methods read of it, before the first of two epochs over the rollouts."""
    import torch

    rewards = torch.tensor(x["rewards"])[:, None]
    lists = [row[:n].tolist() for row, n in zip(x["responses"], x["lengths"], strict=True)]
    prompts, texts = x["prompts"][:, None].tolist(), [""] * len(lists)
    grpo = kind.__name__ == "GRPOTrainer"
    generated = (
        (prompts, lists, None, texts, None, {}, None, None) if grpo else (prompts, lists, texts)
    )
    clip_high = options["epsilon_high"]
    trainer = SimpleNamespace(
        model=_model(x["old"], x["head"]),
        ref_model=_model(x["reference"], x["head"]),
        accelerator=SimpleNamespace(
            device="cpu",
            process_index=0,
            num_processes=1,
            is_main_process=True,
            autocast=contextlib.nullcontext,
            gather=lambda values: values,
            reduce=lambda values, reduction: values,
        ),
        args=SimpleNamespace(
            per_device_train_batch_size=len(lists),
            steps_per_generation=MICRO_BATCHES,
            gradient_accumulation_steps=MICRO_BATCHES,
            gradient_checkpointing_kwargs=None,
            report_to=[],
            delta=None,
            use_bias_correction_kl=False,
        ),
        state=SimpleNamespace(global_step=0),
        current_gradient_accumulation_steps=MICRO_BATCHES,
        num_iterations=2,
        num_generations=SAMPLES,
        max_completion_length=LONGEST,
        pad_to_multiple_of=None,
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: rewards,
        reward_func_names=["reward"],
        reward_weights=torch.ones(1),
        reward_clip_range=None,
        multi_objective_aggregation="sum_then_normalize",
        normalize_advantages=False,
        environment_factories=None,
        environments=None,
        tools=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        epsilon_low=options["epsilon"],
        epsilon_high=options["epsilon"] if clip_high is None else clip_high,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
        **{k: v for k, v in options.items() if not k.startswith("epsilon")},
    )
    logps = kind._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = MethodType(logps, trainer)
    return trainer


if __name__ == "__main__":
    with contextlib.chdir(Path(__file__).parent):
        FIXTURE.write_text(json.dumps(values(), indent=1) + "\n")
