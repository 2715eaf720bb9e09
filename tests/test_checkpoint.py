"""What becomes of a run whose files are damaged, whose disk is full, whose workdir is in use."""

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import assert_same_params, final_params, lines_of, small

from jaxpref import checkpoint, commands, export, identity, manifest, metrics, reference, train
from jaxpref.checkpoint import Checkpoints
from jaxpref.errors import UserError
from jaxpref.lock import hold

PARAMS = {"w": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(3)}
REST = {"step": jnp.int32(7), "moments": {"w": jnp.full((4, 6), 0.5)}}


def flip(path, bit=None):
    """Flips one bit of a file, by default one in its middle."""
    content = bytearray(path.read_bytes())
    bit = 4 * len(content) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def largest(folder):
    """The file that holds the most, of arrays for certain."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return max(files, key=lambda path: path.stat().st_size)


def save(workdir, *steps):
    """Checkpoints whose parameters say of which step they are."""
    with Checkpoints(workdir, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, jax.tree.map(lambda x: x + step, PARAMS), REST)  # noqa: B023
        checkpoints.wait()


def restored(workdir):
    with Checkpoints(workdir, keep=9) as checkpoints:
        assert checkpoints.latest is not None
        params, rest = checkpoints.restore(checkpoints.latest, PARAMS, REST)
    np.testing.assert_array_equal(params["w"], PARAMS["w"] + checkpoints.latest)
    np.testing.assert_array_equal(rest["moments"]["w"], REST["moments"]["w"])
    return checkpoints.latest


def test_a_manifest_sees_every_flipped_bit_and_every_missing_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(bytes(range(20)))
    (tmp_path / "empty").write_bytes(b"")
    manifest.write(tmp_path)
    assert manifest.damage(tmp_path) is None
    for path in (tmp_path / "sub" / "x", tmp_path / "manifest.json"):
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            flip(path, bit)
            assert manifest.damage(tmp_path), (path, bit)
            path.write_bytes(whole)
        path.write_bytes(whole[:-1])
        assert manifest.damage(tmp_path)
        path.unlink()
        assert "is missing" in manifest.damage(tmp_path)
        path.write_bytes(whole)
    (tmp_path / "sub" / "another").write_bytes(b"later")
    assert manifest.damage(tmp_path) is None


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "without manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, capsys):
    save(tmp_path, 2, 4)
    folder = tmp_path / "checkpoints" / "4"
    path = folder / "manifest.json" if damage == "without manifest" else largest(folder)
    if damage == "flipped":
        flip(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert restored(tmp_path) == 2
    told = f"the checkpoint of step 4 is damaged ({path.relative_to(folder)}"
    assert told in capsys.readouterr().out
    # Set aside, so that step 4 can be saved again, and nothing is lost that may be of use.
    assert (tmp_path / "checkpoints" / "4.damaged").is_dir()
    save(tmp_path, 4)
    assert restored(tmp_path) == 4
    assert capsys.readouterr().out == ""


def test_checkpoints_that_are_all_damaged_are_an_error_and_stay(tmp_path):
    save(tmp_path, 2, 4)
    for step in (2, 4):
        flip(largest(tmp_path / "checkpoints" / str(step)))
    with pytest.raises(UserError, match=r"all of its checkpoints are damaged \(step 4: .*; step 2"):
        restored(tmp_path)
    assert checkpoint.latest_step(tmp_path) == 4


def test_the_last_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.kept() == "there is no checkpoint yet"
        for step in (1, 2, 3, 10):
            checkpoints.save(step, PARAMS, REST)
        assert checkpoints.kept() == "the checkpoint of step 10 is kept"
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "3"]
        flip(largest(tmp_path / "checkpoints" / "10"))
        assert "step 10 is damaged" in checkpoints.kept()


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_the_best_checkpoint_is_kept_beside_the_last(mode, sign, tmp_path):
    """Also by a run that goes on; what was measured before training has no checkpoint."""
    values = {0: 0.0, 1: 0.5, 2: 0.25, 3: 0.5, 4: 0.25, 5: 0.125, 6: 0.5, 7: 0.75}

    def train(steps):
        with Checkpoints(tmp_path, keep=1, best_metric="eval/loss", best_mode=mode) as checkpoints:
            for step in steps:
                better = checkpoints.note(step, {"eval/loss": sign * values[step]})
                assert better == (step in (1, 2, 5))
                if step:
                    checkpoints.save(step, PARAMS, REST)
            checkpoints.wait()
        return {path.name for path in (tmp_path / "checkpoints").iterdir()} - {"best.json"}

    assert train([0, 1, 2, 3]) == {"2", "3"}
    assert checkpoint.read_best(tmp_path) == checkpoint.Best(2, "eval/loss", sign * 0.25)
    assert train([4, 5, 6, 7]) == {"5", "7"}
    assert checkpoint.read_best(tmp_path) == checkpoint.Best(5, "eval/loss", sign * 0.125)
    with Checkpoints(tmp_path, keep=1, best_metric="eval/accuracies") as checkpoints:
        # By another measurement nothing is known to be better.
        assert checkpoints.note(8, {"eval/accuracies": 0.5})
        with pytest.raises(UserError, match=r"do not measure; they measure eval/loss\."):
            checkpoints.note(9, {"eval/loss": 0.5})


def test_the_best_is_one_that_is_saved(tmp_path, monkeypatch, capsys):
    """However long saves take, and whether or not they find room."""
    gate, finish = threading.Event(), Checkpoints._finish

    def slowly(self, *given):
        gate.wait()
        finish(self, *given)

    monkeypatch.setattr(Checkpoints, "_finish", slowly)
    with Checkpoints(tmp_path, keep=1, best_metric="eval/loss") as checkpoints:
        assert checkpoints.note(1, {"eval/loss": 0.5})
        checkpoints.save(1, PARAMS, REST)
        # A better one is found while that is being written.
        assert checkpoints.note(2, {"eval/loss": 0.25})
        gate.set()
        checkpoints.wait()
        assert checkpoint.read_best(tmp_path) == checkpoint.Best(1, "eval/loss", 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_is_full", lambda workdir, size: True)
            checkpoints.save(2, PARAMS, REST)
        assert "the disk is full" in capsys.readouterr().out
        # Better than what is saved, if not than what could not be.
        assert not checkpoints.note(3, {"eval/loss": 0.75})
        checkpoints.save(3, PARAMS, REST)
        checkpoints.wait()
        assert checkpoint.latest_step(tmp_path) == 3
        assert checkpoints.note(4, {"eval/loss": 0.375})
        checkpoints.save(4, PARAMS, REST)
        checkpoints.wait()
    assert checkpoint.read_best(tmp_path) == checkpoint.Best(4, "eval/loss", 0.375)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "best.json"]
    # By another measurement it says nothing of the checkpoints any more.
    with Checkpoints(tmp_path, keep=1, best_metric="eval/accuracies"):
        assert checkpoint.read_best(tmp_path) is None


def test_a_run_that_has_lost_its_workdir_writes_nothing(tmp_path):
    def lost():
        raise UserError("another run has taken it over.")

    save(tmp_path, 1)
    with (
        Checkpoints(tmp_path, keep=1, owned=lost) as checkpoints,
        pytest.raises(UserError, match="taken it over"),
    ):
        checkpoints.save(1, jax.tree.map(lambda x: x + 7, PARAMS), REST)
    assert restored(tmp_path) == 1


def test_a_run_keeps_its_best_checkpoint_and_export_writes_it(tmp_path, capsys):
    config = small(
        train__eval_every=1, train__keep=1, train__best_metric="eval/loss", train__best_mode="max"
    )
    train.run(config, tmp_path / "run")
    lines = [line for line in lines_of(tmp_path / "run") if "eval/loss" in line and line["step"]]
    best = max(lines, key=lambda line: line["eval/loss"])
    assert 0 < best["step"] < 4
    found = checkpoint.read_best(tmp_path / "run")
    assert found == checkpoint.Best(best["step"], "eval/loss", best["eval/loss"])
    assert f"best: step {best['step']}, eval/loss" in capsys.readouterr().out
    export.run(tmp_path / "run", tmp_path / "best", step="best")
    assert f"step {best['step']}: written" in capsys.readouterr().out
    export.run(tmp_path / "run", tmp_path / "last")
    assert "step 4: written" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"of step '99'; there are those of {best['step']}, 4, and"):
        export.run(tmp_path / "run", tmp_path / "none", step="99")
    with pytest.raises(UserError, match=r"they measure .*eval/loss"):
        train.run(small(train__best_metric="eval/lose"), tmp_path / "other")


SAVING = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import checkpoint, lock

workdir = Path(sys.argv[1])
weights = {"w": jnp.zeros((512, 1024)), "b": jnp.zeros(3)}
with lock.hold(workdir), checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
    step = checkpoints.latest or 0
    if step:
        restored, rest = checkpoints.restore(step, weights, {"step": jnp.int32(0)})
        assert all((np.asarray(x) == step).all() for x in jax.tree.leaves((restored, rest)))
    print("restored", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, jax.tree.map(lambda x: x + step, weights), {"step": jnp.int32(step)})
        checkpoints.wait()
        print("saved", step, flush=True)
"""


