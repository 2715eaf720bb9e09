"""Products on a mesh: equal to those of one device, and what devices exchange for them."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxpref import collectives, models, sharding
from jaxpref.models import Decoder
from jaxpref.models.experts import mix_experts
from jaxpref.models.linear import Weight, multiply, on_own_rows
from jaxpref.plan.hlo import Program

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def mesh_of(sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


# Axes, sizes, and how many of them are summed over: into heads and out of them, with axes that no
# mesh divides, and a factor of an adapter.
WEIGHTS = [
    (("width", "heads", "head_dim"), (16, 8, 2), 1),
    (("heads", "head_dim", "width"), (8, 2, 16), 2),
    (("width", "kv_heads", "head_dim"), (16, 3, 2), 1),
    (("feed_forward", "width"), (24, 12), 1),
    (("feed_forward", "rank"), (24, 4), 1),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_products_and_gradients_are_those_of_one_device(weight, float64):
    axes, sizes, inputs = weight
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, int(np.prod(sizes[:inputs])))))
    w = jnp.asarray(rng.normal(size=sizes))

    def of_both(x, w):
        out = multiply(x, Weight(w, axes), inputs)
        return (out**3).sum(), out

    # Traced anew for each mesh.
    expected = jax.jit(jax.value_and_grad(of_both, (0, 1), has_aux=True))(x, w)
    np.testing.assert_allclose(expected[0][1], x @ w.reshape(x.shape[1], -1), rtol=1e-12)
    for mesh in MESHES:
        with sharding.use(mesh_of(mesh)):
            found = jax.jit(jax.value_and_grad(partial(of_both), (0, 1), has_aux=True))(x, w)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), found, expected)


def test_experts_and_gradients_are_those_of_one_device(float64):
    tokens, width, inner, experts = 32, 16, 24, 4
    rng = np.random.default_rng(0)
    shapes = {"x": (tokens, width), "router": (width, experts), "gate": (experts, width, inner)}
    shapes |= {"up": (experts, width, inner), "down": (experts, inner, width)}
    given = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    mix = partial(mix_experts, per_token=2, normalize=True, activation=jax.nn.silu)
    into = ("experts", "width", "feed_forward")

    def loss(given):
        weights = [Weight(given["gate"], into), Weight(given["up"], into)]
        weights.append(Weight(given["down"], ("experts", "feed_forward", "width")))
        rows = (given["x"], given["x"] @ given["router"])
        along = {"given": ("width", "experts"), "made": "width", "summed": "feed_forward"}
        out = on_own_rows(mix, rows, weights, **along)
        return (out**2).sum(), out

    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    for mesh in MESHES:
        with sharding.use(mesh_of(mesh)):
            found = jax.jit(jax.value_and_grad(partial(loss), has_aux=True))(given)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected)


def test_a_product_has_a_derivative_forward():
    """Where nothing is scattered line by line, as on CPUs."""
    weight, x = jnp.ones((16, 8, 2)), jnp.arange(256.0).reshape(16, 16)
    with sharding.use(mesh_of((1, 8, 1))):
        product = jax.jit(lambda w: multiply(x, Weight(w, ("width", "heads", "head_dim"))))
        _, along = jax.jvp(product, (weight,), (weight,))
    np.testing.assert_allclose(along, x @ weight.reshape(16, 16))


@pytest.mark.parametrize("lines", [(8,), (2, 4), (4, 2), (2, 2, 2)], ids=str)
def test_what_is_scattered_line_by_line_is_the_sum(lines):
    """Numbers that are whole, so that every order of summing gives the same."""
    x = np.random.default_rng(0).integers(100, size=(8, 3, 16)).astype(np.float32)
    mesh = mesh_of((1, 8, 1))
    scatter = partial(collectives.scatter, name="fsdp", axis=1)
    with sharding.use(mesh), collectives.lines({"fsdp": lines}):
        mapped = jax.shard_map(
            lambda x: scatter(x[0]), in_specs=P("fsdp"), out_specs=P(None, "fsdp")
        )
        np.testing.assert_array_equal(jax.jit(mapped)(x), x.sum(axis=0))


SCATTER = """
import sys
from jaxpref.plan import machines
machines.prepare(sys.argv[1])
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxpref import collectives, sharding
from jaxpref.plan.hlo import Program

