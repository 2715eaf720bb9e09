"""A run that has its state, reference and data, before anything is made of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import data as data_lib, reference as reference_lib, weights
from jaxpref.data import BatchStream, Data
from jaxpref.train.state import State
from jaxpref.workdir import AnyPath


class Begun(NamedTuple):
    """What every run has; see `Training`."""

    config: ConfigDict
    workdir: AnyPath
    mesh: Mesh
    opened: weights.Opened
    another: reference_lib.Another | None
    data: Data
    columns: Mapping[str, Mapping[str, Any]]
    state: State
    frozen: Any
    reference: reference_lib.Reference
    start: int
    steps: int

    def stream(self, side: str, *, training: bool) -> BatchStream:
        """The batches of one side of the data."""
        return data_lib.stream_of(
            self.config,
            self.data,
            side,
            self.mesh,
            training=training,
            columns=self.columns.get(side, {}),
        )
