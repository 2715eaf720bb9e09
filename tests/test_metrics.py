"""What a run's log makes of its measurements."""

import contextlib
import json

import numpy as np
import pytest

from jaxpref import metrics
from jaxpref.errors import UserError
from jaxpref.measurements import Mean, Metric


@pytest.mark.parametrize(
    ("norms", "epoch", "stops"),
    [
        ([0, 0, 0, 0, 1, 0, 0, 0], 8, None),
        ([1, 0, 0, 0, 0, 0, 0, 0], 2, None),
        ([0, 0, 0, 0, 0, 1, 1, 1], 5, 5),
        ([0, 0, 0, 1, 1, 1, 1, 1], 1, 3),
        ([0] * 8, 99, 8),
        ([0] * 101 + [1], 10**6, 100),
    ],
)
def test_a_few_steps_may_have_nothing_to_learn(norms, epoch, stops, tmp_path, capsys):
    with metrics.Writer(tmp_path, start=0, steps=len(norms)) as writer:
        log = metrics.Log(
            writer, every=10**6, steps=len(norms), patience=epoch, kept=lambda: "none"
        )
        with contextlib.ExitStack() as stack:
            if stops:
                message = f"step {stops}: the gradient was exactly zero everywhere in all {stops} s"
                stack.enter_context(pytest.raises(UserError, match=message))
            measure(log, [{"loss": (1.0, 1.0), "grad_norm": (norm, 1.0)} for norm in norms])
    assert ("The run stops if it goes on" in capsys.readouterr().out) == (norms[:4] == [0] * 4)


def measure(log, steps):
    """Hands the log what a run's steps measured."""
    nothing = np.zeros((1, 1, 1), np.int32)
    for number, measured in enumerate(steps, start=1):
        log.dispatching(number, nothing.shape, 0, 0)
        values = {"learning_rate": (0.1, 1.0), **measured}
        log.dispatched(number, {k: Metric(*map(np.float32, v)) for k, v in values.items()})
    log.settle()


def test_steps_without_weight_are_counted_and_change_no_mean(tmp_path, capsys):
    with metrics.Writer(tmp_path, start=0, steps=9) as writer:
        log = metrics.Log(writer, every=4, steps=9, patience=9, kept=lambda: "none")
        trained = {"loss": (6.0, 2.0), "grad_norm": (5.0, 1.0)}
        empty = {"loss": (0.0, 0.0), "grad_norm": (0.0, 0.0)}
        measure(log, [trained, empty, trained, empty, trained, trained, trained, trained])
    first, second, third = metrics.read(tmp_path / "metrics.jsonl")
    assert "skipped_steps" not in first
    assert (second["skipped_steps"], second["loss"], second["grad_norm"]) == (2, 3, 5)
    assert "skipped_steps" not in third
    assert "step 4: no example has a weight, so nothing is updated" in capsys.readouterr().out


def test_weighted_means_and_what_has_no_weight():
    mean = Mean()
    mean.add("a", 2.0, 1.0)
    mean.add("a", 9.0, 3.0)
    mean.add("b", 0.0, 0.0)
    assert mean.result() == {"a": 11 / 4}


def test_measurements_after_the_checkpoint_are_dropped_on_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [{"step": s, "loss": 1.0} for s in (0, 1, 2, 3)]
    path.write_text("".join(json.dumps(x) + "\n" for x in written) + '{"step": 4, "lo')
    with metrics.Writer(tmp_path, start=2, steps=9) as writer:
        writer.write(3, {"loss": 0.5})
    assert metrics.read(path) == [*written[:3], {"step": 3, "loss": 0.5}]
