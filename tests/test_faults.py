"""What real processes do about a disk that is really full, and about files that are damaged."""

import shutil
import subprocess
import sys

import pytest
from test_checkpoint import flip, largest
from test_cli import ENVIRONMENT, ROOT
from test_processes import finish, start

pytestmark = pytest.mark.process


def in_small_disk(folder, *command, timeout=240):
    """Runs a command where it may mount a disk of its own, which nobody else sees."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    mount = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if not shutil.which("unshare") or subprocess.run(mount, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    return subprocess.run(
        [*unshare, *command],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize(
    ("processes", "failing"), [(1, 0), (2, 1), pytest.param(2, 0, marks=pytest.mark.long)]
)
def test_a_disk_that_is_full_fails_a_save_in_all_processes_and_no_later_one(
    processes, failing, tmp_path
):
    script = str(ROOT / "tests" / "full_disk.py")
    done = in_small_disk(
        tmp_path, sys.executable, script, str(tmp_path), str(processes), str(failing)
    )
    output = done.stdout
    assert done.returncode == 0, output
    where = f"process {failing}: " if processes > 1 else ""
    for step in (2, 3):
        told = (
            f"{tmp_path}/run/checkpoints: the disk is full ({where}No space left on device), so "
            f"the checkpoint of step {step} is not saved (the last is of 1)."
        )
        # Each process hears of it; the first one alone speaks.
        assert all(f"process {i}: {told}" in output for i in range(processes)), output
        assert f"\n{told}" in f"\n{output}", output
    assert output.count("This run tries again when it next saves.") == 2, output
    for i in range(processes):
        kept = f"process {i}: the checkpoint of step 4 is kept among ['1', '4']"
        assert kept in output, output


FLAGS = ["--config.train.steps=4", "--config.train.save_every=2"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("faults") / "run"
    outputs, codes = finish(start(workdir, *FLAGS, devices=1))
    assert codes == [0], outputs
    return workdir


@pytest.mark.parametrize("damage", ["flipped", pytest.param("truncated", marks=pytest.mark.long)])
def test_a_run_names_a_damaged_checkpoint_and_goes_on_from_the_one_before(
    damage, two_checkpoints, tmp_path
):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "run")
    path = largest(workdir / "checkpoints" / "4")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path)
    [output], codes = finish(start(workdir, *FLAGS, devices=1))
    assert codes == [0], output
    name = path.relative_to(workdir / "checkpoints" / "4")
    told = f"the checkpoint of step 4 is damaged ({name}: not what was written); that of step 2"
    assert told in " ".join(output.split()), output
    assert "resuming after step 2" in output
    there = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert there == {"2", "4", "4.damaged"}
