"""Runs a recipe: `python -m jaxpref.main --config=configs/dpo_hh.py --workdir=DIR`.

Any value of the recipe can be set after it: `--config.algorithm.beta=0.2`.
"""

import sys

from absl import app, flags

from jaxpref import config as config_lib, explain
from jaxpref.commands import WORKDIR, fail, quiet, show, told
from jaxpref.recipes import CONFIG, defined, listed, parse_flags, stages

# --help shows these two as well.
flags.declare_key_flag("config")
flags.declare_key_flag("workdir")
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Print every knob of the recipe, what it does and may be; run nothing."
)
# These three are for a run in several processes; on a cluster that JAX knows they are not needed.
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0 of a run in several processes."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes run together; 1: this one alone.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Which of the processes this one is, from 0.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Hands the config to the train loop, after those of the runs that it begins from."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --workdir=DIR.")
    if CONFIG.value is None:
        show(listed())
        sys.exit(2)
    if _EXPLAIN.value:
        show(explain.explain(CONFIG.value))
        return
    if defined("get_experiment"):
        fail("--config is an experiment: do it with python -m jaxpref.experiments.")
    workdir = WORKDIR.value
    if not workdir:
        fail("--workdir is missing: the directory for checkpoints and measurements.")
    _check_processes()
    quiet()
    with told():
        runs = [*stages(CONFIG.value, workdir), (CONFIG.value, workdir)]
        for config, _ in runs:
            config_lib.check(config)
        # JAX loads here, so that everything above answers at once.
        from jaxpref import processes

        processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    with processes.together(), told():
        from jaxpref import train

        for config, folder in runs:
            signalled = train.run(config, folder, leave=processes.leave_unsaved)
            if signalled and folder != workdir:
                raise KeyboardInterrupt(
                    f"interrupted: the run in {folder} is complete; the same command goes on with "
                    "the next one."
                )


def _check_processes() -> None:
    """Refuses flags that name no group of processes with this one in it."""
    coordinator, count, number = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    if coordinator is None and number is None and count in (None, 1):
        return
    if coordinator is None or count is None or number is None:
        fail("--coordinator, --num_processes and --process_id go together; give all three.")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        fail(f"--coordinator should be HOST:PORT; got {coordinator!r}.")
    if number >= count:
        fail(f"--process_id should be below --num_processes ({count}); got {number}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
