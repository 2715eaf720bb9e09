"""The families of models that can be read from and written to Hugging Face's layout.

A family is data: how its `config.json` reads as a `DecoderConfig`, and which of its
tensors hold which of our parameters. CONTRIBUTING.md shows how to add one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpref.errors import UserError
from jaxpref.models.decoder import Rope

Fields = dict[str, Any]
# Our parameters, alone or several in one tensor, to the tensor's name. `{layer}` and
# `{expert}` stand for numbers; parameters under `layers/` are stacked on our side.
Tensors = Mapping[str | tuple[str, ...], str]


class Reader:
    """A `config.json` with its defaults filled in, which notices what nobody reads."""

    def __init__(self, values: Fields, defaults: Fields, where: str, max_length: int):
        """Takes all values, the defaults, a place for messages, and `make_rope`'s bound."""
        self._values, self._defaults, self._where = values, defaults, where
        self._max_length = max_length
        self._unread = set(values)

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        self._unread.discard(key)
        value = self._values.get(key)
        return default if value is None else value

    def require(self, key: str, *supported: Any) -> None:
        """Refuses any other value of a key.

        Raises:
          UserError: naming the key and its value.
        """
        if key in self._values and self(key) not in supported:
            known = " or ".join(map(repr, supported))
            raise UserError(
                f"{self._where}: {key} is {self(key)!r}, which jaxpref does not support; only "
                f"{known}."
            )

    def choose(self, key: str, table: Mapping[str, Any]) -> Any:
        """The table's entry for the value of a key.

        Raises:
          UserError: there is none.
        """
        self.require(key, *table)
        return table[self(key)]

    def rope(self, head_dim: int, kind: str | None = None) -> Rope:
        """The rotary positions, those of one kind of layer if there are several."""
        rope = self("rope_parameters", {})
        names = ("max_position_embeddings", "original_max_position_embeddings")
        known = {name: self(name) for name in names if self(name) is not None}
        given = rope[kind] if kind else rope
        max_length, where = self._max_length, self._where
        return make_rope(head_dim, max_length=max_length, **{**known, **given, "where": where})

    def finish(self, ignored: set[str]) -> None:
        """Refuses keys that nobody read and that are not at their defaults.

        Raises:
          UserError: naming them.
        """
        unread = {
            key: self._values[key]
            for key in sorted(self._unread - _HARMLESS - ignored)
            if self._values[key] not in (None, False, [], {})
            and self._values[key] != self._defaults.get(key)
        }
        if unread:
            raise UserError(
                f"{self._where}: sets {', '.join(f'{k}={v!r}' for k, v in unread.items())}, which "
                "jaxpref does not know. If that changes nothing in the forward pass, name it in "
                "`ignore` (model.ignore_keys in a config)."
            )


# Keys that say nothing about the forward pass of training: dropout is off, as in DPO's and
# TRL's runs; token ids belong to the tokenizer.
_HARMLESS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype"),
    *("transformers_version", "tokenizer_class", "unsloth_version", "unsloth_fixed"),
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"),
    *("activation_dropout", "classifier_dropout", "hidden_dropout", "layerdrop"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "prefix"),
    *("init_std", "initializer_range", "gradient_checkpointing", "use_cache", "pretraining_tp"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "return_dict"),
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("summary_type", "summary_use_proj", "output_router_logits", "max_position_embeddings"),
    *("max_window_layers", "sliding_window_pattern", "cache_implementation", "n_ctx"),
    # Bounds and factors of the rotary scaling, which `rope_parameters` repeats.
    *("original_max_position_embeddings", "rope_scaling", "rope_theta", "n_positions"),
}

_ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Family(NamedTuple):
    """A family of models.

    Attributes:
      architecture: as `config.json` names it.
      read: a `config.json` to the fields of a `DecoderConfig`.
      tensors: where its tensors hold our parameters.
      prefix: of the names; checkpoints of the bare model go without it.
      buffers: parts of names of tensors that are no parameters, and are not needed.
      conv1d: matrices are stored as [inputs, outputs] (GPT-2), not [outputs, inputs].
      interleaved: parameters that share a tensor alternate head by head (GPT-NeoX).
    """

    architecture: str
    read: Callable[[Reader], Fields]
    tensors: Tensors
    prefix: str = "model."
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    conv1d: bool = False
    interleaved: bool = False

    @property
    def classifier(self) -> str:
        """The architecture with a classification head, of which one label is a scalar head."""
        stem = self.architecture.partition("For")[0].removesuffix("LMHeadModel")
        # The name without `Text` is that of the model that sees images too.
        stem = "Gemma3Text" if stem == "Gemma3" else stem
        return f"{stem}ForSequenceClassification"


