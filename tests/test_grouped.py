"""Products in which each run of rows has a weight of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models.grouped import grouped_product
from jaxpref.plan.hlo import Program

# Rows of each group: blocks that are full, begun or empty, groups without rows at both ends, one
# row in all, a group with all of them, and a last block that is not full by far; no rows.
SIZES = [
    (128, 256, 128),
    (0, 300, 1, 0, 211, 0),
    (129, 127, 3, 130, 500, 7, 0, 260),
    (1,),
    (0, 0, 5, 0),
    (0, 1500),
    (300, 5),
    (0, 0),
]


def given(sizes, inputs=3, outputs=5, dtype=float):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((sum(sizes), inputs), (len(sizes), inputs, outputs), (sum(sizes), outputs))
    rows, weights, along = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return rows, weights, jnp.asarray(sizes), along


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_meets_the_weight_of_its_group(sizes, float64):
    rows, weights, counts, along = given(sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)

    def one_by_one(rows, weights):
        return jnp.einsum("mk,mkn->mn", rows, weights[group])

    out, gradients = jax.vjp(lambda *x: grouped_product(*x, counts), rows, weights)
    expected, theirs = jax.vjp(one_by_one, rows, weights)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    for ours, other in zip(gradients(along), theirs(along), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-12)


def test_gradients_of_weights_are_summed_in_float32():
    """In bfloat16 a sum of 1,024 ones ends at 256."""
    sizes = (1024, 0, 3)
    rows, weights, counts, along = given(sizes, dtype=jnp.bfloat16)
    _, gradients = jax.vjp(lambda w: grouped_product(rows * 0 + 1, w, counts), weights)
    (found,) = gradients(along * 0 + 1)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[:, 0, 0], sizes)


def test_no_row_is_computed_for_other_groups():
    """Of 16 groups: with every row for every group it would be 16 times as much."""
    rows, weights, counts, along = given((128,) * 16, 32, 32, jnp.float32)
    gradient = jax.grad(lambda r, w: (grouped_product(r, w, counts) * along).sum(), argnums=(0, 1))
    program = Program(jax.jit(gradient).lower(rows, weights).compile().as_text())
    needed = 2 * 2 * len(rows) * 32 * 32
    assert needed <= program.operations() <= 2.1 * needed
