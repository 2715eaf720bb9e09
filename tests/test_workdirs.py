"""Workdirs in a bucket, and the one owner that each workdir has."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import fake_bucket
import numpy as np
import pytest
from test_checkpoint import PARAMS, REST, largest, restored, save
from test_cli import ENVIRONMENT, ROOT, SMALL as QUICKSTART, wait_for
from test_resume import die_in_the_fourth_step
from test_train import assert_same_params, lines_of, small
from test_weights import QWEN3, small as weights_small, write_model

from jaxpref import (
    checkpoint,
    evaluation,
    export,
    lock,
    manifest,
    metrics,
    train,
    weights,
    workdir,
)
from jaxpref.checkpoint import Checkpoints
from jaxpref.errors import UserError
from jaxpref.experience.pool import Pool

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """A bucket whose listings have nothing of a test's objects, until that is said."""
    monkeypatch.chdir(tmp_path)
    return fake_bucket.use(tmp_path / "objects", late=3600.0, replace=monkeypatch.setattr)


@pytest.fixture
def bucket(objects, monkeypatch):
    """A workdir there, where nothing waits for others."""
    monkeypatch.setattr(lock, "_SETTLED", 0.0)
    return workdir.as_path("gs://bucket/run")


# The quickstart of `test_cli`, wherever it is started.
SMALL = [flag.replace("=configs/", f"={ROOT}/configs/") for flag in QUICKSTART]
# Without it a run that is to go on for longer is another one.
SMALL.append("--config.optimizer.schedule=constant")


def measured(folder):
    return [{k: v for k, v in x.items() if "perf" not in k} for x in lines_of(folder)]


def test_temporary_folders_go_also_where_a_process_ends_at_once():
    """Which removes them itself, since Python does not."""
    folder = workdir.temporary_folder()
    (folder / "x").write_text("x")
    workdir.remove_temporary_folders()
    assert not folder.exists()


def test_lines_end_with_newlines_alone(tmp_path):
    said = [json.dumps(text, ensure_ascii=False) for text in ("a\u2028b", "c\x85d\u2029", "e\r")]
    workdir.write(tmp_path / "said.jsonl", "".join(f"{text}\n" for text in said))
    assert workdir.read_lines(tmp_path / "said.jsonl") == said
    assert workdir.read_lines(tmp_path / "none.jsonl") == []


def test_a_run_in_a_bucket_is_that_on_a_disk(bucket, objects, tmp_path, monkeypatch, capsys):
    """Also when it has died in between; with weights and a reference from another one there."""
    train.run(small("sft", train__steps=1), bucket / "sft")
    config = small(
        model__init_from=str(bucket / "sft"), reference__mode="precomputed", train__save_every=2
    )
    folder = tmp_path / "disk"
    train.run(config, folder)
    die_in_the_fourth_step(config, bucket / "dpo", monkeypatch)
    assert checkpoint.latest_step(bucket / "dpo") == 2
    assert [line["step"] for line in lines_of(bucket / "dpo")] == [0, 1, 2]
    train.run(config, str(bucket / "dpo"))
    assert "resuming after step 2" in capsys.readouterr().out
    assert_same_params(bucket / "dpo", folder)
    assert measured(bucket / "dpo") == measured(folder)
    for other in ("run.json", "reference_logps.npz", "curves.png"):
        there = objects.local(bucket / "dpo" / other).exists()
        assert there == (folder / other).exists(), other
    assert len(list(objects.local(bucket / "dpo" / "tensorboard").iterdir())) == 2
    # What a finished run is for, without its files here.
    export.run(str(bucket / "dpo"), tmp_path / "exported")
    assert (tmp_path / "exported" / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "exported", "objects"]


