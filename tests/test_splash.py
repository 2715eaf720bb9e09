"""The kernel for TPUs, interpreted: who sees whom, and the numbers of the blockwise path."""

import dataclasses
import importlib.util
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from jaxpref import config as config_lib, models, packing, sharding
from jaxpref.errors import UserError
from jaxpref.models import Decoder
from jaxpref.models.attention import attention
from jaxpref.models.splash import _Numbers, _Visible, refusal, splash_attention
from jaxpref.packing import Alignment, Budget, Group, Seats, Tree

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def groups_of(rng, tokens, longest):
    """Pairs, triples and single responses, of `tokens` tokens in all at least."""
    groups, made = [], 0
    while made < tokens:
        sizes = rng.integers(3, longest, size=1 + rng.integers(1, 4))
        made += sizes.sum()
        prompt, *responses = (np.ones(size, np.int32) for size in sizes)
        groups.append(Group(prompt, responses))
    return groups


def rows_of(length, rows, seed=0):
    """Packed rows, aligned as the kernel needs them; as many as there are of them at least."""
    rng = np.random.default_rng(seed)
    groups = groups_of(rng, length * rows * 3 // 4, length // 8)
    budget = Budget(length, length, aligned=Alignment.of(length))
    batch = packing.materialise(packing.plan(groups, budget), groups, budget)
    return jax.tree.map(lambda x: jnp.asarray(x[:rows]), batch)


def arrays_of(rows, length, heads=HEADS, kv_heads=KV_HEADS, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = [(rows, length, count, HEAD_DIM) for count in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def compare(batch, **options):
    """Outputs of tokens that are no padding, and all gradients, agree."""
    rows, length = batch.tokens.shape
    query, key, value, weights = arrays_of(rows, length)
    seats = Seats(jnp.arange(length), batch.positions, batch.tree)
    weights = weights * (batch.group > 0)[:, :, None, None]

    def read(function, *inputs):
        out = function(*inputs, seats, **options)
        return (out * weights).sum(), out

    splash = partial(splash_attention, interpret=True)
    found, expected = (
        jax.jit(jax.grad(partial(read, function), argnums=(0, 1, 2), has_aux=True))(
            query, key, value
        )
        for function in (splash, attention)
    )
    real = np.asarray(batch.group > 0)
    np.testing.assert_allclose(found[1][real], expected[1][real], rtol=1e-5, atol=1e-5)
    for here, there in zip(found[0], expected[0], strict=True):
        largest = np.abs(there).max()
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 9}, {"soft_cap": 5.0, "scale": 0.2}],
    ids=["plain", "window", "soft cap"],
)
def test_outputs_and_gradients_are_those_of_the_blockwise_path(options):
    compare(rows_of(200, 2), **options)


@pytest.mark.parametrize("length", [1536, pytest.param(4096, marks=pytest.mark.long)])
def test_several_blocks_are_passed_over_where_nobody_sees_them(length):
    compare(rows_of(length, 1), window=0)


def test_a_row_of_one_sequence():
    batch = rows_of(200, 2)
    query, key, value, _ = arrays_of(2, 200)
    seats = Seats(jnp.arange(200), batch.positions)
    found = splash_attention(query, key, value, seats, interpret=True)
    np.testing.assert_allclose(found, attention(query, key, value, seats), rtol=1e-5, atol=1e-5)


def test_layers_with_different_windows_share_a_program():
    batch = rows_of(200, 1)
    query, key, value, _ = arrays_of(1, 200)
    seats = Seats(jnp.arange(200), batch.positions, batch.tree)
    call = jax.jit(partial(splash_attention, windows=(0, 9), interpret=True))
    real = np.asarray(batch.group > 0)
    for window in (0, 9):
        found = call(query, key, value, seats, window=jnp.int32(window))
        expected = attention(query, key, value, seats, window=window)
        np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_on_a_mesh_each_device_has_its_rows_and_heads(kv_heads):
    batch = rows_of(200, 4)
    query, key, value, _ = arrays_of(4, 200, kv_heads=kv_heads)
    seats = Seats(jnp.arange(200), batch.positions, batch.tree)
    real = np.asarray(batch.group > 0)
    expected = attention(query, key, value, seats)
    with sharding.use(sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        found = jax.jit(partial(splash_attention, interpret=True))(query, key, value, seats)
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [7, 128, 1000, 1024, 2048, 4096, 8192, 16_384, 32_768])
def test_the_numbers_of_a_query_fit_into_one(length):
    aligned, visible = Alignment.of(length), _Visible(length, 0)
    assert aligned.prompt % aligned.response == 0
    rng = np.random.default_rng(length)
    place = rng.integers(length, size=100)
    place[0] = length - 1
    start = place // aligned.response * aligned.response
    end = np.minimum(rng.integers(length, size=100), start) // aligned.prompt * aligned.prompt
    numbers = _Numbers(*(jnp.asarray(x, jnp.int32) for x in (place, end, start)))
    found = visible.unpacked(visible.packed(numbers))
    for here, there in zip(found, numbers, strict=True):
        np.testing.assert_array_equal(here, there)


def test_rows_that_need_no_alignment_have_none():
    assert Alignment.of(1024) == (1, 1)
    assert Alignment.of(4096) == (16, 1)
    assert Alignment.of(32_768) == (128, 64)
    with pytest.raises(ValueError, match="at most 32768"):
        Alignment.of(32_769)


