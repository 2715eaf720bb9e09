"""What an experiment consists of."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxpref.experiments.claims import Claim
from jaxpref.experiments.points import ALL, Chosen, Job
from jaxpref.knobs import one_of


def is_small(size: str, sizes: tuple[str, str]) -> bool:
    """Whether a record's argument asks for the smaller one of its two sizes.

    Raises:
      ValueError: it is neither.
    """
    if size not in sizes:
        raise ValueError(one_of("the record's argument", size, sizes))
    return size == sizes[1]


class Diagram(NamedTuple):
    """What is drawn in one panel of the figure.

    Attributes:
      title: above it.
      x: a label or a measure. The values of a label may be names.
      y: a measure.
      where: labels of the points that are drawn.
      series: labels that tell the series apart, and make the legend.
      joined: whether the points of a series are joined by a line; exact ones always are.
      log_x: whether places are drawn by their logarithm.
    """

    title: str
    x: str
    y: str
    where: Chosen = ALL
    series: Sequence[str] = ("method",)
    joined: bool = True
    log_x: bool = False


class Published(NamedTuple):
    """A figure of others, to stand beside ours.

    Attributes:
      labels: of our point.
      measure: which of its measures.
      mean: theirs.
      error: its standard error.
    """

    labels: Chosen
    measure: str
    mean: float
    error: float


class Experiment(NamedTuple):
    """What is done, drawn and decided.

    Attributes:
      title: of the table and of the figure.
      source: paper, and its section or figure.
      jobs: what is measured.
      figure: its panels.
      claims: what is decided.
      table: labels of the points in the table.
      published: figures of others.
    """

    title: str
    source: str
    jobs: Sequence[Job]
    figure: Sequence[Diagram]
    claims: Sequence[Claim]
    table: Chosen = ALL
    published: Sequence[Published] = ()
