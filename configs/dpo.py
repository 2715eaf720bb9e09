"""DPO on data of your own, from a Hugging Face model.

    python -m jaxpref.main --config=configs/dpo.py --workdir=W \
        --config.model.init_from=MODEL --config.data.path=FILE

MODEL is a directory or a hub name, or the workdir of an SFT run. FILE is a file of pairs:
`prompt`, `chosen`, `rejected`, as texts or as messages. `:lora` trains low-rank adapters alone.
It is `configs/method.py:dpo`, which says more.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(kind: str = "") -> ConfigDict:
    """The recipe, "" or "lora"."""
    method = runpy.run_path(str(Path(__file__).parent / "method.py"))["get_config"]
    return method(f"dpo,{kind}")