@pytest.mark.parametrize("aligned", [(1, 1), (16, 1), (128, 64)], ids=str)
def test_packed_rows_are_aligned_and_say_so(aligned):
    rng = np.random.default_rng(0)
    groups = groups_of(rng, 12_000, 400)
    budget = Budget(2048, 2048, aligned=Alignment(*aligned))
    batch = packing.materialise(packing.plan(groups, budget), groups, budget)
    assert batch.tree.aligned == aligned
    seen = 0
    for group, branch in zip(batch.group, batch.branch, strict=True):
        for number in range(1, group.max() + 1):
            inside = np.flatnonzero(group == number)
            branches = np.unique(branch[inside])
            starts = [inside[branch[inside] == k][0] for k in branches]
            assert starts[0] % aligned[0] == 0 or len(branches) > 2
            if len(branches) > 2:
                end = inside[branch[inside] == 0][-1] + 1
                assert end == starts[1]
                assert end % aligned[0] == 0
                assert all(start % aligned[1] == 0 for start in starts[1:])
                seen += 1
    assert seen > 5
    # Nothing is lost.
    loose = packing.pack(groups, row_length=2048)
    assert (batch.group > 0).sum() >= (loose.group > 0).sum()
    np.testing.assert_array_equal(batch.lengths, loose.lengths)
    count = batch.lengths.size
    np.testing.assert_array_equal(
        packing.response_sums(jnp.ones(batch.target.shape), jnp.asarray(batch.response), count),
        batch.lengths.ravel(),
    )


@pytest.mark.parametrize("aligned", [Alignment(), Alignment(16, 1)], ids=str)
def test_prompts_alone_take_what_they_are(aligned):
    groups = [Group(np.arange(1, 5, dtype=np.int32), []) for _ in range(3)]
    budget = Budget(40, 8, aligned=aligned)
    batch = packing.materialise(packing.plan(groups, budget), groups, budget)
    assert (batch.group > 0).sum() == 12
    assert batch.aligned == aligned


def test_an_alignment_that_is_missing_is_an_error():
    query, key, value, _ = arrays_of(1, 2048)
    nothing = jnp.ones((1, 2048), jnp.int32)
    seats = Seats(jnp.arange(2048), nothing, Tree(nothing, nothing))
    with pytest.raises(ValueError, match="prompts that end at multiples of 2 and responses"):
        splash_attention(query, key, value, seats, interpret=True)


def test_what_the_kernel_cannot_do_is_said():
    assert refusal(32_768, "tpu") is None
    assert "TPUs, and the devices here are cpus" in refusal(1024, "cpu")
    assert "up to 32768 tokens, and these have 40000" in refusal(40_000, "tpu")
    config = config_lib.default("dpo")
    assert models.attention_of(config, "tpu") == "splash"
    assert models.attention_of(config, "cpu") == "blockwise"
    config.model.attention = "blockwise"
    assert models.attention_of(config, "tpu") == "blockwise"
    config.model.attention = "splash"
    with pytest.raises(UserError, match="which cannot be had: it is a kernel for TPUs"):
        models.attention_of(config, "gpu")


@pytest.mark.parametrize("windows", [(), (0, 9)], ids=["", "windows"])
def test_a_decoder_reads_packed_rows_with_it(windows, monkeypatch):
    """Log-probs are those of the blockwise path; rows that are not aligned are read by that."""
    interpreted = partial(splash_attention, interpret=True)
    monkeypatch.setattr(models.layers.splash, "splash_attention", interpreted)
    config = dataclasses.replace(TINY, windows=windows, remat="dots")
    batch = rows_of(200, 1)
    params = models.init_params(Decoder(config), jax.random.key(0))

    def logits(attention, tree):
        model = Decoder(dataclasses.replace(config, attention=attention))
        return model.apply({"params": params}, batch.tokens, batch.positions, tree)

    real = np.asarray(batch.group > 0)
    expected = logits("blockwise", batch.tree)
    np.testing.assert_allclose(
        logits("splash", batch.tree)[real], expected[real], rtol=1e-4, atol=1e-5
    )


COMPILE = """
import sys
from jaxpref.plan import machines
machines.prepare(sys.argv[1])
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxpref import sharding
from jaxpref.models.splash import splash_attention
from jaxpref.packing import Alignment, Seats, Tree

devices, _ = machines.devices_of(sys.argv[1])
mesh = sharding.make_mesh(1, -1, 1, devices=devices)
rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
length, head_dim = int(sys.argv[2]), int(sys.argv[3])

def loss(query, key, value, group, branch):
    seats = Seats(jnp.arange(length), branch, Tree(group, branch, Alignment.of(length)))
    windows = dict(window=1024, soft_cap=30.0) if head_dim == 64 else {}
    return splash_attention(query, key, value, seats, **windows).astype(jnp.float32).sum()

shapes = [(mesh.size, length, heads, head_dim) for heads in (8, 2, 2)]
given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows) for shape in shapes]
given += [jax.ShapeDtypeStruct((mesh.size, length), jnp.int32, sharding=rows)] * 2
with sharding.use(mesh):
    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
"""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jaxpref[tpu]")
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2"])
@pytest.mark.parametrize(("length", "head_dim"), [(2048, 128), (32_768, 128), (2048, 64)])
def test_it_compiles_for_tpus(topology, length, head_dim):
    command = [sys.executable, "-c", COMPILE, topology, str(length), str(head_dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
