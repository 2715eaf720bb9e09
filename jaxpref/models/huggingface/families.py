"""The families of models that can be read from and written to Hugging Face's layout.

A family is a declaration: how its `config.json` reads as a `DecoderConfig`, and which of its
tensors hold which of our parameters. CONTRIBUTING.md shows how to add one.
"""

import math

from jaxpref.models.huggingface.family import Family, Fields, Reader, Tensors
from jaxpref.models.huggingface.rope import make_rope

_ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _read_llama(read: Reader, activation: str = "hidden_act") -> Fields:
    """What Llama and the families that descend from it have in common."""
    heads, width = read("num_attention_heads"), read("hidden_size")
    head_dim = read("head_dim", width // heads)
    layers, window = read("num_hidden_layers"), read("sliding_window", 0)
    kinds = read("layer_types", [])
    windows = (window,) * layers
    if kinds:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        read.require("layer_types", *([] if unknown else [kinds]))
        windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    fields = {
        "vocabulary_size": read("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": read("num_key_value_heads", heads),
        "head_dim": head_dim,
        "feed_forward": read("intermediate_size"),
        "windows": windows if any(windows) else (),
        "norm_epsilon": read("rms_norm_eps"),
        "activation": read.choose(activation, _ACTIVATIONS),
        "attention_bias": read("attention_bias", False),
        "out_bias": read("attention_bias", False),
        "feed_forward_bias": read("mlp_bias", False),
        "tied_head": read("tie_word_embeddings", False),
    }
    if "full_attention" not in read("rope_parameters", {}):
        fields["rope"] = (read.rope(head_dim),)
    return fields


_LLAMA_EDGES: Tensors = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
_LLAMA_NORMS: Tensors = {
    "layers/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/feed_forward_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
}
_LLAMA_ATTENTION: Tensors = {
    "layers/query": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/query_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/key": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/key_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/value": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/value_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/out": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/out_bias": "model.layers.{layer}.self_attn.o_proj.bias",
}
_QUERY_KEY_NORMS: Tensors = {
    "layers/query_norm/scale": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers/key_norm/scale": "model.layers.{layer}.self_attn.k_norm.weight",
}
_LLAMA_FEED_FORWARD: Tensors = {
    "layers/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/gate_bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "layers/up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/up_bias": "model.layers.{layer}.mlp.up_proj.bias",
    "layers/down": "model.layers.{layer}.mlp.down_proj.weight",
    "layers/down_bias": "model.layers.{layer}.mlp.down_proj.bias",
}
_LLAMA: Tensors = {**_LLAMA_EDGES, **_LLAMA_NORMS, **_LLAMA_ATTENTION, **_LLAMA_FEED_FORWARD}


def _read_qwen2(read: Reader) -> Fields:
    read("use_sliding_window")
    return {**_read_llama(read), "attention_bias": True}


def _read_qwen3(read: Reader) -> Fields:
    read("use_sliding_window")
    return {**_read_llama(read), "query_key_norm": True}


def _read_qwen3_moe(read: Reader) -> Fields:
    read.require("decoder_sparse_step", 1)
    read.require("mlp_only_layers", [], None)
    read("intermediate_size")
    return {
        **_read_qwen3(read),
        "feed_forward": read("moe_intermediate_size"),
        "experts": read("num_experts", read("num_local_experts")),
        "experts_per_token": read("num_experts_per_tok"),
        "normalize_experts": read("norm_topk_prob", False),
        "router_loss": read("router_aux_loss_coef", 0.0),
    }


def _read_mixtral(read: Reader) -> Fields:
    return {
        **_read_llama(read),
        "experts": read("num_local_experts", read("num_experts")),
        "experts_per_token": read("num_experts_per_tok"),
        "router_loss": read("router_aux_loss_coef", 0.0),
    }


def _read_gemma2(read: Reader) -> Fields:
    read.require("use_bidirectional_attention", None, False)
    # Old files also have the key of the first Gemma, `hidden_act`; `hidden_activation` counts.
    read("hidden_act")
    return {
        **_read_llama(read, activation="hidden_activation"),
        "norm": "rms_plus_one",
        "block": "sandwich",
        "attention_scale": read("query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": read("attn_logit_softcapping"),
        "logit_soft_cap": read("final_logit_softcapping"),
        "embedding_scale": math.sqrt(read("hidden_size")),
    }


def _read_gemma3(read: Reader) -> Fields:
    fields = {**_read_gemma2(read), "query_key_norm": True}
    kinds = ("full_attention", "sliding_attention")
    fields["rope"] = tuple(read.rope(fields["head_dim"], kind) for kind in kinds)
    fields["layer_rope"] = tuple(map(kinds.index, read("layer_types")))
    return fields


_GEMMA_NORMS: Tensors = {
    "layers/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/attention_out_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/feed_forward_norm/scale": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "layers/feed_forward_out_norm/scale": "model.layers.{layer}.post_feedforward_layernorm.weight",
}


def _read_gpt2(read: Reader) -> Fields:
    read.require("scale_attn_weights", True)
    read.require("scale_attn_by_inverse_layer_idx", False)
    read.require("add_cross_attention", False)
    # This key says in which precision attention scores are computed; here that is float32.
    read("reorder_and_upcast_attn")
    width, heads = read("n_embd"), read("n_head")
    return {
        "vocabulary_size": read("vocab_size"),
        "width": width,
        "layers": read("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "feed_forward": read("n_inner", 4 * width),
        "learned_positions": read("n_positions"),
        "norm": "layer",
        "norm_epsilon": read("layer_norm_epsilon"),
        "activation": read.choose("activation_function", _ACTIVATIONS),
        "gated": False,
        "attention_bias": True,
        "out_bias": True,
        "feed_forward_bias": True,
        "tied_head": read("tie_word_embeddings", True),
    }


_GPT2: Tensors = {
    "embedding": "transformer.wte.weight",
    "position_embedding": "transformer.wpe.weight",
    "layers/attention_norm/scale": "transformer.h.{layer}.ln_1.weight",
    "layers/attention_norm/bias": "transformer.h.{layer}.ln_1.bias",
    ("layers/query", "layers/key", "layers/value"): "transformer.h.{layer}.attn.c_attn.weight",
    (
        "layers/query_bias",
        "layers/key_bias",
        "layers/value_bias",
    ): "transformer.h.{layer}.attn.c_attn.bias",
    "layers/out": "transformer.h.{layer}.attn.c_proj.weight",
    "layers/out_bias": "transformer.h.{layer}.attn.c_proj.bias",
    "layers/feed_forward_norm/scale": "transformer.h.{layer}.ln_2.weight",
    "layers/feed_forward_norm/bias": "transformer.h.{layer}.ln_2.bias",
    "layers/up": "transformer.h.{layer}.mlp.c_fc.weight",
    "layers/up_bias": "transformer.h.{layer}.mlp.c_fc.bias",
    "layers/down": "transformer.h.{layer}.mlp.c_proj.weight",
    "layers/down_bias": "transformer.h.{layer}.mlp.c_proj.bias",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
}


def _read_gptj(read: Reader) -> Fields:
    read.require("rotary", True)
    read.require("scale_attn_weights", True)
    width, heads = read("n_embd"), read("n_head")
    head_dim = width // heads
    share = read("rotary_dim", head_dim) / head_dim
    return {
        "vocabulary_size": read("vocab_size"),
        "width": width,
        "layers": read("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "feed_forward": read("n_inner", 4 * width),
        "rope": (make_rope(head_dim, interleaved=True, partial_rotary_factor=share),),
        "norm": "layer",
        "norm_epsilon": read("layer_norm_epsilon"),
        "block": "parallel_shared",
        "activation": read.choose("activation_function", _ACTIVATIONS),
        "gated": False,
        "feed_forward_bias": True,
        "tied_head": read("tie_word_embeddings", False),
        "head_bias": True,
    }


_GPTJ: Tensors = {
    "embedding": "transformer.wte.weight",
    "layers/attention_norm/scale": "transformer.h.{layer}.ln_1.weight",
    "layers/attention_norm/bias": "transformer.h.{layer}.ln_1.bias",
    "layers/query": "transformer.h.{layer}.attn.q_proj.weight",
    "layers/key": "transformer.h.{layer}.attn.k_proj.weight",
    "layers/value": "transformer.h.{layer}.attn.v_proj.weight",
    "layers/out": "transformer.h.{layer}.attn.out_proj.weight",
    "layers/up": "transformer.h.{layer}.mlp.fc_in.weight",
    "layers/up_bias": "transformer.h.{layer}.mlp.fc_in.bias",
    "layers/down": "transformer.h.{layer}.mlp.fc_out.weight",
    "layers/down_bias": "transformer.h.{layer}.mlp.fc_out.bias",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
}


def _read_gpt_neox(read: Reader) -> Fields:
    width, heads = read("hidden_size"), read("num_attention_heads")
    return {
        "vocabulary_size": read("vocab_size"),
        "width": width,
        "layers": read("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "feed_forward": read("intermediate_size"),
        "rope": (read.rope(width // heads),),
        "norm": "layer",
        "norm_epsilon": read("layer_norm_eps"),
        "block": "parallel" if read("use_parallel_residual", True) else "sequential",
        "activation": read.choose("hidden_act", _ACTIVATIONS),
        "gated": False,
        "attention_bias": read("attention_bias", True),
        "out_bias": read("attention_bias", True),
        "feed_forward_bias": True,
        "tied_head": read("tie_word_embeddings", False),
    }


_GPT_NEOX: Tensors = {
    "embedding": "gpt_neox.embed_in.weight",
    "layers/attention_norm/scale": "gpt_neox.layers.{layer}.input_layernorm.weight",
    "layers/attention_norm/bias": "gpt_neox.layers.{layer}.input_layernorm.bias",
    (
        "layers/query",
        "layers/key",
        "layers/value",
    ): "gpt_neox.layers.{layer}.attention.query_key_value.weight",
    (
        "layers/query_bias",
        "layers/key_bias",
        "layers/value_bias",
    ): "gpt_neox.layers.{layer}.attention.query_key_value.bias",
    "layers/out": "gpt_neox.layers.{layer}.attention.dense.weight",
    "layers/out_bias": "gpt_neox.layers.{layer}.attention.dense.bias",
    "layers/feed_forward_norm/scale": "gpt_neox.layers.{layer}.post_attention_layernorm.weight",
    "layers/feed_forward_norm/bias": "gpt_neox.layers.{layer}.post_attention_layernorm.bias",
    "layers/up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight",
    "layers/up_bias": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias",
    "layers/down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight",
    "layers/down_bias": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias",
    "final_norm/scale": "gpt_neox.final_layer_norm.weight",
    "final_norm/bias": "gpt_neox.final_layer_norm.bias",
    "head": "embed_out.weight",
}


def _read_opt(read: Reader) -> Fields:
    width, heads = read("hidden_size"), read("num_attention_heads")
    read.require("layer_norm_elementwise_affine", True)
    narrow, bias = read("word_embed_proj_dim", width), read("enable_bias", True)
    before = read("do_layer_norm_before", True)
    return {
        "vocabulary_size": read("vocab_size"),
        "width": width,
        "layers": read("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "feed_forward": read("ffn_dim"),
        "learned_positions": read("max_position_embeddings") + 2,
        "position_offset": 2,
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "block": "sequential" if before else "post_norm",
        "final_norm": before and not read("_remove_final_layer_norm", False),
        "activation": read.choose("activation_function", _ACTIVATIONS),
        "gated": False,
        "attention_bias": bias,
        "out_bias": bias,
        "feed_forward_bias": bias,
        "embedding_width": 0 if narrow == width else narrow,
        "tied_head": read("tie_word_embeddings", True),
    }


_OPT: Tensors = {
    "embedding": "model.decoder.embed_tokens.weight",
    "position_embedding": "model.decoder.embed_positions.weight",
    "project_in": "model.decoder.project_in.weight",
    "project_out": "model.decoder.project_out.weight",
    "layers/attention_norm/scale": "model.decoder.layers.{layer}.self_attn_layer_norm.weight",
    "layers/attention_norm/bias": "model.decoder.layers.{layer}.self_attn_layer_norm.bias",
    "layers/query": "model.decoder.layers.{layer}.self_attn.q_proj.weight",
    "layers/query_bias": "model.decoder.layers.{layer}.self_attn.q_proj.bias",
    "layers/key": "model.decoder.layers.{layer}.self_attn.k_proj.weight",
    "layers/key_bias": "model.decoder.layers.{layer}.self_attn.k_proj.bias",
    "layers/value": "model.decoder.layers.{layer}.self_attn.v_proj.weight",
    "layers/value_bias": "model.decoder.layers.{layer}.self_attn.v_proj.bias",
    "layers/out": "model.decoder.layers.{layer}.self_attn.out_proj.weight",
    "layers/out_bias": "model.decoder.layers.{layer}.self_attn.out_proj.bias",
    "layers/feed_forward_norm/scale": "model.decoder.layers.{layer}.final_layer_norm.weight",
    "layers/feed_forward_norm/bias": "model.decoder.layers.{layer}.final_layer_norm.bias",
    "layers/up": "model.decoder.layers.{layer}.fc1.weight",
    "layers/up_bias": "model.decoder.layers.{layer}.fc1.bias",
    "layers/down": "model.decoder.layers.{layer}.fc2.weight",
    "layers/down_bias": "model.decoder.layers.{layer}.fc2.bias",
    "final_norm/scale": "model.decoder.final_layer_norm.weight",
    "final_norm/bias": "model.decoder.final_layer_norm.bias",
    "head": "lm_head.weight",
}


def _experts(block: str, gate: str, up: str, down: str) -> Tensors:
    place = f"model.layers.{{layer}}.{block}."
    return {
        "layers/router": place + "gate.weight",
        "layers/gate": f"{place}experts.{{expert}}.{gate}.weight",
        "layers/up": f"{place}experts.{{expert}}.{up}.weight",
        "layers/down": f"{place}experts.{{expert}}.{down}.weight",
    }


# A classifier of any family with one label has its head under this name.
SCORE = {"score": "score.weight"}

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "GPT2LMHeadModel",
            _read_gpt2,
            _GPT2,
            prefix="transformer.",
            buffers=(".attn.bias", ".attn.masked_bias"),
            conv1d=True,
        ),
        Family(
            "GPTJForCausalLM",
            _read_gptj,
            _GPTJ,
            prefix="transformer.",
            buffers=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
        ),
        Family(
            "GPTNeoXForCausalLM",
            _read_gpt_neox,
            _GPT_NEOX,
            prefix="gpt_neox.",
            buffers=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
            interleaved=True,
        ),
        Family("OPTForCausalLM", _read_opt, _OPT),
        Family("LlamaForCausalLM", _read_llama, _LLAMA),
        Family("MistralForCausalLM", _read_llama, _LLAMA),
        Family("Qwen2ForCausalLM", _read_qwen2, _LLAMA),
        Family("Qwen3ForCausalLM", _read_qwen3, {**_LLAMA, **_QUERY_KEY_NORMS}),
        Family("Gemma2ForCausalLM", _read_gemma2, {**_LLAMA, **_GEMMA_NORMS}),
        Family("Gemma3ForCausalLM", _read_gemma3, {**_LLAMA, **_GEMMA_NORMS, **_QUERY_KEY_NORMS}),
        Family(
            "Phi3ForCausalLM",
            _read_llama,
            {
                **_LLAMA_EDGES,
                **_LLAMA_NORMS,
                (
                    "layers/query",
                    "layers/key",
                    "layers/value",
                ): "model.layers.{layer}.self_attn.qkv_proj.weight",
                "layers/out": "model.layers.{layer}.self_attn.o_proj.weight",
                ("layers/gate", "layers/up"): "model.layers.{layer}.mlp.gate_up_proj.weight",
                "layers/down": "model.layers.{layer}.mlp.down_proj.weight",
            },
        ),
        Family(
            "Qwen3MoeForCausalLM",
            _read_qwen3_moe,
            {
                **_LLAMA_EDGES,
                **_LLAMA_NORMS,
                **_LLAMA_ATTENTION,
                **_QUERY_KEY_NORMS,
                **_experts("mlp", "gate_proj", "up_proj", "down_proj"),
            },
        ),
        Family(
            "MixtralForCausalLM",
            _read_mixtral,
            {
                **_LLAMA_EDGES,
                **_LLAMA_NORMS,
                **_LLAMA_ATTENTION,
                **_experts("block_sparse_moe", "w1", "w3", "w2"),
            },
        ),
    )
}