devices, _ = machines.devices_of(sys.argv[1])
data, fsdp, width = map(int, sys.argv[2:])
mesh = sharding.make_mesh(data, fsdp, -1, devices=devices)
x = jax.ShapeDtypeStruct((14_336, width), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
with sharding.use(mesh):
    mapped = jax.shard_map(
        lambda x: collectives.scatter(2 * x, "fsdp", 1),
        in_specs=P(), out_specs=P(None, "fsdp"), check_vma=False,
    )
    program = jax.jit(mapped).lower(x).compile()
print({found.kind for found in Program(program.as_text()).collectives()})
"""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jaxpref[tpu]")
@pytest.mark.parametrize(
    "case",
    ["v5p:2x2x4 1 4 2560", "v5p:4x4x4 2 32 4096", "v6e:8x8 2 32 4096", "v5e:4x4 2 8 5120"],
)
def test_tpus_scatter_what_is_not_of_whole_tiles(case):
    command = [sys.executable, "-c", SCATTER, *case.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reduce-scatter" in done.stdout
    assert "all-reduce" not in done.stdout


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 2, 4), (16, 16)], ids=str)
def test_lines_are_those_of_the_machine(sizes):
    places = list(itertools.product(*(range(size) for size in sizes)))
    assert collectives.lines_of(places) == sizes
    # Those of a part.
    assert collectives.lines_of(places[: sizes[-1]]) == (sizes[-1],)
    # Neighbours in another order are one line: a ring, or any.
    for other in ([(0, 0), (1, 0), (1, 1), (0, 1)], [(0, 0), (1, 1), (0, 1), (1, 0)]):
        assert collectives.lines_of(other) == (4,)
    # Two cores of each chip are lines, too.
    cores = [(*place, core) for place in places for core in range(2)]
    assert collectives.lines_of(cores) == (*sizes, 2)
    assert collectives.lines_of([(3, 2)]) == ()


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_weights_are_gathered_twice_and_gradients_scattered(sizes, remat):
    """The textbook of fully sharded training, and nothing else of their size."""
    shape = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "feed_forward": 256}
    model = Decoder(dataclasses.replace(TINY, **shape, layers=3, remat=remat))
    mesh = mesh_of(sizes)
    data, fsdp, tensor = sizes

    def loss(params, tokens):
        hidden = model.apply({"params": params}, tokens, method="hidden_states")
        return jnp.square(hidden.astype(jnp.float32)).sum()

    boxed = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0), boxed=True))
    places = sharding.shardings(mesh, boxed)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    by_row = NamedSharding(mesh, P(("data", "fsdp")))
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=by_row)
    with sharding.use(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=places).lower(params, tokens).compile()
    found = Program(program.as_text()).collectives()
    of_weights = [x for x in found if x.devices > 1 and x.loops]
    moved = Counter()
    for x in of_weights:
        moved[x.kind] += x.size * x.times
    weights = sum(
        4 * x.size // tensor for x in jax.tree.leaves(shapes["layers"]) if x.size > 3 * 64
    )
    assert moved["all-gather"] == 2 * weights
    assert moved["reduce-scatter"] == weights
    # The parts of gradients are summed over copies, and activations over the parts of products.
    sums = Counter()
    for x in of_weights:
        if x.kind == "all-reduce" and x.size > 2 * 4 * 64:
            sums["copies" if "transpose" in x.source and x.devices == data else "parts"] += (
                x.size * x.times
            )
    assert sums["copies"] == (data > 1) * weights // fsdp
    # A layer has two products whose parts are summed, and the gradients of five. Only where
    # nothing is kept attention's is summed again.
    activations = 4 * 64 * 8 * 4 // (data * fsdp) * model.config.layers
    assert sums["parts"] == (tensor > 1) * (8 if remat == "full" else 7) * activations
    # Nothing of the weights is kept, neither whole nor in parts: what there is are one layer's,
    # their gradients, and activations.
    one = weights * tensor // model.config.layers
    assert program.memory_analysis().temp_size_in_bytes < 2 * one
