"""A run that dies and is started again ends bit-identical, whatever it carries along.

In one process, which may die between any two updates; `test_cli.py` kills real processes.
"""

import itertools
from contextlib import contextmanager
from unittest.mock import Mock

import numpy as np
import pytest
from test_train import assert_same_params, lines_of, small

from jaxpref import checkpoint, train
from jaxpref.interrupts import Interrupts
from jaxpref.train import layout, loop

pytestmark = pytest.mark.usefixtures("one_device")

# Every kind of data beside sft's, and every piece of state beside parameters and moments: means
# over the run, means over micro-batches, a reference that moves; computing in bfloat16.
CASES = {
    "mismatched": ("kto", {"data__rows": 2}),
    "unpaired, running mean": ("bco_unpaired", {}),
    "pairs, running mean": ("bco", {}),
    "mixture of losses": ("mpo", {}),
    "ranked": ("rrhf", {}),
    "ranked, with a reference": ("plackett_luce_dpo", {}),
    "a reference that moves": ("dpo", {"reference__mode": "synced", "reference__sync_every": 1}),
    "bfloat16": ("dpo", {"model__dtype": "bfloat16"}),
    "per token of the batch": ("cpo", {"algorithm__nll_per_token": True}),
}


class Death(BaseException):
    """What no `except` of the run catches."""


# Of the same kind of data or of state as others.
LONG = (
    "mismatched",
    "bfloat16",
    "a reference that moves",
    "pairs, running mean",
    "mixture of losses",
    "ranked",
    "ranked, with a reference",
    "per token of the batch",
)


def die_in_the_fourth_step(config, workdir, monkeypatch):
    """Trains until then, and leaves what a run leaves that is not told that it ends."""
    make_update = layout.make_update

    def mortal(*args, **options):
        update = make_update(*args, **options)

        def step(state, *inputs):
            if int(state.step) == 3:
                raise Death
            return update(state, *inputs)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(layout, "make_update", mortal)
        with pytest.raises(Death):
            train.run(config, workdir)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.long] if c in LONG else []) for c in CASES]
)
def test_a_run_that_died_ends_as_if_it_had_not(case, tmp_path, monkeypatch):
    name, changes = CASES[case]
    # A rate at which every update shows.
    config = small(name, train__save_every=2, optimizer__learning_rate=1e-2, **changes)
    train.run(config, tmp_path / "whole")
    die_in_the_fourth_step(config, tmp_path / "died", monkeypatch)
    assert checkpoint.latest_step(tmp_path / "died") == 2
    train.run(config, tmp_path / "died")
    assert_same_params(tmp_path / "died", tmp_path / "whole")
    ours, theirs = (
        [{k: v for k, v in line.items() if "perf" not in k} for line in lines_of(tmp_path / folder)]
        for folder in ("died", "whole")
    )
    assert ours == theirs
    losses = [line["loss"] for line in ours if "loss" in line]
    assert len(losses) == 4
    assert np.ptp(losses) > 1e-4


def stopping_after(asked):
    """In place of signals: the loop is told to stop when it has asked so often."""

    @contextmanager
    def interrupts(saying, **options):
        count = itertools.count(1)
        yield Mock(Interrupts, side_effect=lambda: next(count) >= asked)

    return interrupts


def measured(workdir):
    """All measurements but those of time, by step."""
    lines = [
        {k: v for k, v in line.items() if not k.startswith("perf/") and k != "time"}
        for line in lines_of(workdir)
    ]
    return {line["step"]: line for line in lines}


def test_a_signal_in_the_middle_of_an_evaluation_costs_only_that(tmp_path, monkeypatch):
    """It is repeated when the run goes on, which ends as if nothing had been."""
    options = {"train__eval_every": 2, "eval__max_examples": 12, "data__synthetic_pairs": 120}
    train.run(small(**options), tmp_path / "whole")
    workdir = tmp_path / "stopped"
    # Two batches before the first step, two steps, and one batch of the next evaluation.
    for asked, message, latest in (
        (2, "before the first step was done; the same command begins again", None),
        (6, "after step 2, which is saved; the same command resumes", 2),
        # The evaluation that was missed is not asked; two steps, and a batch of the last one.
        (4, "after step 4, which is saved; the same command resumes", 4),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "interrupts", stopping_after(asked))
            with pytest.raises(KeyboardInterrupt, match=f"interrupted {message}"):
                train.run(small(**options), workdir)
        assert checkpoint.latest_step(workdir) == latest
    train.run(small(**options), workdir)
    assert_same_params(workdir, tmp_path / "whole")
    assert measured(workdir) == measured(tmp_path / "whole")
