"""The service through which JAX joins processes, and through which they tell each other texts."""

from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpref.errors import UserError

# Seconds without a sign of life after which JAX aborts the others. `life` takes a process for dead
# before, which ends them with a sentence; this one needs no Python to run.
_HEARTBEAT = 60
# Milliseconds that one question to the service takes.
_ASKED = 1_000


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of a run, whose devices together are then `jax.devices()`.

    It has to come before anything that asks JAX for a device. Without arguments the cluster says
    who the others are (Cloud TPU, Slurm, Open MPI, Kubernetes); elsewhere there are none.

    Args:
      coordinator: HOST:PORT of process 0, which waits there for the others.
      processes: how many there are; 1 for this one alone, whatever the cluster says.
      process: which of them this one is, from 0.

    Raises:
      UserError: they cannot be joined.
    """
    if processes == 1:
        return
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is None and "coordinator_address" in str(error):
            # No cluster is known here.
            return
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the other processes of this run cannot be joined ({reason}). Give each of them the "
            "same --coordinator=HOST:PORT and --num_processes, and its own --process_id; or "
            "--num_processes=1 for a process by itself."
        ) from error


def client() -> Any:
    """What asks the service, by JAX's own interface; what fails raises a `JaxRuntimeError`."""
    return ocp.multihost.get_jax_distributed_client()


def ask(key: str) -> str:
    """What a process has told, or tells within a second; see `is_late`."""
    return client().blocking_key_value_get(key, _ASKED)


def is_late(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether nobody has told what was asked so far, so that it may be asked again."""
    return "DEADLINE_EXCEEDED" in str(error)
