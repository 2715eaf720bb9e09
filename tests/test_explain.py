"""What is declared of knobs and methods reaches the reader, whole and as it is."""

from pathlib import Path

import pytest

from jaxpref import config as config_lib, explain
from jaxpref.knobs import KNOBS, Knob
from jaxpref.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_knob_is_explained_with_its_value(name):
    config = config_lib.default(name)
    config.train.log_every = 7
    said = explain.explain(config)
    for key, knob in config_lib.knobs_of(name).items():
        assert f"\n--config.{key}=" in said
        assert knob.meaning.split()[-1] in said
    assert "--config.train.log_every=7   (default 10)" in said
    assert said.count("(default") == 1


@pytest.mark.parametrize("name", sorted(explain.pages()))
def test_the_pages_say_what_is_declared(name):
    """`make docs` renews them."""
    assert (DOCS / name).read_text() == explain.pages()[name]


def test_a_meaning_is_a_phrase_that_stands_alone():
    every = {**KNOBS, **{f"{m}.{k}": knob for m in METHODS for k, knob in METHODS[m].knobs.items()}}
    for key, knob in every.items():
        assert len(knob.meaning.split()) >= 3, key
        assert knob.meaning.count("(") == knob.meaning.count(")"), key


@pytest.mark.parametrize(
    ("knob", "bounds", "refused"),
    [
        (Knob(1, "", at_least=0), "at least 0", [-1]),
        (Knob(1, "", above=0), "above 0", [-1, 0]),
        (Knob(1, "", at_most=2), "at most 2", [3]),
        (Knob(1, "", below=2), "below 2", [2, 3]),
        (Knob(1, "", at_least=0, at_most=2), "from 0 to 2", [-1, 3]),
        (Knob(1, "", at_least=0, below=2), "from 0 to below 2", [-1, 2, 3]),
        (Knob(1, "", above=0, at_most=2), "above 0 and at most 2", [-1, 0, 3]),
        (Knob(1, "", above=0, below=2), "above 0 and below 2", [-1, 0, 2, 3]),
        (Knob(1, ""), "", []),
    ],
)
def test_bounds_are_said_and_kept(knob, bounds, refused):
    assert knob.bounds == bounds
    found = {value: knob.refusal("k", value) for value in (-1, 0, 1, 2, 3)}
    assert [value for value, message in found.items() if message] == refused
    assert {found[value] for value in refused} == {
        f"k should be {bounds}; got {v}." for v in refused
    }
    # A NaN is within no bounds.
    assert bool(knob.refusal("k", float("nan"))) == bool(bounds)