def test_checkpoints_in_a_bucket_are_found_though_no_listing_has_them(bucket, objects):
    for step in (2, 4, 6):
        save(bucket, step)
        assert workdir.names(bucket / "checkpoints") == []
        assert restored(bucket) == step
    with Checkpoints(bucket, keep=2) as checkpoints:
        checkpoints.save(10, PARAMS, REST)
        checkpoints.wait()
        assert checkpoint._steps(bucket) == [6, 10]
    # As they are when a workdir is copied into a bucket by other means.
    (bucket / "checkpoints" / "steps.json").unlink()
    assert checkpoint.latest_step(bucket) is None
    objects.late = 0.0
    assert checkpoint._steps(bucket) == [6, 10]


@pytest.mark.parametrize("of", ["manifest", "Orbax"])
def test_a_checkpoint_in_a_bucket_counts_when_its_last_object_is_there(of, bucket, objects):
    """Wherever a save was killed, it is as if it had not begun; what it left is removed."""
    save(bucket, 2, 4)
    manifest.remove(bucket / "checkpoints" / "4")
    if of == "Orbax":
        for path in objects.local(bucket / "checkpoints" / "4").rglob("commit_success.txt"):
            path.unlink()
    assert checkpoint.latest_step(bucket) == 2
    objects.late = 0.0
    assert restored(bucket) == 2
    assert not (bucket / "checkpoints" / "4").exists()
    save(bucket, 4)
    assert restored(bucket) == 4


def test_an_object_that_is_gone_is_named_and_the_checkpoint_before_is_used(bucket, objects, capsys):
    save(bucket, 2, 4)
    lost = largest(objects.local(bucket / "checkpoints" / "4"))
    lost.unlink()
    assert restored(bucket) == 2
    assert f"/{lost.name} is missing); that of step 2 is used" in capsys.readouterr().out
    assert restored(bucket) == 2
    assert capsys.readouterr().out == ""
    # It is not removed, and room for a better one.
    assert (bucket / "checkpoints" / "4" / "damaged.txt").exists()
    save(bucket, 4)
    assert restored(bucket) == 4


@pytest.mark.parametrize("what", ["frozen", "reference"])
def test_other_parameters_in_a_bucket_are_complete_or_not_there(what, bucket):
    write, read = (getattr(checkpoint, f"{verb}_{what}") for verb in ("save", "restore"))
    with pytest.raises(UserError, match="cannot be found"):
        read(bucket, PARAMS)
    # Twice, as where a run was killed before its first checkpoint.
    for _ in range(2):
        write(bucket, PARAMS)
    np.testing.assert_array_equal(read(bucket, PARAMS)["w"], PARAMS["w"])
    manifest.remove(bucket / what)
    with pytest.raises(UserError, match=r"damaged \(manifest.json is missing"):
        read(bucket, PARAMS)


def test_what_grows_in_a_bucket_is_written_whole_now_and_then(bucket, monkeypatch, capsys):
    written = []
    write = workdir.write
    monkeypatch.setattr(workdir, "write", lambda *args: (written.append(args[0]), write(*args)))
    path = bucket / "metrics.jsonl"
    with metrics.Writer(bucket, start=0, steps=100) as writer:
        for step in range(100):
            writer.write(step, {"loss": 0.5})
        assert len(lines_of(bucket)) == 1
        writer.flush()
        assert len(lines_of(bucket)) == 100
        writer.write(100, {"loss": 0.5})
        # The bucket is out of reach for a while.
        with monkeypatch.context() as patched:
            patched.setattr(workdir, "write", unreachable)
            writer.flush()
        assert len(lines_of(bucket)) == 100
    assert [line["step"] for line in lines_of(bucket)] == [*range(101)]
    assert len([place for place in written if place == path]) <= 4
    assert "out of reach; measurements wait in memory" in capsys.readouterr().out
    with (  # noqa: PT012
        pytest.raises(UserError, match=r"its last 2 lines could not be written \(out of reach"),
        metrics.Writer(bucket, start=100, steps=101) as writer,
    ):
        monkeypatch.setattr(workdir, "write", unreachable)
        writer.write(101, {"loss": 0.5})
        writer.write(102, {"loss": 0.5})


def unreachable(*_):
    raise OSError(errno.EIO, "out of reach")


