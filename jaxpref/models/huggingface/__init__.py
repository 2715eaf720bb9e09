"""Models and adapters in Hugging Face's formats: read from directories and written into them.

From the bottom up; each file imports only from files above it in this list:

- `safetensors`: one tensor at a time from a file, or into it;
- `rope`: rotary positions from the keys of `rope_parameters`;
- `family`: what a family of models is, and how its `config.json` is read;
- `families`: the families, one page of declarations;
- `origin`: the directory that a model comes from, and copies of it without the weights;
- `places`: which view of which tensor each of our parameters is;
- `read` and `write`: a directory to a model and its parameters, and back;
- `peft`: adapters as the library `peft` keeps them, read and written.
"""

from jaxpref.models.huggingface.origin import (
    Origin,
    copy_small_files,
    known_stops,
    locate,
    remove_tokenizer,
)
from jaxpref.models.huggingface.peft import PEFT_CONFIG, SavedAdapters, save_adapters
from jaxpref.models.huggingface.places import places
from jaxpref.models.huggingface.read import (
    from_pretrained,
    has_scalar_head,
    load_params,
    pad_token_id,
    read_model,
)
from jaxpref.models.huggingface.rope import make_rope
from jaxpref.models.huggingface.write import save_pretrained, say_classifier
from jaxpref.models.params import abstract_params

__all__ = [
    "PEFT_CONFIG",
    "Origin",
    "SavedAdapters",
    "abstract_params",
    "copy_small_files",
    "from_pretrained",
    "has_scalar_head",
    "known_stops",
    "load_params",
    "locate",
    "make_rope",
    "pad_token_id",
    "places",
    "read_model",
    "remove_tokenizer",
    "save_adapters",
    "save_pretrained",
    "say_classifier",
]
