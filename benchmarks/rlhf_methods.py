"""Every method that samples, on generated data whose true reward is known.

    python benchmarks/rlhf_methods.py

Runs `configs/rlhf_quickstart.py` for each method, in a process of its own: the first one makes SFT
and the reward model, from which all begin. Prints, for the same held-out prompts, one response to
each: true reward, learned reward, KL of a response to the SFT policy, tokens; then seconds of the
run with the start of Python and all compiling, and the highest resident memory.
"""

import argparse
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

from common import describe_machine

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "rlhf_quickstart.py"
COLUMNS = {
    "true reward": "eval/true_reward",
    "learned reward": "eval/objective/scores",
    "KL nats": "eval/objective/kl",
    "tokens": "eval/completions/length",
}


def run(method: str, workdir: Path, *flags: str) -> tuple[float, int]:
    """Seconds and peak bytes of one run."""
    command = [sys.executable, "-m", "jaxpref.main", f"--config={CONFIG}:{method}"]
    command += [f"--workdir={workdir}", *flags]
    began = time.monotonic()
    process = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{method} failed; its workdir is {workdir}.")
    # Linux counts in KiB.
    return time.monotonic() - began, usage.ru_maxrss * 1024


def evaluations(workdir: Path) -> list[dict[str, float]]:
    """The measurements on held-out prompts."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if COLUMNS["true reward"] in line]


def row(name: str, line: dict[str, float], seconds: str, memory: str) -> str:
    """A line of the table."""
    values = [f"{line[key]:.2f}" for key in COLUMNS.values()]
    return f"| {' | '.join([name, *values, seconds, memory])} |"


def main() -> None:
    methods = list(runpy.run_path(str(CONFIG))["SETTINGS"])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    methods = parser.parse_args().methods
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, methods[0])
        shared = [f"--config.model.init_from={first / 'sft'}"]
        shared += [f"--config.reward.path={first / 'reward'}"]
        for method in methods:
            workdir = Path(folder, method)
            seconds, memory = run(method, workdir, *([] if workdir == first else shared))
            before, *_, after = evaluations(workdir)
            if workdir == first:
                rows.append(row("SFT", before, "", ""))
            rows.append(row(method, after, f"{seconds:.0f}", f"{memory / 1e9:.2f}"))
    print(describe_machine())
    print(f"| method | {' | '.join(COLUMNS)} | seconds | peak GB |")
    print("|" + "---|" * (len(COLUMNS) + 3))
    print("\n".join(rows))
    print(f"The time of {methods[0]} is that of SFT and the reward model, too.")


if __name__ == "__main__":
    main()
