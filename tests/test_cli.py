"""The command line as a user meets it, in processes of its own."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import assert_same_params, lines_of

ROOT = Path(__file__).parent.parent
SMALL = [
    "--config=configs/quickstart.py:sft",
    "--config.model.width=16",
    "--config.model.layers=1",
    "--config.data.synthetic_pairs=60",
    "--config.data.batch_size=8",
    "--config.train.steps=40",
    "--config.train.log_every=1",
    "--config.train.save_every=1",
]


def command(*flags):
    return [sys.executable, "-m", "jaxpref.main", *map(str, flags)]


# One device, so that the runs are those of a user.
ENVIRONMENT = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


def run(*flags, timeout=120):
    return subprocess.run(
        command(*flags),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*flags):
    return subprocess.Popen(
        command(*flags),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


QUICK = {
    "help": (["--help"], "Path of the recipe", 1),
    "no recipe": ([], "configs/dpo_hh.py", 2),
    "wrong flag": (["--confg=configs/dpo_hh.py"], "Did you mean: config", 2),
    "mistyped key": (
        ["--config=configs/dpo_hh.py:tiny", "--config.data.pth=x"],
        "the config has no key 'data.pth'. Did you mean 'data.path'?",
        2,
    ),
    "wrong type": (
        ["--config=configs/dpo_hh.py:tiny", "--config.data.batch_size=many"],
        "flag --config.data.batch_size=many",
        2,
    ),
    "no such recipe": (["--config=configs/dpoo.py", "--workdir=x"], "configs/dpo_hh.py", 2),
    "wrong argument": (
        ["--config=configs/dpo_hh.py:tinny", "--workdir=x"],
        "it should be one of paper, tiny. Did you mean 'tiny'?",
        2,
    ),
    "no workdir": (["--config=configs/quickstart.py"], "--workdir is missing", 2),
    "bad value": (
        ["--config=configs/quickstart.py", "--workdir=x", "--config.data.format=hhh"],
        "data.format is 'hhh'",
        2,
    ),
    "stray argument": (["--config=configs/quickstart.py", "run"], "unexpected arguments: run", 2),
}


@pytest.mark.parametrize("case", QUICK)
def test_answers_within_3_seconds_in_a_line_or_two(case):
    flags, message, code = QUICK[case]
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(*flags, timeout=60)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, which other tests may have in the meantime.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 3
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == code


def test_a_recipe_is_explained_also_to_a_reader_who_stops_early():
    command_line = " ".join(command("--config=configs/dpo.py", "--config.algorithm.beta=0.3"))
    for pipe, lines in (("", 100), (" | head -2", 2)):
        said = subprocess.run(
            f"{command_line} --explain{pipe}",
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stderr == ""
        assert len(said.stdout.splitlines()) >= lines
        assert ("--config.algorithm.beta=0.3   (default 0.1)" in said.stdout) == (not pipe)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    result = run(*SMALL, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.parametrize(
    "moment", ["while saving", pytest.param("between saves", marks=pytest.mark.long)]
)
@pytest.mark.process
def test_kill_9_then_the_same_command_ends_bit_identical(moment, uninterrupted, tmp_path):
    process = start(*SMALL, f"--workdir={tmp_path}")
    checkpoints = tmp_path / "checkpoints"

    def now():
        steps = [p.name for p in checkpoints.iterdir()] if checkpoints.exists() else []
        complete = [int(s) for s in steps if s.isdigit()]
        saving = any("saving" in s for s in steps)
        return max(complete, default=0) >= 5 and saving == (moment == "while saving")

    wait_for(now, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lines_of(tmp_path)[-1]["step"] < 40
    result = run(*SMALL, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "resuming after step" in result.stdout
    assert_same_params(tmp_path, uninterrupted)
    steps = [line["step"] for line in lines_of(tmp_path) if "loss" in line]
    assert steps == list(range(1, 41))
    ours, theirs = lines_of(tmp_path), lines_of(uninterrupted)
    np.testing.assert_array_equal(
        [x["loss"] for x in ours if "loss" in x], [x["loss"] for x in theirs if "loss" in x]
    )


@pytest.mark.long
def test_kill_9_before_the_first_checkpoint_of_a_run_with_a_reference(uninterrupted, tmp_path):
    """The half-made workdir is begun anew: the same reference, the same first measurements."""
    flags = [f.replace(":sft", ":dpo") for f in SMALL if "save_every" not in f and "steps" not in f]
    flags += [f"--config.model.init_from={uninterrupted}", "--config.train.steps=3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(*flags, f"--workdir={killed}")
    wait_for(lambda: (killed / "reference").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for workdir in (killed, whole):
        result = run(*flags, f"--workdir={workdir}")
        assert result.returncode == 0, result.stderr
    assert_same_params(killed, whole)
    assert [x["step"] for x in lines_of(killed)] == [x["step"] for x in lines_of(whole)]


@pytest.mark.parametrize(
    "which", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
@pytest.mark.process
def test_interrupt_saves_then_exits_and_the_same_command_resumes(which, uninterrupted, tmp_path):
    flags = [f for f in SMALL if "save_every" not in f]
    process = start(*flags, f"--workdir={tmp_path}")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(lines_of(tmp_path)) > 5, process)
    process.send_signal(which)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in output
    assert "Traceback" not in output
    result = run(*flags, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert_same_params(tmp_path, uninterrupted)


def test_errors_of_a_run_are_one_message_without_a_trace(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": 1}\n')
    result = run(
        "--config=configs/sft_hh.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'x.jsonl'}",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("jaxpref: ")
    assert "x.jsonl:1: no column 'chosen'" in result.stderr
    assert "Traceback" not in result.stderr


RECORDED = """
import sys
from absl import app
from jaxpref import main, recipes, train
train.run = lambda config, folder, **_: print(config.algorithm.name, folder, config.model.init_from)
app.run(main.main, argv=["main", *sys.argv[1:]], flags_parser=recipes.parse_flags)
"""


@pytest.mark.parametrize("given", [[], ["--config.model.init_from=A"]])
def test_what_a_recipe_begins_from_is_run_before_it(given):
    flags = ["--config=configs/rlhf_quickstart.py:ppo", "--workdir=W", *given]
    result = subprocess.run(
        [sys.executable, "-c", RECORDED, *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    began = "A" if given else "W/sft"
    made = [f"reward W/reward {began}", f"ppo W {began}"]
    assert result.stdout.split("\n")[:-1] == (made if given else ["sft W/sft ", *made])
