"""Losses that TRL has too, against what its own code gives (`trl_values.py`); and a whole run."""

import functools
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import trl_values

from jaxpref import losses
from jaxpref.methods import METHODS

BETA = trl_values.BETA


@functools.cache
def drawn():
    return {name: jnp.asarray(value) for name, value in trl_values.inputs().items()}


def sums(x, weights=None):
    names = [f"{model}_{side}" for model in ("policy", "reference") for side in SIDES]
    return [(x[name] if weights is None else x[name] * weights).sum(1) for name in names]


SIDES = ("chosen", "rejected")


def pairwise(loss, **options):
    return lambda x: loss(*sums(x), beta=BETA, **options).losses


def per_token(loss):
    def call(x):
        lengths = {f"{side}_lengths": x[f"{side}_lengths"] for side in SIDES}
        return loss(*sums(x), beta=BETA, **lengths).losses

    return call


def length_desensitized(x):
    shared = jnp.minimum(x["chosen_lengths"], x["rejected_lengths"])[:, None]
    index = jnp.arange(trl_values.TOKENS)[None]
    weights = losses.weighting.length_desensitized(*jnp.broadcast_arrays(index, shared), alpha=0.3)
    return losses.dpo(*sums(x, weights), beta=BETA).losses


def wpo(x):
    means = [
        (x[f"policy_{side}"] - x[f"{side}_collision"]).sum(1) / x[f"{side}_lengths"]
        for side in SIDES
    ]
    return losses.weighting.wpo(*means) * losses.dpo(*sums(x), beta=BETA).losses


def kto(x):
    chosen, rejected, reference_chosen, reference_rejected = sums(x)
    kl = losses.kto_kl(rejected, reference_rejected)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    return losses.kto(chosen, reference_chosen, x["labels"] == 1, kl, beta=BETA, **weights).losses


def simpo(x):
    lengths = [x[f"{side}_lengths"] for side in SIDES]
    return losses.simpo(*sums(x)[:2], *lengths, beta=BETA, margin=0.5, label_smoothing=0.1).losses


def orpo(x):
    """TRL's function gives the odds ratio's part alone."""
    chosen, rejected = sums(x)[:2]
    lengths = [x[f"{side}_lengths"] for side in SIDES]
    return losses.orpo(chosen, rejected, *lengths, beta=BETA).losses + chosen / lengths[0]


def divergence(function):
    return pairwise(losses.dpo, divergence=function)


OURS = {
    "sigmoid": pairwise(losses.dpo),
    "hinge": pairwise(losses.hinge),
    "ipo": per_token(losses.ipo),
    "exo_pair": pairwise(losses.exo, label_smoothing=0.01),
    "nca_pair": pairwise(losses.nca),
    "robust": pairwise(losses.robust_dpo, label_smoothing=0.2),
    "bco_pair": pairwise(losses.bco, shift=0.0),
    "sppo_hard": pairwise(losses.sppo_hard),
    "aot": pairwise(losses.aot, label_smoothing=0.1),
    "aot_unpaired": pairwise(losses.aot_unpaired, label_smoothing=0.1),
    "apo_zero": pairwise(losses.apo_zero),
    "apo_down": pairwise(losses.apo_down),
    "discopop": pairwise(losses.discopop),
    "sigmoid_norm": per_token(losses.dpo),
    "forward_kl": divergence(losses.divergences.forward_kl),
    "js_divergence": divergence(losses.divergences.jensen_shannon),
    "alpha_divergence": divergence(lambda x: losses.divergences.alpha_divergence(x, 0.3)),
    "length_desensitized": length_desensitized,
    "wpo": wpo,
    "kto": kto,
    "reward": lambda x: losses.bradley_terry(
        x["chosen_rewards"], x["rejected_rewards"], margin=x["margin"], center_coefficient=0.01
    ),
    "cpo": lambda x: (
        losses.cpo(*sums(x)[:2], beta=BETA, nll_weight=0.0, label_smoothing=0.1).losses
    ),
    "simpo": simpo,
    "orpo": orpo,
}


def compare(theirs):
    assert theirs.keys() == OURS.keys()
    for name, loss in OURS.items():
        x, expected = drawn(), theirs[name]
        if len(expected) == 1:
            ours = [float(loss(x).mean())]
        elif len(expected) == trl_values.PAIRS:
            ours = loss(x).tolist()
        else:
            # The whole batch, then each pair as a batch of its own.
            alone = [
                float(loss({k: v[i : i + 1] for k, v in x.items()})[0])
                for i in range(trl_values.PAIRS)
            ]
            ours = [float(loss(x).mean()), *alone]
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_losses_are_trls():
    compare(json.loads(trl_values.FIXTURE.read_text()))


@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_losses_are_trls_live():
    compare(trl_values.values())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_trls_defaults_are_those_that_the_docs_tell_of():
    """The table of methods whose defaults differ; the forms of the losses are compared above."""
    trl = pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    def defaults(config, *names):
        return [config.__dataclass_fields__[name].default for name in names]

    dpo = ("beta", "label_smoothing", "discopop_tau", "ref_model_mixup_alpha")
    assert defaults(trl.DPOConfig, *dpo, "ref_model_sync_steps") == [0.1, 0.0, 0.05, 0.6, 512]
    assert defaults(CPOConfig, "beta", "simpo_gamma", "cpo_alpha", "loss_type") == [
        *(0.1, 0.5, 1.0, "sigmoid")
    ]
    assert defaults(ORPOConfig, "beta") == [0.1]
    weights = ("beta", "desirable_weight", "undesirable_weight")
    assert defaults(trl.KTOConfig, *weights) == [0.1, 1.0, 1.0]
    knobs = {name: method.knobs for name, method in METHODS.items()}
    for name, value in {
        "simpo": 2.0,
        "discopop": 0.05,
        "orpo": 0.1,
        "cpo": 0.1,
        "kto": 0.1,
    }.items():
        assert knobs[name]["beta"].default == value
    assert knobs["simpo"]["margin"].default == 1.0
    assert knobs["robust_dpo"]["label_smoothing"].default == 0.1


# The benchmark that compares whole runs, made smaller; decay and rate are larger than anyone's,
# so that whether a bias decays shows in the losses.
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "trl_parity.py"
SMALLER = {
    "MAX_LENGTH": 64,
    "VOCABULARY": 300,
    "LEARNING_RATE": 1e-3,
    "WEIGHT_DECAY": 10.0,
    "SHAPE": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_25_steps_are_trls(tmp_path, monkeypatch):
    """Both train loops whole: tokens, batches, losses, clipping, AdamW with decay."""
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("trl_parity", BENCHMARK)
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    for name, value in SMALLER.items():
        monkeypatch.setattr(parity, name, value)
    turns = [
        {side: f"\n\nHuman: What is {i} and {i}?\n\nAssistant:{say} {2 * i + j}."}
        for i in range(parity.PAIRS)
        for j, (side, say) in enumerate((("chosen", " It is"), ("rejected", " Surely")))
    ]
    pairs = [{**a, **b} for a, b in zip(turns[::2], turns[1::2], strict=True)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = parity.prepare(str(data), tmp_path, "gpt_neox")
    ours = parity.run_jaxpref(tmp_path)
    theirs = parity.run_trl(tmp_path, ours["order"])
    assert parity.report(made, ours, theirs) < 1e-3
    losses = [line["loss"] for line in ours["metrics"]]
    assert min(losses) < 0.9 * losses[0]
