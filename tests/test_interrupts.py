"""Signals: what they stop, and when."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from jax.experimental import multihost_utils

from jaxpref.interrupts import interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    def now():
        here = [signal.getsignal(number) for number in SIGNALS]
        wakes = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakes)
        return here, wakes, threading.active_count()

    # What is started in the background of a shell ignores it.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = now()
    yield
    assert now() == before
    signal.signal(signal.SIGINT, outside)


def never():
    raise AssertionError


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_at_once_until_there_is_something_to_save(number, capfd):
    left = threading.Event()
    with interrupts("saving", leave=left.set):
        signal.raise_signal(number)
        assert left.wait(10)
    assert capfd.readouterr().err == "\ninterrupted (once more to stop at once)\n"
    with interrupts("saving", leave=never) as interrupted:
        assert not interrupted()
        interrupted.save_from_now_on()
        signal.raise_signal(number)
        assert interrupted()
        assert interrupted()
    assert capfd.readouterr().err == "\ninterrupted: saving (once more to stop at once)\n"


def test_who_has_begun_to_leave_saves_nothing_any_more():
    leaving, may_end = threading.Event(), threading.Event()

    def leave():
        leaving.set()
        may_end.wait(10)

    with interrupts("saving", leave=leave) as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert leaving.wait(10)
        threading.Timer(0.2, may_end.set).start()
        interrupted.save_from_now_on()
        assert may_end.is_set()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_leaving_thread_did_not_hear_is_not_lost(number, capfd):
    """It may come too late for it, or something else may ask for the numbers of signals."""
    left = threading.Event()
    with interrupts("saving", leave=left.set):
        signal.set_wakeup_fd(-1)
        signal.raise_signal(number)
        assert capfd.readouterr().err == "\ninterrupted (once more to stop at once)\n"
        assert not left.is_set()
    assert left.is_set()


def test_a_signal_at_the_end_is_not_lost():
    for _ in range(20):
        left = threading.Event()
        with interrupts("saving", leave=left.set):
            signal.raise_signal(signal.SIGINT)
        assert left.is_set()


def test_an_error_is_told_rather_than_a_signal_at_the_end():
    def fail():
        signal.set_wakeup_fd(-1)
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), interrupts("saving", leave=never):
        fail()


def test_a_second_signal_acts_as_before():
    with interrupts("saving") as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_of_another_kind_stops_nothing():
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    left = threading.Event()
    try:
        with interrupts("saving", leave=left.set) as interrupted:
            signal.raise_signal(signal.SIGUSR1)
            assert not left.wait(0.5)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_processes_that_go_on_with_another_run_count_on(monkeypatch):
    """JAX may let all of them stop at a question that only the next run asks."""
    asked = []

    def ask(number):
        asked.append(number)
        return False

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", ask)
    for _ in range(2):
        with interrupts("saving", together=True) as interrupted:
            assert not any(interrupted() for _ in range(2))
    assert [number - asked[0] for number in asked] == [0, 1, 2, 3]


def test_another_thread_leaves_the_signals_alone():
    found = []

    def ask():
        with interrupts("saving", leave=never) as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(False, signal.default_int_handler)]


ROOT = Path(__file__).parent.parent

# Here and not in the tests' own process, in whose threads JAX works.
FORKS = """
import multiprocessing, os, signal, sys, threading, time, warnings
import jax
from jaxpref.interrupts import interrupts

warnings.simplefilter("ignore")
left = threading.Event()
together = len(sys.argv) > 1
if together:
    # JAX takes over SIGTERM.
    jax.distributed.initialize(sys.argv[1], 1, 0)
fork = multiprocessing.get_context("fork")
with interrupts("saving", together=together, leave=left.set) as interrupted:
    for seconds in [0] * 20 + [0.2]:
        child = fork.Process(target=time.sleep, args=(20,))
        child.start()
        time.sleep(seconds)
        child.terminate()
        child.join(5)
        print(child.exitcode, end=" ", flush=True)
    print(left.wait(0.5), signal.pthread_sigmask(signal.SIG_BLOCK, []))
    wakes = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakes)
    # Python does not know of a child that is forked in C, which keeps what it inherits.
    os.dup(wakes)
    interrupted.save_from_now_on()
"""


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize("together", [False, True])
def test_a_signal_to_a_forked_child_is_its_own(together):
    """It ends the child, at whatever time, and the parent neither leaves nor waits for a child."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    found = run(FORKS, *([address] if together else []))
    assert found.stdout == "-15 " * 21 + "False set()\n", found.stderr
    assert found.returncode == 0


LEAVES = """
import multiprocessing, sys, time
from pathlib import Path
from jaxpref import lock, processes
from jaxpref.processes import last_acts

def fail():
    raise RuntimeError

def hang():
    time.sleep(100)

act, closed = sys.argv[2:]
last_acts._TIDYING = 2
with lock.hold(Path(sys.argv[1])), processes.at_any_end(eval(act)):
    if closed:
        child = multiprocessing.get_context("spawn").Process()
        child.close()
        active = multiprocessing.active_children
        multiprocessing.active_children = lambda: [child, *active()]
    multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,)).start()
    processes.leave_unsaved()
"""


@pytest.mark.parametrize(
    ("act", "closed", "given_back"),
    [("fail", "", True), ("hang", "", False), ("str", "closed", True)],
)
def test_who_leaves_gives_the_workdir_back_and_takes_its_children_along(
    act, closed, given_back, tmp_path
):
    """Also if something else fails or hangs.

    A child that lives would keep the pipe open that is read here.
    """
    found = run(LEAVES, tmp_path, act, closed)
    assert found.returncode == 130
    assert "interrupted: there is nothing to save, since no step was done that" in found.stderr
    assert "since the start" not in found.stderr
    assert ((tmp_path / "run.lock").read_text() == "") == given_back
