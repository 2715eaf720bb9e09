"""The bandits of `jaxpref.bandits`: optimality gaps over many seeds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array

from jaxpref import bandits
from jaxpref.experiments.points import Job, Label, Point, check_counts, shown

# Seeds that run side by side; more no longer help.
_LINEAR_AT_ONCE, _NEURAL_AT_ONCE = 100, 4


def jobs(*, seeds: int, extra: Sequence[int], extra_seeds: int, seed: int = 0) -> list[Job]:
    """The two linear settings, and the neural one with different numbers of further states.

    Args:
      seeds: data sets of each setting.
      extra: numbers of further states of RMB-PO+ in the neural setting; the first one is the
        study's own, with `seeds` data sets, the others have `extra_seeds`.
      extra_seeds: see there.
      seed: of all random numbers.

    Raises:
      UserError: a number is below 1.
    """
    check_counts(seeds=seeds, extra=extra, extra_seeds=extra_seeds)
    made = [
        _job(
            {"setting": "linear", "features": "matched" if matched else "mismatched"},
            seeds,
            seed,
            partial(bandits.linear_study, matched=matched),
            _LINEAR_AT_ONCE,
        )
        for matched in (True, False)
    ]
    for number, states in enumerate(extra):
        count = extra_seeds if number else seeds
        study = partial(bandits.neural_study, extra=states)
        labels: dict[str, Label] = {"setting": "neural", "further states": states}
        made.append(_job(labels, count, seed, study, _NEURAL_AT_ONCE))
    return made


def _job(
    labels: Mapping[str, Label],
    seeds: int,
    seed: int,
    study: Callable[[Array], dict[str, Array]],
    at_once: int,
) -> Job:
    def points() -> list[Point]:
        # In float32 Adam makes steps of what is zero but for rounding.
        with jax.enable_x64(True):
            keys = jax.random.split(jax.random.key(seed), seeds)
            gaps = jax.jit(lambda keys: jax.lax.map(study, keys, batch_size=at_once))(keys)
            gaps = jax.tree.map(np.asarray, gaps)
        return [Point({**labels, "method": method}, {"gap": gap}) for method, gap in gaps.items()]

    return Job(f"bandits, {shown(labels)}", {**labels, "seeds": seeds, "seed": seed}, points)
