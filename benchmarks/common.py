"""What the benchmarks share: the machine's matrix-product rate, peak memory, versions."""

import ctypes
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """Wall time of one call, until its results are there."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def matmul_flops_per_second(size: int = 2048, repeats: int = 7) -> float:
    """Rate of a square float32 matrix product: what the machine can do at best."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    seconds(product, a, a)
    return 2 * size**3 / statistics.median(seconds(product, a, a) for _ in range(repeats))


def forget_peak() -> None:
    """Gives the compiler's memory back and starts a new peak, so that it is the training's.

    Only on Linux's CPUs; elsewhere the peak stays that of the whole process or device.
    """
    if jax.default_backend() == "cpu" and platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where it is not a Linux CPU."""
    status = Path("/proc/self/status")
    if jax.default_backend() != "cpu" or not status.exists():
        return 0
    now = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    return int(now.split()[1]) * 1024


def peak_bytes() -> int:
    """Highest resident memory of this process; of the device, if it is not a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_machine() -> str:
    """Device, cores and versions, for the results table."""
    return (
        f"{jax.devices()[0].device_kind} x {jax.device_count()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    )
