"""SFT on data of your own, from a Hugging Face model.

    python -m jaxpref.main --config=configs/sft.py --workdir=W \
        --config.model.init_from=MODEL --config.data.path=FILE

MODEL is a directory or a hub name. FILE is a file of prompts with completions, of
conversations, of plain texts, or of pairs, whose chosen responses are taken. `:lora` trains
low-rank adapters alone. It is `configs/method.py:sft`, which says more.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(kind: str = "") -> ConfigDict:
    """The recipe, "" or "lora"."""
    method = runpy.run_path(str(Path(__file__).parent / "method.py"))["get_config"]
    return method(f"sft,{kind}")
