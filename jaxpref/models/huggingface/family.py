"""What a family of models is: how its `config.json` is read, and where its tensors go."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpref.errors import UserError
from jaxpref.models.huggingface.rope import make_rope
from jaxpref.models.rotary import Rope

Fields = dict[str, Any]
# From the path of one of our parameters, or from the paths of several that share a tensor,
# to the name of that tensor. `{layer}` and `{expert}` stand for numbers: Hugging Face has
# one tensor for each layer, and we stack all layers in one array.
Tensors = Mapping[str | tuple[str, ...], str]


class Reader:
    """A `config.json` with its defaults filled in, which notices the keys that nobody reads."""

    def __init__(self, values: Fields, defaults: Fields, where: str, max_length: int):
        """Begins with every key unread.

        Args:
          values: the whole config, defaults included.
          defaults: what transformers takes for a key that `config.json` leaves out.
          where: the file, for messages.
          max_length: see `make_rope`.
        """
        self._values, self._defaults, self._where = values, defaults, where
        self._max_length = max_length
        self._unread = set(values)

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` where there is none or it is null."""
        self._unread.discard(key)
        value = self._values.get(key)
        return default if value is None else value

    def require(self, key: str, *supported: Any) -> None:
        """Refuses every value of a key but those in `supported`.

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
          UserError: the table has no such entry.
        """
        self.require(key, *table)
        return table[self(key)]

    def rope(self, head_dim: int, kind: str | None = None) -> Rope:
        """The rotary positions.

        Args:
          head_dim: size of a head.
          kind: the kind of layers that is meant, where the config has several kinds with
            rotary positions of their own.
        """
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


# These keys say nothing about the forward pass of training. Dropout is off here, as it is in
# the runs of DPO's authors and of TRL; token ids are the tokenizer's to say.
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
    # These are bounds and factors of the rotary scaling, which `rope_parameters` repeats.
    *("original_max_position_embeddings", "rope_scaling", "rope_theta", "n_positions"),
}


class Family(NamedTuple):
    """A family of models.

    Attributes:
      architecture: its name in `config.json`.
      read: makes the fields of a `DecoderConfig` from a `config.json`.
      tensors: the tensor that holds each of our parameters.
      prefix: how the tensors' names begin; a checkpoint of the bare model, without a head,
        leaves it out.
      buffers: a tensor with one of these in its name is no parameter, and is not needed.
      conv1d: matrices are stored as [inputs, outputs] (GPT-2), not as [outputs, inputs].
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
        """The architecture with a classification head; with one label that is a scalar head."""
        stem = self.architecture.partition("For")[0].removesuffix("LMHeadModel")
        # Without `Text`, the name would be that of the model that also sees images.
        stem = "Gemma3Text" if stem == "Gemma3" else stem
        return f"{stem}ForSequenceClassification"
