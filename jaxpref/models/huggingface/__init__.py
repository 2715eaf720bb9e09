"""Models in Hugging Face's formats: read from its directories and written into them."""

from jaxpref.models.huggingface.read import (
    Origin,
    abstract_params,
    copy_small_files,
    from_pretrained,
    has_scalar_head,
    load_params,
    locate,
    pad_token_id,
    places,
    read_model,
    remove_tokenizer,
    save_pretrained,
    say_classifier,
)

__all__ = [
    "Origin",
    "abstract_params",
    "copy_small_files",
    "from_pretrained",
    "has_scalar_head",
    "load_params",
    "locate",
    "pad_token_id",
    "places",
    "read_model",
    "remove_tokenizer",
    "save_pretrained",
    "say_classifier",
]
