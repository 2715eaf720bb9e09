"""Weights are read in blocks: each byte once, by one device, wherever the parameters go."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import pytest
import ranged
from test_cli import ENVIRONMENT, ROOT
from test_pretrained import rewrite

from jaxpref import models, sharding
from jaxpref.models import huggingface
from jaxpref.models.huggingface import safetensors
from jaxpref.models.huggingface.places import as_ours, leaves_by_path, places

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
NAMES = ["gpt2", "pythia", "llama3", "phi3", "qwen3_moe"]
# A family for each way in which a tensor is ours (as it is, alternating, in parts), and one with
# rows that 8 devices do not divide.
QUICK = {("gpt2", (1, 1, 8)), ("phi3", (2, 2, 2)), ("qwen3_moe", (1, 8, 1)), ("pythia", (8, 1, 1))}


@pytest.fixture
def ranges(monkeypatch):
    """The first byte of each range that is read, and the byte after it; none is empty."""
    return ranged.note(monkeypatch.setattr)


def body(directory):
    """The first byte of the tensors, and the byte after them."""
    path = directory / safetensors.SINGLE
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(n, shape, marks=[] if (n, shape) in QUICK else pytest.mark.long)
        for n in NAMES
        for shape in MESHES
    ],
)
def test_each_byte_is_read_once_and_goes_where_one_device_has_it(name, shape, ranges):
    source = pretrained.FIXTURES / name
    _, expected = models.from_pretrained(source)
    first, last = body(source)
    whole = ranges.copy()
    ranges.clear()
    mesh = sharding.make_mesh(*shape)
    model, params = models.from_pretrained(source, mesh=mesh)
    ranges.sort()
    assert [ranges[0][0], *(end for _, end in ranges)] == [*(b for b, _ in ranges), last]
    assert ranges[0][0] == first
    largest = max(end - begin for begin, end in whole)
    assert max(end - begin for begin, end in ranges) == largest // 8
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))
    wanted = huggingface.abstract_params(model, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, params, wanted))


def bits(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("F32", "bfloat16"), ("BF16", "float32"), ("F16", "bfloat16"), ("F64", "bfloat16")],
)
def test_numbers_are_converted_as_numpy_converts_them(stored, dtype, tmp_path):
    source = tmp_path / "model"
    rewrite(pretrained.FIXTURES / "phi3", source, stored)
    model, params = models.from_pretrained(source, dtype=dtype)
    leaves, files = leaves_by_path(params), safetensors.TensorFiles(source)
    for place in places(model, model.origin.family):
        for part in place.parts:
            expected = as_ours(files.read(place.name), part).astype(jnp.dtype(dtype))
            found = leaves[part.path][place.entry]
            np.testing.assert_array_equal(bits(found), bits(np.ascontiguousarray(expected)))


# Reads a model over the devices of all processes. Prints which ranges this process read, and a sum
# of all values, in which each has a weight of its own.
SCRIPT = """
import json, sys
import jax, numpy as np
address, number, source = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
import ranged
from jaxpref import models, sharding
ranges = ranged.note()
_, params = models.from_pretrained(source, mesh=sharding.make_mesh(2, 2, 2))
flat = np.concatenate([x.ravel() for x in jax.tree.leaves(sharding.fetch(params))])
print(json.dumps([ranges, float(flat @ np.sin(np.arange(flat.size)))]))
"""


@pytest.mark.process
def test_two_processes_share_in_reading():
    source = pretrained.FIXTURES / "phi3"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, str(number), str(source)],
            env={
                **ENVIRONMENT,
                "JAX_NUM_CPU_DEVICES": "4",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    (ranges, total), (others, same) = (json.loads(x.splitlines()[-1]) for x in outputs)
    first, last = body(source)
    both = sorted(ranges + others)
    assert [first, *(end for _, end in both)] == [*(begin for begin, _ in both), last]
    for read in (ranges, others):
        assert sum(end - begin for begin, end in read) == (last - first) // 2
    leaves = jax.tree.leaves(models.from_pretrained(source)[1])
    flat = np.concatenate([np.ravel(x) for x in leaves])
    assert total == same == pytest.approx(flat @ np.sin(np.arange(flat.size)), rel=1e-6)
