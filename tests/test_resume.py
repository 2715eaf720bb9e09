"""A run that dies and is started again ends bit-identical, whatever it carries along.

In one process, which may die between any two updates; `test_cli.py` kills real processes.
"""

import numpy as np
import pytest
from test_train import assert_same_params, lines_of, small

from jaxpref import checkpoint, train
from jaxpref.train import layout

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


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.long] if c in LONG else []) for c in CASES]
)
def test_a_run_that_died_ends_as_if_it_had_not(case, tmp_path, monkeypatch):
    name, changes = CASES[case]
    # A rate at which every update shows.
    config = small(name, train__save_every=2, optimizer__learning_rate=1e-2, **changes)
    train.run(config, tmp_path / "whole")
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
            train.run(config, tmp_path / "died")
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
