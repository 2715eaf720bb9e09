"""Attention through seats is attention under the mask of all pairs, which never exists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_groups

from jaxpref import packing
from jaxpref.models import Decoder, make_rope
from jaxpref.models.attention import attention
from jaxpref.models.rotary import rotary_angles, rotate
from jaxpref.packing import Seats, Tree, sees

LENGTH, BLOCK = 64, 8


def causal(rows, length):
    """Seats of rows that are one sequence each."""
    order = jnp.arange(length)
    return Seats(order, jnp.broadcast_to(order, (rows, length)))


@pytest.fixture(scope="module")
def batch():
    packed = packing.pack(random_groups(0, 16, responses=3), row_length=LENGTH)
    assert packed.tokens.shape[0] > 1
    assert (packed.group == 0).any()
    return packed


def seats_of(batch):
    return Seats(
        jnp.arange(LENGTH), jnp.asarray(batch.positions), jax.tree.map(jnp.asarray, batch.tree)
    )


def draw(batch, heads=4, kv_heads=2):
    """Queries, keys and values in float64, and what to multiply the result with."""
    keys = jax.random.split(jax.random.key(4), 4)
    shapes = [(*batch.tokens.shape, n, 6) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(k, shape, "float64") for k, shape in zip(keys, shapes, strict=True)]


def under_mask(query, key, value, mask, soft_cap):
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("rqhd,rkhd->rhqk", query, key) / np.sqrt(query.shape[-1])
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, value)


@pytest.mark.parametrize(
    ("window", "soft_cap"),
    [
        (None, None),
        (3, 2.0),
        *(pytest.param(*x, marks=pytest.mark.long) for x in ((None, 2.0), (0, None), (3, None))),
    ],
)
def test_attention_by_seats_equals_attention_under_the_mask(batch, window, soft_cap, float64):
    """Values and gradients."""
    *inputs, factors = draw(batch)
    mask = np.array(packing.attention_mask(batch))
    if window:
        mask &= batch.positions[:, :, None] - batch.positions[:, None, :] < window
    bound = None if window is None else jnp.asarray(window)

    def by_seats(*inputs):
        found = attention(
            *inputs, seats_of(batch), window=bound, soft_cap=soft_cap, block_size=BLOCK
        )
        return (found * factors).sum(), found

    def by_mask(*inputs):
        found = under_mask(*inputs, mask, soft_cap)
        return (found * factors).sum(), found

    found, expected = (
        jax.jit(jax.grad(function, argnums=(0, 1, 2), has_aux=True))(*inputs)
        for function in (by_seats, by_mask)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_one_group_without_responses_is_a_row_without_a_tree():
    seats = causal(2, 9)
    tree = Tree(jnp.ones((2, 9), int), jnp.zeros((2, 9), int))
    with_tree = seats._replace(tree=tree)
    expected = np.broadcast_to(np.tril(np.ones((9, 9), bool)), (2, 9, 9))
    np.testing.assert_array_equal(sees(seats, seats), expected)
    np.testing.assert_array_equal(sees(with_tree, with_tree), expected)
    with pytest.raises(ValueError, match="both have a tree, or neither"):
        sees(seats, with_tree)


def largest(jaxpr):
    """The most entries of any array in a program, and in all programs inside it."""
    found = [np.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        inner = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
        found += [largest(x) for x in inner if hasattr(x, "eqns")]
    return max(found, default=0)


@pytest.mark.parametrize("windows", [(), (0, 5)])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_no_array_has_an_entry_for_every_pair_of_tokens(batch, windows, remat):
    """Forward and backward; with one block there is one, which shows that it would be found."""
    pairs = batch.tokens.shape[0] * LENGTH**2

    def largest_of(block, derive):
        config = dataclasses.replace(TINY, attention_block=block, windows=windows, remat=remat)
        model = Decoder(config)
        args = (batch.tokens, batch.positions, batch.tree)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), *args))

        def total(params):
            return model.apply(params, *args, method="hidden_states").sum()

        return largest(jax.make_jaxpr(derive(total))(params).jaxpr)

    for derive in (lambda f: f, jax.grad):
        assert largest_of(BLOCK, derive) < pairs <= largest_of(LENGTH, derive)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-9)])
def test_grouped_queries_equal_repeated_keys(dtype, tolerance, float64):
    keys = jax.random.split(jax.random.key(1), 3)
    query = jax.random.normal(keys[0], (2, 10, 4, 6), dtype)
    key, value = (jax.random.normal(k, (2, 10, 2, 6), dtype) for k in keys[1:])
    seats = causal(2, 10)
    grouped = attention(query, key, value, seats, block_size=4)
    repeated = attention(
        query, jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2), seats, block_size=16
    )
    assert grouped.dtype == dtype
    np.testing.assert_allclose(grouped, repeated, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_is_its_formula(soft_cap, dtype, tolerance, float64):
    """In float32, as jax.nn has it and as written out; in float64."""
    keys = jax.random.split(jax.random.key(2), 3)
    query, key, value = (jax.random.normal(k, (1, 5, 1, 4), dtype) for k in keys)
    q, k, v = (np.asarray(x[0, :, 0], np.float64) for x in (query, key, value))
    scores = q @ k.T / np.sqrt(4)
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    weights = np.tril(np.exp(scores))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    found = attention(query, key, value, causal(1, 5), soft_cap=soft_cap)[0, :, 0]
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_rotary_scores_depend_on_distance_alone(float64):
    keys = jax.random.split(jax.random.key(3), 2)
    query, key = (jax.random.normal(k, (1, 1, 1, 8)) for k in keys)

    def score(i, j):
        def turned(x, position):
            frequencies = jnp.asarray(make_rope(8).frequencies)
            return rotate(x, *rotary_angles(jnp.array([[position]]), frequencies))

        return (turned(query, i) * turned(key, j)).sum()

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-9)
    np.testing.assert_allclose(score(5, 5), (query * key).sum(), rtol=1e-9)
