"""Processes that save on a disk which is really full for a while.

    unshare -rm python full_disk.py FOLDER PROCESSES FAILING

mounts a small disk on FOLDER, and lets so many processes save there. As long as the ballast is
there, what the process FAILING writes has no room, and what the others write has.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxpref import checkpoint, processes
from jaxpref.errors import UserError
from jaxpref.terminal import console

DISK, BALLAST, ARRAY = 48 << 20, 44 << 20, 16 << 20


def main(folder, count, failing):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen([sys.executable, __file__, folder, count, failing, address, str(i)])
        for i in range(int(count))
    ]
    end = time.monotonic() + 150
    try:
        codes = [process.wait(timeout=max(end - time.monotonic(), 0)) for process in started]
    finally:
        for process in started:
            process.kill()
    sys.exit(any(codes))


def save(folder, count, failing, address, process):
    processes.join(address, int(count), int(process))
    console.quiet = jax.process_index() > 0
    # Nothing of what this process writes can be compressed, and all of what the others write.
    rows = np.zeros((int(count), ARRAY // int(count) // 4), np.float32)
    rows[int(failing)] = np.random.default_rng(0).normal(size=rows.shape[1])
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    params, rest = (
        {name: jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), x.__getitem__)}
        for name, x, spec in (("w", rows, jax.P("all")), ("step", np.asarray(3), jax.P()))
    )
    # It is asked before anything is written, and promises nothing.
    checkpoint._is_full = lambda workdir, size: False
    workdir, ballast = Path(folder, "run"), Path(folder, "ballast")
    with processes.together(), checkpoint.Checkpoints(workdir, keep=9) as checkpoints:
        checkpoints.save(1, {"w": params["w"] * 0}, rest)
        checkpoints.wait()
        processes.in_first(lambda: ballast.write_bytes(bytes(BALLAST)))
        for step in (2, 3):
            checkpoints.save(step, params, rest)
            try:
                checkpoints.wait()
            except UserError as error:
                print(f"process {process}: {error}", flush=True)
        processes.in_first(ballast.unlink)
        checkpoints.save(4, params, rest)
        checkpoints.wait()
        restored, _ = checkpoints.restore(4, params, rest)
        for shard in restored["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, rows[shard.index])
        there = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        print(f"process {process}: {checkpoints.kept()} among {there}", flush=True)


if __name__ == "__main__":
    (save if len(sys.argv) > 4 else main)(*sys.argv[1:])
