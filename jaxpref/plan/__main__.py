"""What a run would take of machines: `python -m jaxpref.plan`, on a machine with none of them.

    python -m jaxpref.plan --config=configs/shapes.py:llama3_8b,dpo --topology=v5p:2x2x4 --rows=1 \\
        --config.mesh.data=1 --config.mesh.fsdp=16

It compiles what `python -m jaxpref.main` would run with the same config, for a slice of Cloud TPUs
(with `pip install 'jaxpref[tpu]'`; v5p:4x4x4, v5e:16x16 and others), for CPUs (cpu:8), or for the
GPUs that are here (gpu). Of a method that samples this is sampling, too, as if no response ended
early. Nothing is allocated, and no weights are read. It ends with status 1 if the run does not fit.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from jaxpref import config as config_lib
from jaxpref.commands import OUTPUT, fail, quiet, show, told
from jaxpref.errors import UserError
from jaxpref.plan import machines
from jaxpref.recipes import CONFIG, listed, parse_flags

# --help shows these, too.
flags.declare_key_flag("config")
flags.declare_key_flag("output")
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:4x4x4, v5e:16x16, ...; cpu:8; or gpu.")
_SLICES = flags.DEFINE_integer("slices", 1, "How many slices of the topology.", lower_bound=1)
_ROWS = flags.DEFINE_integer(
    "rows", 0, "Full rows a device, in place of those that the data need; 0: these.", lower_bound=0
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Compile other rows, meshes, remat, references and adapters, too, and compare them.",
)


def main(argv: list[str]) -> None:
    """Plans a run, and prints what it takes."""
    if len(argv) > 1:
        fail(f"unexpected arguments: {' '.join(argv[1:])}; flags look like --topology=v5p:4x4x4.")
    if CONFIG.value is None:
        show(listed("plan"))
        sys.exit(2)
    if not _TOPOLOGY.value:
        fail("--topology is missing: v5p:4x4x4, v5e:16x16, ...; cpu:8; or gpu.")
    quiet()
    with told():
        config = CONFIG.value
        config_lib.check(config)
        machines.prepare(_TOPOLOGY.value)
        fits = _plan(config)
    sys.exit(0 if fits else 1)


def _plan(config: Any) -> bool:
    # JAX loads here, as the topology asks.
    from jaxpref import sharding
    from jaxpref.plan.estimate import TooLargeError, estimate
    from jaxpref.plan.programs import plan_run
    from jaxpref.plan.report import Report, size
    from jaxpref.plan.search import alternatives
    from jaxpref.terminal import console

    devices, chip = machines.devices_of(str(_TOPOLOGY.value), _SLICES.value)

    def report_of(config: Any, rows: int) -> Report:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        planned = plan_run(config, mesh, rows)
        found = []
        for program in planned.programs:
            with console.status(f"compiling {program.name}"):
                found.append(estimate(planned, program, mesh, chip))
        return Report(planned, tuple(found), chip, len(devices))

    def tell(error: TooLargeError) -> str:
        size = f": it needs {error.needed / 1e9:.1f} GB of a device" if error.needed else ""
        return f"does not fit, {error.name}{size}"

    results: dict[str, Any] = {}
    fits, of_data = False, int(config.data.rows)
    try:
        report = report_of(config, _ROWS.value)
    except TooLargeError as error:
        console.print(tell(error))
        results["given"] = {"fits": False, "program": error.name, "needed": error.needed}
    else:
        for table in report.tables():
            console.print(table)
        for sentence in report.sentences():
            console.print(sentence)
        fits, of_data = report.fits is not False, report.planned.rows
        results["given"] = report.as_dict()
        if report.fits is not None:
            assert chip is not None
            console.print(
                f"fits: {report.peak / 1e9:.1f} of {chip.memory / 1e9:.0f} GB"
                if report.fits
                else f"does not fit: {report.peak / 1e9:.1f} of {chip.memory / 1e9:.0f} GB"
            )
    if not fits and not _SEARCH.value:
        console.print(
            "With --search others are compiled, too: fewer rows of a micro-batch (data.rows), "
            "model.remat=full, mesh.fsdp and mesh.tensor, reference.mode=precomputed, adapters."
        )
    if _SEARCH.value:
        others = alternatives(config, len(devices), rows=_ROWS.value, of_data=of_data)
        for changes, other, rows in others:
            try:
                config_lib.check(other)
                found = report_of(other, rows)
            except TooLargeError as error:
                console.print(f"{changes}: {tell(error)}")
                results[changes] = {"fits": False, "program": error.name, "needed": error.needed}
                continue
            except UserError as error:
                console.print(f"{changes}: {error}")
                continue
            results[changes] = found.as_dict()
            speed = f", {found.seconds:.3f} s a step or more" if found.seconds else ""
            word = {True: "fits", False: "does not fit", None: "takes"}[found.fits]
            console.print(f"{changes}: {word}, {size(found.peak)}{speed}")
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(json.dumps(results, indent=2) + "\n")
    return fits


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
