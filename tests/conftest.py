"""Shared by all tests: 8 fake CPU devices, strict JAX, shapes checked at run time."""

import ctypes
import dataclasses
import gc
import importlib.util
import math
import mmap
import os
from contextlib import contextmanager
from pathlib import Path

# Before JAX starts: a mesh to shard over, and products in full float32 on every backend.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def known_to_xla(flags):
    """The flags that the installed jaxlib has; it ends the process at any other one."""
    library = Path(importlib.util.find_spec("jaxlib").origin).with_name("libjax_common.so")
    if not library.exists():
        return []
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        return [f"--{flag}" for flag in flags if code.find(flag.split("=")[0].encode()) >= 0]


# Half of the suite's time is compiling: it is done quickly rather than well, and kept, since many
# tests compile the same step.
QUICK = (
    "xla_backend_optimization_level=0",
    "xla_llvm_disable_expensive_passes=true",
    "xla_cpu_use_fusion_emitters=false",
    "xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known_to_xla(QUICK)])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

from jaxtyping import install_import_hook

install_import_hook("jaxpref", "typechecker.check")

import jax
import numpy as np
import pytest

from jaxpref import algorithms, evaluation, packing, sharding
from jaxpref.models import Decoder, DecoderConfig, init_params, make_rope, packed

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    """Skips what compares with PyTorch where it is not installed; `make test-torch` installs it."""
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))


plot_curves = evaluation.plot_curves


@pytest.fixture(autouse=True, scope="session")
def without_curves():
    """To draw curves takes as long as the rest of a small run; `plot_curves` above draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "plot_curves", lambda lines, path, title: None)
        yield


# Resident memory at which a worker's compiled programs go, and by how much it grows until then.
# What remains without them is more from test to test; to compile anew after each one takes long.
_MOST_BYTES, _GROWTH = 1.5e9, 3e8
_limit = _MOST_BYTES


@pytest.fixture(autouse=True)
def forget_programs():
    """Compiled programs go when a worker holds too much: it would keep gigabytes of them."""
    global _limit
    yield
    if _resident_bytes() > _limit:
        jax.clear_caches()
        gc.collect()
        # glibc keeps what was freed in pieces, unless it is asked.
        ctypes.CDLL(None).malloc_trim(0)
        _limit = max(_MOST_BYTES, _resident_bytes() + _GROWTH)


def _resident_bytes():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def on_one_device():
    """Runs take one device unless they ask for more: their steps compile in half the time."""
    make_mesh = sharding.make_mesh

    def small_mesh(data=-1, fsdp=1, tensor=1, devices=None):
        sizes = [max(size, 1) for size in (data, fsdp, tensor)]
        return make_mesh(*sizes, devices=devices or jax.devices()[: math.prod(sizes)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", small_mesh)
        yield


@pytest.fixture(scope="module")
def one_device():
    """See `on_one_device`."""
    with on_one_device():
        yield


TINY = DecoderConfig(
    vocabulary_size=64,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    feed_forward=24,
    rope=(make_rope(4),),
    attention_block=8,
)


@pytest.fixture
def float64():
    """For two ways of computing the same thing: they agree to 1e-9 on every machine.

    In float32 they differ by 1e-6 or so, on each kind of CPU by another amount; what is 0 but
    for that has another sign or rank, and Adam makes a step of it.
    """
    with jax.enable_x64(True):
        yield


def in_float64(model: Decoder, params) -> tuple[Decoder, dict]:
    """The same model; for tests with the fixture `float64`."""
    config = dataclasses.replace(model.config, dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        return model.clone(config=config), jax.tree.map(lambda x: x.astype("float64"), params)


@pytest.fixture(scope="session")
def tiny_model() -> Decoder:
    return Decoder(TINY)


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    return jax.jit(lambda key: init_params(tiny_model, key))(jax.random.key(0))


def response_logps(model: Decoder, params, batch):
    """Summed log-probs of the responses of a batch, under a decoder."""
    return algorithms.response_logps(packed(model)(params, batch), batch)


def random_groups(seed: int, count: int, responses: int = 2, longest: int = 6) -> list:
    """Groups of random tokens, with lengths from 1 to `longest`."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(1, TINY.vocabulary_size, rng.integers(1, longest + 1), dtype=np.int32)

    return [packing.Group(ids(), [ids() for _ in range(responses)]) for _ in range(count)]
