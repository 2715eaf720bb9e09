"""Tables of the vocabulary on a mesh: the same numbers, and no device ever holds a whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxpref import logprobs, sharding
from jaxpref.logprobs import LMHead
from jaxpref.models.vocabulary import look_up
from jaxpref.plan.hlo import Program

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
# Entries, width, positions; of the second nothing divides any axis of a mesh.
SIZES = [(48, 16, (4, 6)), (51, 15, (3, 5))]
READ = (logprobs.token_logprobs_and_entropy, logprobs.token_logprobs_and_collision)


def mesh_of(sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def arrays_of(entries, width, positions):
    """A head with all its parts, hidden states, and targets, one of which is no token."""
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(entries, width)), rng.normal(size=entries)
    targets = rng.integers(entries, size=positions)
    targets[0, 0] = -100
    hidden = rng.normal(size=(*positions, width))
    return tuple(map(jnp.asarray, (hidden, kernel, bias, targets)))


def values_and_gradients(entries, width, positions):
    hidden, kernel, bias, targets = arrays_of(entries, width, positions)

    def read(hidden, kernel, bias):
        split = sharding.table_split(kernel.shape)
        head = LMHead(kernel, bias, soft_cap=3.0, temperature=0.7, split=split)
        (logps, entropy), (_, collision) = (f(hidden, head, targets, block_size=7) for f in READ)
        weights = jnp.arange(logps.size, dtype=logps.dtype).reshape(logps.shape)
        counted = jnp.where(targets >= 0, logps, 0)
        return (weights * (counted + 2 * entropy)).sum(), (logps, entropy, collision)

    gradient = jax.jit(jax.grad(read, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.leaves(jax.device_get(gradient(hidden, kernel, bias)))


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_log_probs_and_gradients_are_those_of_one_device(shape, float64):
    expected = values_and_gradients(*shape)
    assert np.isnan(expected[3][0, 0])
    for sizes in MESHES:
        with sharding.use(mesh_of(sizes)):
            found = values_and_gradients(*shape)
        for here, there in zip(found, expected, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-11, atol=1e-11, err_msg=str(sizes))


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_embeddings_and_gradients_are_those_of_one_device(shape, float64):
    entries, width, positions = shape
    table = jnp.asarray(np.random.default_rng(1).normal(size=(entries, width)))
    tokens = jnp.asarray(np.random.default_rng(2).integers(entries, size=positions))
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(*positions, width)))

    def value_and_gradient():
        def read(table):
            found = look_up(table, tokens)
            return (weights * found**2).sum(), found

        gradient, found = jax.jit(jax.grad(read, has_aux=True))(table)
        outside = jax.jit(look_up)(table, tokens.at[0, 0].set(entries))
        return [np.asarray(x) for x in (gradient, found, outside)]

    expected = value_and_gradient()
    assert np.isnan(expected[2][0, 0]).all()
    assert not np.isnan(expected[2][1:]).any()
    for sizes in MESHES:
        with sharding.use(mesh_of(sizes)):
            found = value_and_gradient()
        for here, there in zip(found, expected, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-12, atol=1e-12, err_msg=str(sizes))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_no_device_holds_a_whole_table(sizes):
    """Of a table with more entries than positions, blocks are what is gathered and reduced."""
    entries, width, block, positions = 4096, 32, 128, (8, 4)
    mesh = mesh_of(sizes)

    def loss(table, tokens):
        hidden = look_up(table, tokens)
        head = LMHead(table, split=sharding.table_split(table.shape))
        return logprobs.token_logprobs(hidden, head, tokens, block_size=block).sum()

    with sharding.use(mesh):
        split = sharding.table_split((entries, width))
        table, tokens = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((entries, width), jnp.float32, split.table),
                (positions, jnp.int32, split.rows),
            )
        )
        compiled = jax.jit(jax.grad(loss)).lower(table, tokens).compile()
    data, fsdp, tensor = sizes
    # All that is larger than a block is the gradient's sum over devices with the same part of it.
    exchanged = Program(compiled.as_text()).collectives()
    large = [x for x in exchanged if x.devices > 1 and x.size > 4 * block * width]
    assert all(x.kind == "all-reduce" and x.devices == data for x in large)
    # The table is used twice, since the head is tied.
    of_device = 4 * entries * width // (fsdp * tensor)
    assert sum(x.size for x in large) <= 2 * of_device * (data > 1)
    of_blocks = [x for x in exchanged if x.times > 1]
    blocks = entries // tensor // block
    assert {x.times for x in of_blocks} == {blocks}
    gathered = [x for x in of_blocks if x.kind == "all-gather"]
    assert sum(x.size * x.times for x in gathered) == 2 * 4 * entries // tensor * width
    # Nothing else moves inside the loops but the gradient, once.
    moved = sum(x.received for x in of_blocks if x.kind != "all-gather")
    assert moved <= 2 * 4 * entries // tensor * width
