from collections import Counter

import jax
import numpy as np
import pytest
from conftest import random_groups

from jaxpref import packing
from jaxpref.data import BatchStream, TokenizedDataset
from jaxpref.packing import Budget, Shape


def dataset(count=23, responses=2, **fields):
    groups = random_groups(0, count, responses)
    pieces = [piece for g in groups for piece in (g.prompt, *g.responses)]
    return TokenizedDataset(
        tokens=np.concatenate(pieces),
        piece_offsets=np.cumsum([0, *map(len, pieces)]),
        example_offsets=np.arange(count + 1) * (1 + responses),
        true_rewards=None,
        counts=Counter(),
        uncut=np.asarray([len(piece) for piece in pieces]),
        prompts=np.arange(count),
        **fields,
    )


def stream(data, **changes):
    settings = {"batch_size": 8, "budget": Budget(24, 18), "seed": 3, **changes}
    return BatchStream(data, **settings)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_batch_depends_on_seed_and_step_alone():
    data = dataset()
    in_order = list(stream(data).batches(0, 9))
    for step in (7, 0, 3):
        assert_same(stream(data).batch(step), in_order[step])
    for batch, expected in zip(stream(data).batches(4, 9), in_order[4:], strict=True):
        assert_same(batch, expected)
    assert stream(data, seed=4).indices(0) != stream(data).indices(0)


def test_every_epoch_is_another_permutation():
    data = dataset()
    order = [i for step in range(23) for i in stream(data).indices(step)]
    epochs = [order[i : i + 23] for i in range(0, 8 * 23, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_packing_changes_shape_but_not_the_groups_of_a_step():
    data = dataset()
    tree, padded = (
        stream(data, planner=p).batch(2) for p in (packing.plan_tree, packing.plan_padded)
    )
    assert tree.tokens.shape != padded.tokens.shape
    np.testing.assert_array_equal(tree.lengths, padded.lengths)


def test_micro_batches_are_the_batch_in_parts_of_one_shape():
    data = dataset()
    extras = {"scores": np.arange(46.0).reshape(23, 2)}
    whole = stream(data, extras=extras).batch(1)
    parts = stream(data, extras=extras, shape=Shape(2, 6)).batch(1)
    assert parts.tokens.shape == (6, 2, 24)
    assert parts.lengths.any(axis=(1, 2)).sum() == 2
    np.testing.assert_array_equal(parts.lengths.sum(0), whole.lengths[0])
    for scores in parts.extras["scores"]:
        np.testing.assert_array_equal(scores, whole.extras["scores"][0])
    np.testing.assert_array_equal(
        whole.extras["scores"][0], extras["scores"][stream(data).indices(1)]
    )


def test_all_batches_of_a_data_set_have_one_shape():
    """So that a step compiles once; as batches with as many rows as they need do not."""
    data = dataset(200)
    settings = {"batch_size": 8, "budget": Budget(24, 18)}
    shape = packing.fixed_shape(data.prompt_lengths, data.response_lengths, **settings, rows=2)
    cut, whole = stream(data, shape=shape), stream(data)

    def shapes(made):
        batches = [*made.once(), *(made.batch(step) for step in range(50))]
        return {batch.tokens.shape for batch in batches}

    assert shapes(cut) == {(*shape[::-1], 24)}
    assert len(shapes(whole)) > 2


@pytest.mark.parametrize("shape", [None, Shape(2, 6)])
def test_once_gives_every_example_in_order_and_absent_groups_at_the_end(shape):
    data = dataset()
    batches = list(stream(data, shape=shape).once())
    lengths = np.concatenate([b.lengths.sum(0) for b in batches])
    assert lengths.shape == (24, 2)
    np.testing.assert_array_equal(lengths[:23], data.response_lengths)
    np.testing.assert_array_equal(lengths[23:], 0)


def test_values_of_the_data_set_come_with_its_groups():
    labels = np.arange(23, dtype=np.float32)
    data = dataset(extras={"labels": labels})
    made = stream(data, extras={"scores": labels[:, None]})
    batch = made.batch(1)
    np.testing.assert_array_equal(batch.extras["labels"][0], labels[made.indices(1)])
    assert batch.extras.keys() == {"labels", "scores"}
    *_, last = made.once()
    np.testing.assert_array_equal(last.extras["labels"][0], [*labels[16:], 0])


def mixed():
    sources = {"few": np.arange(0, 23, 4), "many": np.flatnonzero(np.arange(23) % 4)}
    return dataset(sources=sources), sources


def test_sources_are_mixed_by_weight_each_in_epochs_of_its_own():
    data, sources = mixed()
    made = stream(data, weights={"few": 3.0, "many": 1.0})
    order = np.concatenate([made.indices(step) for step in range(50)])
    few = order[np.isin(order, sources["few"])]
    assert len(few) == 300
    epochs = few.reshape(50, 6)
    assert (np.sort(epochs) == sources["few"]).all()
    assert len({tuple(epoch) for epoch in epochs}) > 40
    many = order[~np.isin(order, sources["few"])][: 5 * 17].reshape(5, 17)
    assert (np.sort(many) == sources["many"]).all()


def test_a_mixed_batch_depends_on_seed_and_step_alone():
    data, _ = mixed()
    options = {"weights": {"few": 1.0, "many": 2.0}}
    in_order = list(stream(data, **options).batches(0, 6))
    assert_same(stream(data, **options).batch(5), in_order[5])
    for batch, expected in zip(stream(data, **options).batches(3, 6), in_order[3:], strict=True):
        assert_same(batch, expected)
    assert stream(data, seed=4, **options).indices(0) != stream(data, **options).indices(0)
    # The last seed there is; that of the second source begins again.
    assert len(stream(data, seed=2**32 - 1, **options).indices(0)) == 8
