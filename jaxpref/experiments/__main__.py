"""Does an experiment: `python -m jaxpref.experiments --config=configs/experiments/NAME.py`.

    python -m jaxpref.experiments --config=configs/experiments/bandits.py:quick --workdir=W

The same command goes on where it was stopped. Any of the settings can be set after it, such as
`--config.seeds=10`; what was measured with other settings stays in W, and is done again.
"""

import os
import sys

from absl import app, flags

from jaxpref.commands import WORKDIR, fail, quiet, show, told
from jaxpref.config import flatten
from jaxpref.recipes import CONFIG, defined, listed, parse_flags

# --help shows these two as well.
flags.declare_key_flag("config")
flags.declare_key_flag("workdir")


def main(argv: list[str]) -> None:
    """Hands the record to the runner."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --workdir=DIR.")
    if CONFIG.value is None:
        show(listed("experiments", "configs/experiments"))
        sys.exit(2)
    if not WORKDIR.value:
        fail("--workdir is missing: the directory for what is measured.")
    get_experiment = defined("get_experiment")
    if get_experiment is None:
        fail(
            "--config should be an experiment, see configs/experiments; for a run of one recipe "
            "there is python -m jaxpref.main."
        )
    quiet()
    with told():
        from jaxpref import experiments

        experiment = get_experiment(CONFIG.value, WORKDIR.value)
        settings = ", ".join(f"{key} {value}" for key, value in flatten(CONFIG.value))
        try:
            experiments.run(experiment, WORKDIR.value, settings)
        except KeyboardInterrupt as interrupt:
            print(interrupt, file=sys.stderr, flush=True)
            sys.stdout.flush()
            # What JAX still computes would lose its ground as Python ends.
            os._exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