def _plain_frequencies(head_dim: int, rope: Fields) -> np.ndarray:
    turning = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    # In float32, as the originals compute them.
    exponents = np.arange(0, turning, 2, dtype=np.float32) / np.float32(turning)
    return 1 / np.float32(rope.get("rope_theta", 10_000.0)) ** exponents


def make_rope(
    head_dim: int, *, interleaved: bool = False, max_length: int = 0, **rope: Any
) -> Rope:
    """Rotary positions from the keys of Hugging Face's `rope_parameters`.

    Args:
      head_dim: size of a head.
      interleaved: pairs are neighbours.
      max_length: of the sequences that the model will see; above the original length LongRoPE
        (arXiv 2402.13753) takes its long factors, and dynamic scaling those of a sequence of
        that length. The originals switch from call to call by the longest sequence in it,
        which would let one sequence of a batch change another.
      rope: `rope_type` (default, linear, dynamic, llama3, yarn, longrope) and its parameters.

    Raises:
      UserError: the type is another.
    """
    kind = rope.get("rope_type", "default")
    frequencies, scale, limit = _plain_frequencies(head_dim, rope), 1.0, 0
    if kind == "linear":
        frequencies = frequencies / np.float32(rope["factor"])
    elif kind == "dynamic":
        original = rope["max_position_embeddings"]
        limit = max(max_length, original)
        frequencies = _dynamic(head_dim, rope, max(max_length / original, 1.0))
    elif kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif kind == "yarn":
        frequencies, scale = _yarn(frequencies, rope)
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        long = max_length > original
        limit = 0 if long else original
        factors = rope["long_factor" if long else "short_factor"]
        frequencies = frequencies / np.asarray(factors, np.float32)
        factor = rope.get("factor") or rope["max_position_embeddings"] / original
        scale = rope.get("attention_factor") or (
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        )
    elif kind != "default":
        raise UserError(
            f"{rope.get('where', 'rope_parameters')}: rope_type is {kind!r}, which jaxpref does "
            "not support; only default, linear, dynamic, llama3, yarn and longrope."
        )
    return Rope(tuple(map(float, frequencies)), scale, interleaved, limit)


def _dynamic(head_dim: int, rope: Fields, longer: float) -> np.ndarray:
    """Dynamic NTK-aware scaling for sequences `longer` times the original (arXiv 2309.00071, 3.3).

    The base grows so that slow frequencies are interpolated and the fastest one stays.
    """
    turning = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    stretch = rope["factor"] * longer - (rope["factor"] - 1)
    theta = rope["rope_theta"] * stretch ** (turning / (turning - 2))
    return _plain_frequencies(head_dim, {**rope, "rope_theta": theta})


def _llama3(frequencies: np.ndarray, rope: Fields) -> np.ndarray:
    """Slow frequencies are divided, fast ones stay, between them it is interpolated (Llama 3.1)."""
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / rope["factor"] + kept * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, rope: Fields) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3.2 and equation 22)."""
    factor, theta, size = rope["factor"], rope["rope_theta"], 2 * len(frequencies)
    original = rope.get("original_max_position_embeddings") or rope["max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair that turns so often over the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(len(frequencies)) - low) / ((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    mixed = (1 - kept) * frequencies / factor + kept * frequencies

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return mixed.astype(np.float32), float(magnitude(1) if scale is None else scale)


def _read_llama(read: Reader, activation: str = "hidden_act") -> Fields:
    """What Llama and all that descend from it have in common."""
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
    # Old files give the first Gemma's activation under the other name too.
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
    # Only says in which precision the scores are computed; ours are in float32.
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


# The head of a classifier with one label.
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