def test_a_bucket_that_is_out_of_reach_is_told_and_nothing_is_damaged(bucket, objects, monkeypatch):
    """Its clients raise errors of many classes."""

    def broken(*_):
        raise RuntimeError("503\nand more")

    save(bucket, 2, 4)
    with monkeypatch.context() as patched:
        patched.setattr(objects, "stat", broken)
        with pytest.raises(OSError, match=r"RuntimeError: 503: 'gs://bucket/run"):
            restored(bucket)
    assert restored(bucket) == 4
    monkeypatch.setattr(objects, "exists", broken)
    for begin in (
        lambda: train.run(small(), str(bucket)),
        lambda: train.run(small(model__init_from=str(bucket)), bucket.name),
    ):
        with pytest.raises(UserError, match=r"cannot be reached \(RuntimeError: 503\)\. See to"):
            begin()


def test_a_pool_in_a_bucket_is_written_before_the_update(bucket):
    pool = Pool(bucket / "pool.jsonl")
    for step in (1, 2, 3):
        assert pool.best(0, step) is None or step > 1
        pool.add(step, 0, np.array([step]), float(step))
        pool.flush()
    # A run that died in step 3 has what was known before.
    assert Pool(bucket / "pool.jsonl").best(0, 3).reward == 2.0


def test_small_files_go_into_a_bucket_and_come_back(bucket, tmp_path):
    assert workdir.get(bucket / "huggingface") is None
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.json").write_text("{}")
    workdir.put(tmp_path / "kept", bucket / "huggingface")
    copy = weights.kept(bucket).pretrained
    assert [(path.name, path.read_text()) for path in copy.iterdir()] == [("config.json", "{}")]


def test_curves_are_drawn_into_a_bucket(bucket):
    conftest.plot_curves([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}], bucket / "c.png", "")
    assert (bucket / "c.png").read_bytes().startswith(b"\x89PNG")


def test_addresses_that_are_none_are_refused_before_anything_else(tmp_path, monkeypatch):
    """Each of them would be a folder of that name here."""
    monkeypatch.chdir(tmp_path)
    for name in ("s3://bucket/run", "gs:/bucket/run", Path("gs://bucket/run")):
        with pytest.raises(UserError, match=r"is an address, and no path of a disk\. .*only gs://"):
            train.run(small(), name)
    monkeypatch.setattr(workdir, "_BACKENDS", ("no_such_module",))
    same = 2 * [str(tmp_path / "run.jsonl")]
    Path(same[0]).write_text('{"prompt": "?", "responses": ["!"]}')
    for refused in (
        lambda: train.run(small(), "gs://bucket/run"),
        lambda: train.run(small(model__init_from="gs://bucket/run"), tmp_path / "run"),
        lambda: export.run("gs://bucket/run", tmp_path / "out"),
        lambda: evaluation.judge_files(*same, judge="gs://bucket/run", output=tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"pip install 'jaxpref\[gcs\]'"):
            refused()
    with pytest.raises(UserError, match="--output=gs://bucket/out: is an address; give a folder"):
        export.run(tmp_path / "run", "gs://bucket/out")
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "run.jsonl"}


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A workdir, here or there."""
    return request.getfixturevalue("bucket") if request.param == "bucket" else tmp_path / "run"


@pytest.fixture
def quick(monkeypatch):
    """Locks that need tenths of a second for what takes many."""
    for name, seconds in {"_BEAT": 0.05, "_DEAD": 0.4, "_SETTLED": 0.05}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def unlocked(monkeypatch):
    """A disk without locks, as a network may have it."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)


ELSEWHERE = "process 7 on elsewhere\n0123 another/machine 0000000004\n"


def test_two_runs_never_hold_a_workdir(place, quick, unlocked):
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with (
        lock.hold(place),
        pytest.raises(UserError, match=f"training there, {me}"),
        lock.hold(place),
    ):
        pass
    with lock.hold(place):
        pass
    assert not [t for t in threading.enumerate() if t.name == "workdir's owner"]