@pytest.mark.long
def test_kill_9_at_fifty_random_moments_of_saving_loses_no_checkpoint_that_was_complete(tmp_path):
    random, saved, moments = np.random.default_rng(0), 0, set()
    for _ in range(50):
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            word, step = process.stdout.readline().decode().split()
            assert word == "restored"
            # One may have been complete that was not told of any more.
            assert int(step) in (saved, saved + 1)
            timer = threading.Timer(random.uniform(0, 0.5), process.kill)
            timer.start()
            lines = process.stdout.read().decode().splitlines()
            timer.join()
        saved = max([int(step), *(int(line.split()[1]) for line in lines if "saved" in line)])
        assert all(line.startswith("saved") for line in lines), lines
        moments |= {p.name.strip("0123456789") for p in (tmp_path / "checkpoints").iterdir()}
    # Some of them were in the middle of one.
    assert any(name.startswith(".saving") for name in moments)
    assert saved > 50


def test_what_an_interrupted_save_leaves_is_removed(tmp_path):
    save(tmp_path, 2)
    left = ["checkpoints/3.saving.orbax-checkpoint-tmp", "checkpoints/1.removing", "frozen.saving"]
    for name in left:
        (tmp_path / name).mkdir()
    assert restored(tmp_path) == 2
    assert not any((tmp_path / name).exists() for name in left)


