"""Several processes on one machine, joined over loopback: the same run as in one process."""

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from meshes import MESHES
from test_cli import ENVIRONMENT, ROOT, wait_for
from test_train import lines_of

from jaxpref import checkpoint
from jaxpref.sharding import AXES

SMALL = [
    "--config.model.init_from=",
    "--config.model.width=16",
    "--config.model.layers=1",
    "--config.data.synthetic_pairs=60",
    "--config.data.batch_size=8",
    "--config.optimizer.schedule=constant",
    "--config.train.log_every=1",
    "--config.train.eval_every=0",
    "--config.eval.win_rate_prompts=3",
    "--config.sampling.max_new_tokens=8",
]


def start(
    workdir,
    *flags,
    recipe="configs/quickstart.py:dpo",
    processes=1,
    devices=2,
    own=((), ()),
    folders=(ROOT, ROOT),
    environment=(),
):
    """One run in so many processes, with so many devices among them.

    Each of them may have flags of its own, and a folder in which it is started. With an environment
    it is run as `spied.py` has it.
    """
    command = [str(ROOT / "tests" / "spied.py")] if environment else ["-m", "jaxpref.main"]
    joined = [[]]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"--coordinator=localhost:{free.getsockname()[1]}"
        joined = [
            [address, f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)
        ]
    return [
        subprocess.Popen(
            [
                *(sys.executable, *command, f"--config={ROOT / recipe}", *SMALL),
                f"--workdir={workdir}",
                *flags,
                *others,
                *(own[number] if number < len(own) else ()),
            ],
            cwd=folders[number] if number < len(folders) else ROOT,
            env={
                **ENVIRONMENT,
                "JAX_NUM_CPU_DEVICES": str(devices // processes),
                "PYTHONPATH": str(ROOT),
                **dict(environment),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, others in enumerate(joined)
    ]


def finish(started, timeout=240):
    """The output of each process and how it ended."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return outputs, [process.returncode for process in started]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("processes") / "one"
    outputs, codes = finish(start(workdir, "--config.train.steps=3"))
    assert codes == [0], outputs
    return workdir


@pytest.mark.long
def test_two_processes_sample_and_evaluate_as_one(one, tmp_path):
    """With rows and parameters split between them."""
    split = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    outputs, codes = finish(start(tmp_path, "--config.train.steps=3", *split, processes=2))
    assert codes == [0, 0], outputs
    ours, theirs = lines_of(tmp_path), lines_of(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for here, there in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "eval/loss", "eval/logps/chosen"):
            if key in there:
                np.testing.assert_allclose(here[key], there[key], rtol=1e-4, err_msg=key)
    assert ours[0]["eval/logps/chosen"] == pytest.approx(theirs[0]["eval/logps/chosen"], rel=1e-6)
    assert ours[0]["eval/win_rate"] == 0.5
    assert ours[0]["eval/samples/kl"] == pytest.approx(0, abs=1e-4)
    # One of them speaks.
    assert "step 3/3" in outputs[0]
    assert "step" not in outputs[1]
    # What two have saved, one resumes.
    more = finish(start(tmp_path, "--config.train.steps=4"))
    assert more[1] == [0], more[0]
    assert "resuming after step 3" in more[0][0]


def put_in(folder, processes):
    """What `spied.py` has told of each batch, by process."""
    files = [folder / f"{process}.jsonl" for process in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def on_meshes(folder, processes):
    """The runs of `meshes.py`, and what was put on devices."""
    folder.mkdir()
    flags = ["--config.train.steps=3", "--config.eval.win_rate_prompts=0"]
    flags += ["--config.sampling.max_new_tokens=0", "--config.data.eval_fraction=0"]
    spied = folder / "spied"
    spied.mkdir()
    made = start(
        folder / "x".join(map(str, MESHES[0])),
        *flags,
        recipe="tests/meshes.py",
        processes=processes,
        devices=4,
        environment={"SPIED": str(spied)},
    )
    outputs, codes = finish(made)
    assert codes == [0] * processes, outputs
    return folder, put_in(spied, processes)


@pytest.mark.process
def test_processes_train_as_one_on_every_mesh_each_with_rows_of_its_own(tmp_path):
    expected, (put_alone,) = on_meshes(tmp_path / "alone", 1)
    for processes in (2, 4):
        folder, put = on_meshes(tmp_path / f"by{processes}", processes)
        check_as_one(folder, put, expected, put_alone)


def check_as_one(folder, put, expected, put_alone):
    processes = len(put)
    for mesh in MESHES:
        name = "x".join(map(str, mesh))
        ours, theirs = lines_of(folder / name), lines_of(expected / name)
        assert [line["step"] for line in ours] == [0, 1, 2, 3]
        for here, there in zip(ours[1:], theirs[1:], strict=True):
            assert here.keys() == there.keys()
            for key in ("loss", "grad_norm", "logps/chosen"):
                np.testing.assert_allclose(here[key], there[key], rtol=1e-4, err_msg=key)
    assert {len(of_process) for of_process in put} == {len(put_alone)}
    for number, batch in enumerate(put_alone):
        parts = [of_process[number] for of_process in put]
        together = {row: tokens for part in parts for row, tokens in part["rows"].items()}
        assert together == batch["rows"]
        assert {part["written"] for part in parts} == {
            # Where rows are not split every process holds all of them.
            len(batch["rows"]) // (1 if len(parts[0]["rows"]) == len(batch["rows"]) else processes)
        }
        assert all(part["written"] == len(part["rows"]) for part in parts)
        assert all(part["lengths"] == batch["lengths"] for part in parts)
    assert len(put_alone) == len(MESHES) * 3


@pytest.mark.process
def test_an_example_that_differs_stops_the_run_when_it_is_first_used(tmp_path):
    """With as many tokens as in the other process, after their data were compared.

    The second process has its data from what the first one has kept.
    """
    spied = tmp_path / "spied"
    spied.mkdir()
    altered = {"SPIED": str(spied), "ALTERED": "1 20"}
    flags = ["--config.train.steps=50", "--config.data.eval_fraction=0", "--config.seed=3"]
    flags += [f"--config.data.cache={tmp_path / 'cache'}"]
    outputs, codes = finish(start(tmp_path / "run", *flags, processes=2, environment=altered), 120)
    assert codes == [2, 2], outputs
    assert all("the next batch of process 1 is not that of process 0" in said for said in outputs)
    assert "process 1 of this run cannot go on" in outputs[0]
    assert [path.name for path in spied.glob("*.tokenised")] == ["0.tokenised"]
    # Sixty examples are seven and a half batches.
    first, second = put_in(spied, 2)
    assert 0 < len(second) < 8
    assert len(first) - len(second) in (0, 1)
    assert lines_of(tmp_path / "run")[-1]["step"] <= len(second)


@pytest.mark.process
def test_a_process_that_hangs_is_missed_by_the_others(tmp_path):
    flags = ["--config.train.steps=100000", "--config.train.hang_seconds=16"]
    started = start(tmp_path, *flags, processes=2)
    measurements = tmp_path / "metrics.jsonl"
    wait_for(lambda: measurements.exists() and len(lines_of(tmp_path)) > 5, started[0])
    started[1].send_signal(signal.SIGSTOP)
    try:
        output = started[0].communicate(timeout=60)[0]
    finally:
        for process in started:
            process.kill()
    started[1].communicate()
    assert started[0].returncode == 1
    told = [line for line in output.splitlines() if line.startswith("jaxpref: nothing has ended")]
    assert "(train.hang_seconds is 16): process 1 does not answer. The same command" in told[0]


@pytest.mark.process
def test_a_process_that_is_killed_ends_all(tmp_path):
    started = start(tmp_path, "--config.train.steps=100000", processes=2)
    measurements = tmp_path / "metrics.jsonl"
    wait_for(lambda: measurements.exists() and len(lines_of(tmp_path)) > 5, started[0])
    started[1].kill()
    outputs, codes = finish(started, timeout=60)
    assert codes == [1, -signal.SIGKILL]
    assert "jaxpref: process 1 of this run does not answer" in outputs[0]
    assert "Traceback" not in outputs[0]


# Four batches are held out, so that the sixth is that of the second step, and those after it are of
# the evaluation after that. All agree within a step or two.
PLACES = {
    "in a step": (6, (2, 3)),
    "in an evaluation": (7, (2,)),
}
EVALUATED = [
    *("--config.train.steps=6", "--config.train.eval_every=2", "--config.data.eval_fraction=0.5"),
    *("--config.eval.win_rate_prompts=0", "--config.sampling.max_new_tokens=0"),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    outputs, codes = finish(start(workdir, *EVALUATED))
    assert codes == [0], outputs
    return workdir


@pytest.mark.process
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("in a step", signal.SIGINT),
        ("in an evaluation", signal.SIGTERM),
        pytest.param("in a step", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("in an evaluation", signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    uninterrupted, place, number, tmp_path
):
    """Within half a minute, with one checkpoint, from which the run goes on as if nothing were."""
    batch, expected = PLACES[place]
    workdir = tmp_path / "run"
    signalled = {"SPIED": str(tmp_path), "SIGNALLED": f"1 {number} {batch} 0"}
    started = start(workdir, *EVALUATED, processes=2, environment=signalled)
    wait_for((tmp_path / "signalled").exists, started[0])
    outputs, codes = finish(started, timeout=30)
    assert codes == [130, 130], outputs
    last = checkpoint.latest_step(workdir)
    assert last in expected
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(last)]
    assert all(f"interrupted after step {last}, which is saved" in output for output in outputs)
    check_that_it_goes_on(workdir, uninterrupted)


def check_that_it_goes_on(workdir, uninterrupted):
    more, codes = finish(start(workdir, *EVALUATED))
    assert codes == [0], more
    ours, theirs = (merged(lines_of(folder)) for folder in (workdir, uninterrupted))
    assert ours.keys() == theirs.keys()
    for step, line in theirs.items():
        assert ours[step].keys() == line.keys()
        for key in {"loss", "grad_norm", "logps/chosen", "eval/loss", "eval/logps/chosen"} & {
            *line
        }:
            np.testing.assert_allclose(ours[step][key], line[key], rtol=1e-4, err_msg=key)


@pytest.mark.process
@pytest.mark.parametrize(
    ("processes", "number", "done"),
    [
        (1, signal.SIGINT, 0),
        (1, signal.SIGTERM, 2),
        (2, signal.SIGTERM, 0),
        pytest.param(2, signal.SIGINT, 2, marks=pytest.mark.long),
    ],
)
def test_a_signal_before_a_step_is_done_ends_all_at_once(
    uninterrupted, processes, number, done, tmp_path
):
    """Also while XLA compiles: nothing is lost, and the same command starts as this one did."""
    workdir = tmp_path / "run"
    if done:
        outputs, codes = finish(start(workdir, *EVALUATED, f"--config.train.steps={done}"))
        assert codes == [0], outputs
    stuck = {"SPIED": str(tmp_path), "STUCK": ""}
    started = start(workdir, *EVALUATED, processes=processes, environment=stuck)
    marks = [tmp_path / f"{process}.stuck" for process in range(processes)]
    wait_for(lambda: all(mark.exists() for mark in marks), started[0])
    started[-1].send_signal(number)
    outputs, codes = finish(started, timeout=15)
    assert codes == [130] * processes, outputs
    for output in outputs:
        assert "no step was done that is not saved" in output
        assert "Traceback" not in output
        assert "cannot go on" not in output
    assert (workdir / "run.lock").read_text() == ""
    assert checkpoint.latest_step(workdir) == (done or None)
    check_that_it_goes_on(workdir, uninterrupted)


STAGES = """
from pathlib import Path
from configs import quickstart

def get_config():
    return quickstart.get_config("dpo")

def get_stages(config, workdir):
    return [(config.copy_and_resolve_references(), str(Path(workdir).with_name("first")))]
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (2, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.long),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_after_a_signal_in_its_last_save_a_run_is_complete_and_no_other_begins(
    processes, number, tmp_path
):
    """Where there is no other one the command is done; one process alone goes on here."""
    recipe = tmp_path / "stages.py"
    recipe.write_text(STAGES)
    expected = f"the run in {tmp_path / 'first'} is complete; the same command goes on with the"
    for count, run, code in ((processes, "first", 130), (1, "second", 0)):
        started = start(
            tmp_path / "second",
            *("--config.train.steps=1", "--config.data.eval_fraction=0"),
            *("--config.eval.win_rate_prompts=0", "--config.sampling.max_new_tokens=0"),
            recipe=recipe,
            processes=count,
            environment={"SPIED": str(tmp_path), "SAVING": f"{count - 1} {number}"},
        )
        outputs, codes = finish(started)
        (tmp_path / "signalled").unlink()
        assert codes == [code] * count, outputs
        assert all((expected in output) == bool(code) for output in outputs), outputs
        assert checkpoint.latest_step(tmp_path / run) == 1
        assert (tmp_path / "second").exists() == (run == "second")


def merged(lines):
    """All measurements of each step, but for those of speed."""
    found = {}
    for line in lines:
        values = {key: value for key, value in line.items() if not key.startswith("perf/")}
        found.setdefault(line["step"], {}).update(values)
    return found


def put_parts(folder, processes):
    """What all processes have told of a batch, for one batch after the other."""
    return zip(*put_in(folder, processes), strict=True)


def tokens_of(parts):
    """The lengths of a batch's responses, and all of its tokens, whatever rows they lie in."""
    rows = {row: tokens for part in parts for row, tokens in part["rows"].items()}
    tokens = np.sort(np.ravel([np.ravel(of_row) for of_row in rows.values()]))
    return np.sum(parts[0]["lengths"], axis=0).tolist(), tokens[tokens > 0].tolist()


@pytest.mark.long
def test_what_four_processes_have_saved_any_number_resumes_on_any_mesh(tmp_path):
    """With the same batches, the same frozen weights, the same reference."""
    frozen = [
        *EVALUATED,
        "--config.train.trainable=^layers/(query|out)$",
        "--config.train.eval_every=0",
    ]

    def go_on(name, steps, processes, mesh):
        folder, spied = tmp_path / name, tmp_path / f"{name}-spied"
        spied.mkdir()
        flags = [f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, mesh, strict=True)]
        made = start(
            folder,
            *frozen,
            *flags,
            f"--config.train.steps={steps}",
            processes=processes,
            devices=math.prod(mesh),
            environment={"SPIED": str(spied)},
        )
        outputs, codes = finish(made, timeout=300)
        assert codes == [0] * processes, outputs
        return merged(lines_of(folder)), [tokens_of(parts) for parts in put_parts(spied, processes)]

    go_on("saved", 2, 4, (2, 2, 1))
    found = {}
    for processes, mesh in ((1, (1, 1, 1)), (2, (1, 2, 1)), (8, (2, 2, 2))):
        shutil.copytree(tmp_path / "saved", tmp_path / f"by{processes}")
        found[processes] = go_on(f"by{processes}", 4, processes, mesh)
    lines, batches = found.pop(1)
    assert max(lines) == 4
    for other_lines, other_batches in found.values():
        assert other_batches == batches
        assert other_lines.keys() == lines.keys()
        for step in (3, 4):
            for key, value in lines[step].items():
                np.testing.assert_allclose(
                    other_lines[step][key], value, rtol=1e-3, atol=2e-5, err_msg=key
                )


@pytest.mark.long
def test_a_process_that_is_killed_again_and_again_loses_nothing_that_was_saved(tmp_path):
    """Process 0 and process 1 by turns, at random moments of a run that saves all the time."""
    flags = ["--config.train.steps=100000", "--config.train.save_every=2"]
    random, reached = np.random.default_rng(0), 0
    for turn in range(20):
        started = start(tmp_path, *flags, processes=2)
        begun = time.monotonic()
        before = len(merged(lines_of(tmp_path))) if turn else 0
        wait_for(partial(there_is_more, tmp_path, before), started[0], 120)
        time.sleep(random.uniform(0, 2))
        victim = turn % 2
        started[victim].kill()
        output = started[1 - victim].communicate(timeout=60)[0]
        started[victim].communicate()
        assert started[1 - victim].returncode != 0
        if victim:
            assert "jaxpref: process 1 of this run does not answer" in output
        else:
            # JAX aborts a process whose service is gone, maybe before it can say a word. It calls
            # the first process the leader.
            assert (
                "process 0 of this run does not answer" in output
                or "the leader task was preempted/died" in output
            )
        assert "damaged" not in output
        step = checkpoint.latest_step(tmp_path) or 0
        assert step >= reached, f"turn {turn}, {time.monotonic() - begun:.0f} s"
        if reached and victim == 1:
            assert f"resuming after step {reached}" in output
        reached = step
    outputs, codes = finish(start(tmp_path, f"--config.train.steps={reached + 1}"))
    assert codes == [0], outputs
    assert f"resuming after step {reached}" in outputs[0]


def there_is_more(workdir, lines):
    """Whether a run has measured something that it had not measured before."""
    return (workdir / "metrics.jsonl").exists() and len(merged(lines_of(workdir))) > lines


def pairs_in(folder, count, first="a"):
    """A folder with a data set of so many pairs."""
    folder.mkdir()
    lines = [
        json.dumps({"prompt": f"{n}?", "chosen": f" {first}{n}", "rejected": " b"})
        for n in range(count)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.process
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("settings", "optimizer.learning_rate: 0.5 here, 0.0003 there"),
        ("missing file", "pairs.jsonl (data.path): no such file"),
        ("other file", "process 1 of this run does not have what process 0 has:\n  data"),
    ],
)
def test_a_process_that_cannot_go_on_ends_all(case, message, tmp_path):
    """Before the first step, with the same sentence on every terminal."""
    folders = [pairs_in(tmp_path / "first", 40)]
    own = ((), ("--config.optimizer.learning_rate=0.5",) if case == "settings" else ())
    folders.append(tmp_path / "second")
    if case == "missing file":
        folders[1].mkdir()
    else:
        pairs_in(folders[1], 40, first="c" if case == "other file" else "a")
    data = ["--config.data.format=explicit", "--config.data.path=pairs.jsonl"]
    workdir = tmp_path / "run"
    started = start(workdir, *data, processes=2, own=own, folders=folders)
    outputs, codes = finish(started, timeout=60)
    assert codes == [2, 2], outputs
    assert all(message in output for output in outputs), outputs
    assert "process 1 of this run" in outputs[0]
    assert not any("Traceback" in output or "step 1" in output for output in outputs)


@pytest.fixture(scope="module")
def begun_apart(tmp_path_factory):
    """A run whose reference's log-probs are precomputed, and its flags."""
    flags = ["--config.train.steps=1", "--config.reference.mode=precomputed"]
    workdir = tmp_path_factory.mktemp("apart") / "run"
    outputs, codes = finish(start(workdir, *flags, devices=1))
    assert codes == [0], outputs
    return flags, workdir


@pytest.mark.process
@pytest.mark.parametrize(
    ("file", "seen_by"),
    [
        ("run.lock", 0),
        ("checkpoints", 0),
        ("checkpoints", 1),
        ("reference_logps.npz", 0),
        pytest.param("reference_logps.npz", 1, marks=pytest.mark.long),
    ],
)
def test_a_workdir_that_processes_do_not_share_is_named(file, seen_by, begun_apart, tmp_path):
    """Where one of them finds what another does not find, neither waits for the other."""
    flags, workdir = begun_apart
    folders = [tmp_path / "first", tmp_path / "second"]
    first, second = (folder / "run" for folder in folders)
    for folder in (first, second):
        (folder / "checkpoints").mkdir(parents=True)
    # All else is the same for both.
    (second / "run.lock").symlink_to(first / "run.lock")
    if file == "run.lock":
        (second / "run.lock").unlink()
    elif file == "checkpoints":
        shutil.copytree(
            workdir,
            (first, second)[seen_by],
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("run.lock"),
        )
    else:
        (second / "checkpoints").rmdir()
        (second / "checkpoints").symlink_to(first / "checkpoints")
        shutil.copy(workdir / file, (first, second)[seen_by])
    started = start("run", *flags, processes=2, folders=folders)
    outputs, codes = finish(started, timeout=120)
    if (file, seen_by) == ("reference_logps.npz", 1):
        # The first one has found none, so they compute it.
        assert codes == [0, 0], outputs
        return
    assert codes == [2, 2], outputs
    name = f"run/{file}" if file == "reference_logps.npz" else "run"
    told = f"{name}: is not the same for all processes of this run. Give them a folder"
    assert all(told in output for output in outputs), outputs
    assert not any("Traceback" in output for output in outputs), outputs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=localhost:1"], "give all three"),
        (["--num_processes=2", "--process_id=0"], "give all three"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id should be below --num_processes (2); got 2",
        ),
        (
            ["--coordinator=localhost", "--num_processes=2", "--process_id=0"],
            "--coordinator should be HOST:PORT; got 'localhost'",
        ),
    ],
)
def test_flags_that_name_no_group_of_processes_are_refused(flags, message, tmp_path):
    outputs, codes = finish(start(tmp_path / "run", *flags))
    assert codes == [2]
    assert message in outputs[0]
    assert not (tmp_path / "run").exists()