def test_an_owner_elsewhere_that_shows_no_sign_of_life_is_followed(place, quick, capsys):
    """It is watched, whatever its clock says; until then nobody knows."""
    place.mkdir(parents=True, exist_ok=True)
    workdir.write(place / "run.lock", ELSEWHERE)
    began = time.monotonic()
    with lock.hold(place) as owned:
        assert time.monotonic() - began > lock._DEAD
        owned()
    assert "process 7 on elsewhere, has not ended as it should" in capsys.readouterr().out


def test_an_owner_elsewhere_that_lives_is_left_alone(place, quick):
    place.mkdir(parents=True, exist_ok=True)
    workdir.write(place / "run.lock", ELSEWHERE)
    later = ELSEWHERE.replace("0000000004", "0000000005")
    beat = threading.Timer(0.2, lambda: (place / "run.lock").write_text(later))
    beat.start()
    with (
        pytest.raises(UserError, match="is training there, process 7 on elsewhere"),
        lock.hold(place),
    ):
        pass
    beat.join()
    assert (place / "run.lock").read_text() == later


def test_who_has_lost_a_workdir_saves_nothing_more(place, quick, unlocked, capsys):
    with lock.hold(place) as owned, Checkpoints(place, 2, owned) as checkpoints:
        checkpoints.save(1, PARAMS, REST)
        checkpoints.wait()
        (place / "run.lock").write_text(ELSEWHERE)
        time.sleep(4 * lock._BEAT)
        with pytest.raises(UserError, match="process 7 on elsewhere has taken it over"):
            checkpoints.save(2, PARAMS, REST)
    assert "has taken it over" in capsys.readouterr().out
    assert checkpoint.latest_step(place) == 1
    assert "elsewhere" in (place / "run.lock").read_text()