@pytest.mark.parametrize("what", ["frozen", "reference"])
def test_frozen_parameters_and_reference_are_compared_with_what_was_written(what, tmp_path):
    write = getattr(checkpoint, f"save_{what}")
    read = getattr(checkpoint, f"restore_{what}")
    # Twice, as where a run was killed before its first checkpoint.
    for _ in range(2):
        write(tmp_path, PARAMS)
    np.testing.assert_array_equal(read(tmp_path, PARAMS)["w"], PARAMS["w"])
    flip(largest(tmp_path / what))
    with pytest.raises(UserError, match=f"{what}: the .* of this run are damaged .*not what was"):
        read(tmp_path, PARAMS)


def test_one_process_compares_digests_and_the_others_follow(tmp_path, monkeypatch):
    save(tmp_path, 2)
    identity.write(tmp_path, identity.describe(small()))
    for folder in ("frozen", "reference"):
        getattr(checkpoint, f"save_{folder}")(tmp_path, PARAMS)

    def restore_all():
        return [
            checkpoint.restore_frozen(tmp_path, PARAMS),
            checkpoint.restore_reference(tmp_path, PARAMS),
            checkpoint.restore_moving_reference(tmp_path, {}),
            checkpoint.restore_params(tmp_path, {}),
        ]

    answers, compared, damage = [], [], manifest.damage

    def in_first(action):
        answers.append(action())
        return answers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.processes, "in_first", in_first)
        patch.setattr(manifest, "damage", lambda folder: compared.append(folder) or damage(folder))
        first = restore_all()
    assert [folder.name for folder in compared] == ["frozen", "reference", "2", "2"]
    given = iter(answers)
    # From here on as in another process.
    monkeypatch.setattr(checkpoint.processes, "in_first", lambda action: next(given))
    monkeypatch.setattr(manifest, "damage", lambda folder: pytest.fail(f"{folder} is read"))
    jax.tree.map(np.testing.assert_array_equal, restore_all(), first)
    shutil.rmtree(tmp_path / "frozen")
    given = iter(answers)
    with pytest.raises(UserError, match="frozen: is not the same for all processes of this run"):
        checkpoint.restore_frozen(tmp_path, PARAMS)


