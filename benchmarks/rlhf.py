"""Steps of PPO, ReMax and RLOO by phase, their peak memory, and what ReMax saves by its lack of a
critic.

    python benchmarks/rlhf.py

A 17M-parameter decoder (384 wide, 6 layers, feed-forward 1024) with random weights is policy,
reference and reward model, and PPO's critic begins as the policy. Each method runs in a process of
its own, on the generated task: 16 prompts, 4 responses each of up to 64 tokens, frozen models in
bfloat16. Seconds are medians over the steps after the first two, which compile.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from common import describe_machine, peak_bytes
from ml_collections import ConfigDict

from jaxpref import checkpoint, config as base, train
from jaxpref.train.assemble import assemble

METHODS = ("ppo", "remax", "rloo")
PHASES = ("generate", "reward", "look", "update", "step")
STEPS = 8


def model_of(config: ConfigDict) -> ConfigDict:
    """The shape that all models here have."""
    config.model.width = 384
    config.model.layers = 6
    config.model.heads = config.model.kv_heads = 6
    config.model.head_dim = 64
    config.model.feed_forward = 1024
    config.model.vocabulary_size = 16_384
    config.data.format = "synthetic"
    config.data.synthetic_pairs = 256
    config.data.eval_fraction = 0.0
    config.data.batch_size = 16
    config.data.max_length = 128
    config.data.max_prompt_length = 64
    config.data.row_length = 320
    config.train.log_every = 1
    return config


def recipe(method: str, reward: str) -> ConfigDict:
    """A method's run."""
    config = model_of(base.default(method))
    config.sampling.samples = 4
    config.sampling.max_new_tokens = 64
    config.data.rows = 4
    config.reference.dtype = "bfloat16"
    config.reward.path = reward
    config.reward.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-6
    config.train.steps = STEPS
    return config


def measure(method: str, workdir: Path) -> None:
    """One method, in this process."""
    config = recipe(method, str(workdir.parent / "reward"))
    train.run(config, workdir)
    peak = peak_bytes()
    with checkpoint.Checkpoints(workdir, 1) as checkpoints:
        state = assemble(config, workdir, checkpoints)
    held = {
        "trained": sum(x.nbytes for x in jax.tree.leaves(state.state.roles)),
        "reference": sum(x.nbytes for x in jax.tree.leaves(state.reference)),
    }
    (workdir / "measured.json").write_text(json.dumps({"peak": peak, **held}))


def main() -> None:
    """All methods, in turn."""
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = model_of(base.default("reward"))
        config.train.steps = 1
        train.run(config, root / "reward")
        bytes_of: dict[str, float] = {}
        for method in METHODS:
            workdir = root / method
            subprocess.run(
                [sys.executable, __file__, method, str(workdir)], check=True, capture_output=True
            )
            lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "perf/step_seconds" in line][1:]
            seconds = {
                phase: statistics.median(line[f"perf/{phase}_seconds"] for line in steps)
                for phase in PHASES
            }
            found = json.loads((workdir / "measured.json").read_text())
            # The reward model is as large as the reference.
            bytes_of[method] = found["trained"] + 2 * found["reference"]
            phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
            print(
                f"{method}: seconds: {phases}; peak {found['peak'] / 1e9:.2f} GB; parameters and "
                f"optimizer state {bytes_of[method] / 1e6:.0f} MB"
            )
        saved = 1 - bytes_of["remax"] / bytes_of["ppo"]
        print(f"ReMax's parameters and optimizer state are {100 * saved:.0f}% below PPO's")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