def test_of_two_that_begin_at_the_same_time_in_a_bucket_one_goes_on(bucket, quick, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLED", 0.3)
    meet, ended = threading.Barrier(8), []

    def begin():
        meet.wait()
        try:
            with lock.hold(bucket):
                ended.append("held")
                time.sleep(1.0)
        except UserError:
            ended.append("refused")

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["held"] + 7 * ["refused"]


def start(run, root, *flags, processes=1):
    """A small run that saves after every step, in so many processes."""
    free = socket.create_server(("localhost", 0))
    address = f"--coordinator=localhost:{free.getsockname()[1]}"
    free.close()
    joined = [
        [address, f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)
    ]
    return [
        subprocess.Popen(
            [
                *(sys.executable, ROOT / "tests" / "fake_bucket.py", *SMALL),
                *(f"--workdir={run}", *flags, *(others if processes > 1 else [])),
            ],
            cwd=root,
            env={**ENVIRONMENT, "FAKE_BUCKET": str(root / "objects"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for others in joined
    ]


@pytest.mark.process
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_of_two_launches_the_second_refuses_until_the_first_is_killed(where, tmp_path):
    run = tmp_path / "run" if where == "disk" else "gs://bucket/run"
    steps = (
        tmp_path / "run" if where == "disk" else tmp_path / "objects/bucket/run"
    ) / "checkpoints"
    first = start(run, tmp_path, "--config.train.steps=100000")[0]
    wait_for(lambda: steps.exists() and any(p.name.isdigit() for p in steps.iterdir()), first)
    second = start(run, tmp_path)[0]
    said = second.communicate(timeout=90)[0]
    assert second.returncode == 2, said
    assert f"another run is training there, process {first.pid} on" in said
    assert first.poll() is None
    first.kill()
    first.communicate()
    whole = [path.parent.name for path in steps.glob("*/manifest.json")]
    last = max(int(name) for name in whole if name.isdigit())
    began = time.monotonic()
    third = start(run, tmp_path, f"--config.train.steps={last + 2}")[0]
    said = third.communicate(timeout=90)[0]
    assert third.returncode == 0, said
    assert f"resuming after step {last}" in said
    assert "has not ended as it should" not in said
    assert time.monotonic() - began < 60
    assert not (tmp_path / "gs:").exists()


@pytest.mark.long
def test_two_processes_train_in_a_bucket(tmp_path):
    for steps, said in ((2, "step 2/2"), (3, "resuming after step 2")):
        started = start("gs://bucket/run", tmp_path, f"--config.train.steps={steps}", processes=2)
        outputs = [process.communicate(timeout=120)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
        assert said in outputs[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["objects"]


STARTS = """
import sys, fake_bucket
from jaxpref import checkpoint, identity, lock, processes, workdir
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

root, starts, coordinator, count, process = sys.argv[1:]
processes.join(coordinator, int(count), int(process))
fake_bucket.use(root)
mesh = jax.make_mesh((jax.device_count(),), ("x",))
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["x"], []))
place = workdir.as_path("gs://bucket/run")
params, rest = {"w": jax.device_put(jnp.zeros(64), split)}, {"n": jax.device_put(0, whole)}
for start in range(int(starts)):
    with lock.hold(place) as owned:
        seen = checkpoint.latest_step(place)
        identity.check_same(
            place, {"seed": 0}, begun=checkpoint.latest_step(place) is not None
        )
        with checkpoint.Checkpoints(place, 2, owned) as checkpoints:
            latest = checkpoints.latest
            if latest:
                params, rest = checkpoints.restore(latest, params, rest)
                assert all((x.data == latest).all() for x in params["w"].addressable_shards)
            else:
                processes.in_first(lambda: identity.write(place, {"seed": 0}))
            params, rest = jax.tree.map(lambda x: x + 1, (params, rest))
            checkpoints.save((latest or 0) + 1, params, rest)
            checkpoints.wait()
    print("start", start, seen or 0, latest or 0, flush=True)
"""


@pytest.mark.parametrize(
    ("processes", "starts"),
    [
        pytest.param(2, 3, marks=pytest.mark.process),
        pytest.param(8, 50, marks=pytest.mark.long),
    ],
)
def test_all_processes_start_at_the_last_step_though_listings_are_late(processes, starts, tmp_path):
    """Start, save, and start again at once, in the same processes: they need not be loaded anew."""
    free = socket.create_server(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
    free.close()
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", STARTS, tmp_path / "objects", str(starts)),
                *(address, str(processes), str(process)),
            ],
            cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n\n".join(outputs)
    for output in outputs:
        said = [line for line in output.splitlines() if line.startswith("start")]
        assert said == [f"start {n} {n} {n}" for n in range(starts)], output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["objects"]


@pytest.mark.long
def test_a_run_in_a_bucket_needs_nothing_of_the_model_that_it_began_with(
    bucket, objects, tmp_path, monkeypatch
):
    """Adapters on a model of a disk, and another policy as the reference: then both are gone."""
    write_model(tmp_path / "hf", QWEN3)
    options = {"model__lora__rank": 2, "train__save_every": 2}
    train.run(weights_small("sft", tmp_path / "hf", **options), bucket / "sft")
    config = weights_small(
        "dpo", tmp_path / "hf", **options, reference__init_from=str(bucket / "sft")
    )
    config.optimizer.schedule = "constant"
    config.train.steps = 2
    for place in (bucket / "dpo", tmp_path / "disk"):
        train.run(config, place)
    shutil.rmtree(tmp_path / "hf")
    objects.late = 0.0
    for path in objects.local(bucket / "sft").rglob("*"):
        if path.is_file():
            path.unlink()
    config.train.steps = 4
    for place in (bucket / "dpo", tmp_path / "disk"):
        train.run(config, place)
    assert_same_params(bucket / "dpo", tmp_path / "disk")
    assert measured(bucket / "dpo") == measured(tmp_path / "disk")
    for place, output in ((bucket / "dpo", "one"), (tmp_path / "disk", "other")):
        export.run(place, tmp_path / output)
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "other")
    )
    assert one == other