def test_a_changed_run_json_is_refused(tmp_path):
    identity.write(tmp_path, {"model.lora.alpha": 16.0})
    assert identity.read(tmp_path) == {"model.lora.alpha": 16.0}
    path = tmp_path / "run.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        flip(path, bit)
        # White space alone may be another.
        with contextlib.suppress(UserError):
            assert identity.read(tmp_path) == {"model.lora.alpha": 16.0}
        path.write_bytes(whole)


def test_a_workdir_of_another_version_is_told(tmp_path):
    """It has no layout, or another one; what is in it would be read as what it is not."""
    identity.write(tmp_path, {"model.lora.alpha": 16.0})
    path = tmp_path / "run.json"
    written = json.loads(path.read_text())
    for layout in (None, 1, 3):
        run = {k: v for k, v in written.items() if k not in ("layout", "sha256")}
        run |= {} if layout is None else {"layout": layout}
        path.write_text(json.dumps({**run, "sha256": identity._digest(run)}))
        with pytest.raises(UserError, match=rf"another version .*layout {layout or 1}; .*reads 2"):
            identity.read(tmp_path)


def test_no_flipped_bit_of_precomputed_log_probs_passes(tmp_path):
    table = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    reference.save_table(tmp_path, {"train": table}, "data", "reference")
    path = tmp_path / "reference_logps.npz"
    whole, refused = path.read_bytes(), 0
    for bit in np.random.default_rng(1).choice(8 * len(whole), 300, replace=False):
        flip(path, int(bit))
        try:
            found = reference.load_table(tmp_path, "data", None)
            np.testing.assert_array_equal(found["train"], table)
        except UserError as error:
            refused += "damaged" in str(error)
        path.write_bytes(whole)
    assert refused > 100


def test_a_full_disk_is_told_and_the_next_save_tries_again(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, PARAMS, REST)
        with monkeypatch.context() as disk:
            # Before anything is written, and in the end of it.
            disk.setattr(
                checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
            )
            checkpoints.save(2, PARAMS, REST)
            disk.undo()
            disk.setattr(checkpoint.manifest, "write", full)
            checkpoints.save(3, PARAMS, REST)
            with pytest.raises(
                UserError, match=r"checkpoint of step 3 is not saved .*last is of 1"
            ):
                checkpoints.wait()
        assert checkpoints.kept() == "the checkpoint of step 1 is kept"
        checkpoints.save(4, PARAMS, REST)
        checkpoints.wait()
    told = capsys.readouterr().out
    assert [f"step {step} is not saved" in told for step in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        False,
    ]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        # Of a device's memory, and of a bucket's rate of requests.
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
        ValueError("RESOURCE_EXHAUSTED: HTTP response code: 429"),
    ],
)
def test_an_error_that_is_no_full_disk_is_raised(error, tmp_path, monkeypatch):
    def broken(*_):
        raise error

    monkeypatch.setattr(checkpoint.manifest, "write", broken)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, PARAMS, REST)
        with pytest.raises(type(error)) as raised:
            checkpoints.wait()
    assert raised.value is error
    with pytest.raises(type(error)) as raised:
        checkpoint.save_frozen(tmp_path, PARAMS)
    assert raised.value is error


