"""Every method from the same SFT model on the same generated pairs, whose true reward is known.

    python benchmarks/methods.py [--steps=80] [--only=dpo,ipo]

`configs/quickstart.py:METHOD` at its settings for DPO, which are not the best of every method:
a table of what each learns in as many updates, not a ranking of methods. About ten minutes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Held-out figures, where a method has them.
COLUMNS = {
    "accuracy": ("eval/rewards/accuracies", "eval/accuracy"),
    "rank correlation": ("eval/rewards/rank_correlation",),
    "margin": ("eval/rewards/margins", "eval/margin"),
    "log-prob, chosen": ("eval/logps/chosen",),
    "log-prob, rejected": ("eval/logps/rejected",),
}


def train(method: str, workdir: Path, *options: str) -> dict[str, Any]:
    """Runs a recipe; the last line of its measurements, and the seconds it took."""
    from jaxpref import metrics

    began = time.perf_counter()
    recipe = f"--config={ROOT / 'configs/quickstart.py'}:{method}"
    command = [sys.executable, "-m", "jaxpref.main", recipe, f"--workdir={workdir}", *options]
    subprocess.run(command, check=True, capture_output=True, text=True)
    lines = metrics.read(workdir / "metrics.jsonl")
    last = [line for line in lines if any(name.startswith("eval/") for name in line)][-1]
    return {**last, "seconds": time.perf_counter() - began}


def main() -> None:
    """Runs every method and prints the table."""
    from common import describe_machine

    from jaxpref.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", default="", help="methods, with commas between them")
    arguments = parser.parse_args()
    methods = [name for name in METHODS if name != "sft"]
    methods = arguments.only.split(",") if arguments.only else methods
    print(f"{describe_machine()}\n")
    print("| method | " + " | ".join(COLUMNS) + " | seconds |")
    print("|---|" + "---|" * (len(COLUMNS) + 1))
    with tempfile.TemporaryDirectory() as folder:
        sft = Path(folder, "sft")
        train("sft", sft)
        for method in methods:
            found = train(
                method,
                Path(folder, method),
                f"--config.model.init_from={sft}",
                f"--config.train.steps={arguments.steps}",
                "--config.train.eval_every=0",
            )
            cells = [
                next((f"{found[name]:.3f}" for name in names if name in found), "")
                for names in COLUMNS.values()
            ]
            print(f"| {method} | " + " | ".join(cells) + f" | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
