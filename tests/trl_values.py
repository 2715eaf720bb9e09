"""What TRL's own code gives for the losses that it has, on log-probs drawn at random.

`python tests/trl_values.py` (with the extra `torch`) writes `fixtures/trl_losses.json`, which
stands in for TRL where it is not installed.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "trl_losses.json"
PAIRS, TOKENS = 6, 5


def inputs() -> dict[str, np.ndarray]:
    """Per-token log-probs `[pairs, tokens]` of both sides, their lengths, and rewards."""
    rng = np.random.default_rng(0)
    drawn = {}
    for side in ("chosen", "rejected"):
        lengths = rng.integers(1, TOKENS + 1, PAIRS)
        mask = np.arange(TOKENS) < lengths[:, None]
        drawn[f"{side}_lengths"] = lengths
        for name in (f"policy_{side}", f"reference_{side}"):
            drawn[name] = np.where(mask, -3 * rng.random((PAIRS, TOKENS)), 0).astype(np.float32)
        drawn[f"{side}_collision"] = np.where(mask, -rng.random((PAIRS, TOKENS)), 0)
        drawn[f"{side}_rewards"] = rng.normal(size=PAIRS)
    drawn["labels"] = np.array([1, 0, 1, 1, 0, 0])
    drawn["margin"] = rng.random(PAIRS)
    return {
        k: v.astype(np.float32) if v.dtype == np.float64 else v.astype(v.dtype)
        for k, v in drawn.items()
    }


# TRL's options for each of its DPO losses.
DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.01},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sigmoid_norm": {},
    "forward_kl": {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "alpha_divergence": {
        "loss_types": ["sigmoid"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
    },
    "length_desensitized": {"loss_types": ["sigmoid"], "ld_alpha": 0.3},
    "wpo": {"loss_types": ["sigmoid"], "use_weighting": True},
}
BETA = 0.3


def values() -> dict[str, list[float]]:
    """The mean loss over all pairs, then that of each pair alone, from TRL."""
    x = inputs()
    found = {}
    for name, options in DPO.items():
        parts = [slice(None), *(slice(i, i + 1) for i in range(PAIRS))]
        found[name] = [_dpo({k: v[part] for k, v in x.items()}, name, options) for part in parts]
    found["kto"] = [_kto(x)]
    found["reward"] = [_reward(x)]
    found.update(_reference_free(x))
    return found


class _Metrics(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


def _trainer(**options):
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": _Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def _outputs(logps, collision=None):
    """A model's outputs, as TRL's patched forward pass gives them."""
    import torch

    zeros = torch.zeros_like(logps)
    return SimpleNamespace(
        log_probs=logps,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=zeros if collision is None else collision,
    )


def _dpo(x, name, options) -> float:
    import torch
    from trl import DPOTrainer

    def both(kind):
        return torch.tensor(np.concatenate([x[kind.format("chosen")], x[kind.format("rejected")]]))

    mask = torch.arange(TOKENS) < both("{}_lengths")[:, None]
    # One token of a prompt goes first.
    mask = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    settings = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": None,
        "use_weighting": False,
        "label_smoothing": 0.0,
        "loss_types": [name],
        **options,
    }
    reference = {"ref_chosen_logps": "reference_chosen", "ref_rejected_logps": "reference_rejected"}
    if settings["ld_alpha"] is None:
        reference = {k: torch.tensor(x[v].sum(1)) for k, v in reference.items()}
    else:
        shared = np.minimum(x["chosen_lengths"], x["rejected_lengths"])[:, None]
        weight = np.where(np.arange(TOKENS) < shared, 1.0, settings["ld_alpha"])
        reference = {
            k: torch.tensor((x[v] * weight).sum(1).astype(np.float32)) for k, v in reference.items()
        }
    trainer = _trainer(
        beta=BETA, loss_weights=[1.0], args=SimpleNamespace(discopop_tau=0.05), **settings
    )
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        **reference,
    }
    outputs = _outputs(both("policy_{}"), both("{}_collision"))
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    return float(loss)


def _kto(x) -> float:
    """The rejected responses stand for the mismatched ones."""
    import torch
    from trl import KTOTrainer

    logps = torch.tensor(x["policy_chosen"])
    mask = torch.arange(TOKENS) < torch.tensor(x["chosen_lengths"])[:, None]
    mask = torch.cat([torch.zeros(PAIRS, 1), mask], 1).long()
    trainer = _trainer(
        beta=BETA,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: torch.tensor(x["policy_rejected"].sum(1)),
    )
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(x["labels"]),
        "ref_logps": torch.tensor(x["reference_chosen"].sum(1)),
        "ref_KL_logps": torch.tensor(x["reference_rejected"].sum(1)),
    }
    return float(KTOTrainer._compute_loss(trainer, lambda **_: _outputs(logps), batch, False))


def _reward(x) -> float:
    import torch
    from trl import RewardTrainer

    rewards = torch.tensor(np.concatenate([x["chosen_rewards"], x["rejected_rewards"]]))
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=0.01))
    batch = {
        "input_ids": torch.zeros(2 * PAIRS, 1),
        "attention_mask": torch.ones(2 * PAIRS, 1),
        "margin": torch.tensor(x["margin"]),
    }
    outputs = SimpleNamespace(logits=rewards[:, None])
    return float(RewardTrainer.compute_loss(trainer, lambda **_: outputs, batch))


def _reference_free(x) -> dict[str, list[float]]:
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    sums = [torch.tensor(x[f"policy_{side}"].sum(1)) for side in ("chosen", "rejected")]
    means = [
        torch.tensor(x[f"policy_{side}"].sum(1) / x[f"{side}_lengths"])
        for side in ("chosen", "rejected")
    ]

    def cpo(loss_type, logps):
        trainer = _trainer(
            alpha=0.0, beta=BETA, simpo_gamma=0.5, label_smoothing=0.1, loss_type=loss_type
        )
        return CPOTrainer.cpo_loss(trainer, *logps)[0].tolist()

    # Theirs is to be maximised.
    odds = ORPOTrainer.odds_ratio_loss(_trainer(beta=BETA), *means)[0]
    return {
        "cpo": cpo("sigmoid", sums),
        "simpo": cpo("simpo", means),
        "orpo": (-odds).tolist(),
    }


if __name__ == "__main__":
    with contextlib.chdir(Path(__file__).parent):
        FIXTURE.write_text(json.dumps(values(), indent=1) + "\n")