def test_a_full_disk_anywhere_else_is_a_sentence():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/curves.png")
    assert commands.no_room(full) == (
        "runs/curves.png: the disk is full (No space left on device). Make room, then give the "
        "same command."
    )
    assert commands.no_room(OSError(errno.EIO, "broken")) is None


def test_measurements_wait_for_room_on_the_disk(tmp_path, capsys):
    class Disk:
        """Takes so many bytes, and no more before there is room again."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = self.file.write(data[: self.room])
            self.room -= taken
            return taken

        def flush(self):
            self.file.flush()

        def close(self):
            self.file.close()

    with metrics.Writer(tmp_path, start=0, steps=9) as writer:
        disk = writer._file = Disk(writer._file)
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25})
        disk.room = 10**6
        writer.write(3, {"loss": 0.125})
    assert lines_of(tmp_path) == [{"step": i, "loss": 2.0**-i} for i in (1, 2, 3)]
    assert capsys.readouterr().out.count("measurements wait in memory") == 1
    with (  # noqa: PT012
        pytest.raises(UserError, match=r"its last 1 lines could not be written \(No space"),
        metrics.Writer(tmp_path, start=3, steps=9) as writer,
    ):
        writer._file = Disk(writer._file)
        writer.write(4, {"loss": 0.5})


def test_damaged_lines_of_measurements_are_counted_and_the_others_stay(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(5)]
    path.write_bytes(b"\n".join([*good[:2], b'{"step": 2, "lo\xff', *good[3:], b'{"step": 5, "l']))
    assert [line["step"] for line in metrics.read(path)] == [0, 1, 3, 4]
    assert "metrics.jsonl: 1 damaged lines are left out" in capsys.readouterr().out
    path.write_bytes(b"\n".join(good))
    assert len(metrics.read(path)) == 5


def test_a_workdir_in_use_is_refused_by_name(tmp_path):
    with hold(tmp_path / "run"):
        with (
            pytest.raises(
                UserError,
                match=f"is training there, process {os.getpid()} on {socket.gethostname()}",
            ),
            hold(tmp_path / "run"),
        ):
            pass
        with pytest.raises(UserError, match="another run is training there"):
            train.run(small(), tmp_path / "run")
    with hold(tmp_path / "run"):
        pass


def test_kill_9_lets_go_of_the_workdir(tmp_path, capsys):
    script = (
        "from jaxpref import lock; from pathlib import Path; import sys, time\n"
        "with lock.hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"), hold(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with hold(tmp_path):
        pass
    assert capsys.readouterr().out == ""
    # Where locks end at a host's border, only the text is left to go by.
    (tmp_path / "run.lock").write_text("process 3 on elsewhere")
    with hold(tmp_path):
        pass
    assert "process 3 on elsewhere, has not ended as it should" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """An SFT run with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    train.run(small("sft", train__save_every=2), workdir)
    return workdir


def test_a_run_goes_on_from_the_last_good_checkpoint(two_checkpoints, tmp_path, capsys):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "run")
    flip(largest(workdir / "checkpoints" / "4" / "rest"))
    train.run(small("sft", train__save_every=2), workdir)
    output = capsys.readouterr().out
    assert "the checkpoint of step 4 is damaged (rest/" in output
    assert "resuming after step 2" in output
    assert [line["step"] for line in lines_of(workdir)] == [0, 1, 2, 3, 4, 4]
    assert_same_params(workdir, two_checkpoints)


def test_what_reads_a_workdir_takes_its_last_good_checkpoint(two_checkpoints, tmp_path, capsys):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "run")
    flip(largest(workdir / "checkpoints" / "4" / "params"))
    export.run(workdir, tmp_path / "out")
    assert "run, step 2: written to" in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints" / "2")
    with pytest.raises(UserError, match="all of its checkpoints are damaged"):
        export.run(workdir, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="all of its checkpoints are damaged"):
        train.run(small(model__init_from=str(workdir)), tmp_path / "dpo")
    assert final_params(workdir)
