"""Signals: what they stop, and when."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxpref.interrupts import interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    def now():
        here = [signal.getsignal(number) for number in SIGNALS]
        wakes = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakes)
        return here, wakes, threading.active_count()

    before = now()
    yield
    assert now() == before


def never():
    raise AssertionError


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_at_once_until_there_is_something_to_save(number, capfd):
    left = threading.Event()
    with interrupts("saving", leave=left.set):
        signal.raise_signal(number)
        assert left.wait(10)
    assert capfd.readouterr().err == ""
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


def test_a_second_signal_acts_as_before():
    with interrupts("saving") as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_of_another_kind_stops_nothing():
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with interrupts("saving", leave=never) as interrupted:
            signal.raise_signal(signal.SIGUSR1)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_leaves_the_signals_alone():
    found = []

    def ask():
        with interrupts("saving", leave=never) as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(False, signal.default_int_handler)]


LEAVES = """
import multiprocessing, sys, time
from pathlib import Path
from jaxpref import lock, processes

with lock.hold(Path(sys.argv[1])):
    multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,)).start()
    processes.leave_unsaved()
"""


def test_who_leaves_gives_the_workdir_back_and_takes_its_children_along(tmp_path):
    """A child that lives would keep the pipe open that is read here."""
    command = [sys.executable, "-c", LEAVES, str(tmp_path)]
    root = Path(__file__).parent.parent
    found = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 130
    assert "interrupted: no step was done since the start" in found.stderr
    assert (tmp_path / "run.lock").read_text() == ""
