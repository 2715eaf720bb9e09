"""Small random models of every family, made with transformers and torch.

    python tests/pretrained.py        renews tests/fixtures/, for machines without torch

A fixture holds the model as transformers saves it; `said.npz` with tokens and what
transformers' PyTorch model says of them; and in `gradient/`, saved like a model, the gradient
of the mean negative log-likelihood.
"""

from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
ROWS, LENGTH = 2, 17

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_IDS,
}
_NEOX = {**_SIZE, "intermediate_size": 24, "initializer_range": 0.3}
_SHAPE = {**_NEOX, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 24,
    "n_positions": 64,
    "initializer_range": 0.3,
    **_IDS,
}
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_OPT = {**_SIZE, "ffn_dim": 24, "init_std": 0.3}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
    }
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 10, "sliding_window": 5}
_FULL = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
_LOCAL = {"rope_type": "default", "rope_theta": 50.0}

# Name of the case: model type of transformers, and what its config sets, with the
# features on that real checkpoints of the family use.
CASES = {
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 2}),
    "pythia": (
        "gpt_neox",
        {**_NEOX, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox_sequential": (
        "gpt_neox",
        {**_NEOX, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "opt": ("opt", {**_OPT}),
    "opt_post_norm": (
        "opt",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8},
    ),
    "llama2": ("llama", {**_SHAPE, "num_key_value_heads": 4}),
    "llama3": ("llama", {**_SHAPE, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {**_SHAPE, "attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "mistral": ("mistral", {**_SHAPE, "sliding_window": 6}),
    "qwen2": ("qwen2", {**_SHAPE, "rope_parameters": _YARN}),
    "qwen2_windows": (
        "qwen2",
        {
            **_SHAPE,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**_SHAPE, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            **_SHAPE,
            **_GEMMA,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_SHAPE,
            **_GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": _FULL, "sliding_attention": _LOCAL},
        },
    ),
    "phi3": ("phi3", {**_SHAPE, "sliding_window": 7}),
    "phi3_short": ("phi3", {**_SHAPE, **_LONGROPE, "original_max_position_embeddings": 24}),
    "phi3_long": ("phi3", {**_SHAPE, **_LONGROPE, "original_max_position_embeddings": 12}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_SHAPE, **_MOE, "head_dim": 8, "norm_topk_prob": True, "router_aux_loss_coef": 0.1},
    ),
    "mixtral": ("mixtral", {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama_dynamic": (
        "llama",
        {
            **_SHAPE,
            "max_position_embeddings": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        },
    ),
}


def make(name: str, directory: Path, *, seed: int, dtype: str = "float32") -> dict:
    """Saves a random model and its gradient, and returns what it says of random tokens."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kind, settings = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start as ones and zeros, which would hide mistakes.
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model = model.to(getattr(torch, dtype))
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(directory)
    # Read back, as a user would.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(seed).integers(3, 40, (ROWS, LENGTH))
    extra = {"output_router_logits": True} if "mo" in kind or kind == "mixtral" else {}
    output = model(torch.as_tensor(tokens), **extra)
    logps = output.logits[:, :-1].float().log_softmax(-1)
    nll = -logps.gather(-1, torch.as_tensor(tokens[:, 1:, None])).mean()
    nll.backward()
    said = {"tokens": tokens.astype(np.int32), "logits": output.logits.detach().float().numpy()}
    if extra:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = model.config
        said["router_loss"] = (
            load_balancing_loss_func(
                output.router_logits, config.num_experts, config.num_experts_per_tok
            )
            .detach()
            .numpy()
        )
    # Saved as if it were the model, the gradient has the names and layout of a checkpoint.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(directory / "gradient")
    np.savez(directory / "said.npz", **said)
    return said


if __name__ == "__main__":
    for seed, name in enumerate(CASES):
        make(name, FIXTURES / name, seed=seed)
        size = sum(path.stat().st_size for path in (FIXTURES / name).rglob("*.*"))
        print(f"{name}: {size / 1000:.0f} kB")
