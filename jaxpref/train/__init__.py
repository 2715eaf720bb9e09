"""Training: the state by roles, one update, one loop."""

from jaxpref.train.layout import Layout, lay_out
from jaxpref.train.loop import run
from jaxpref.train.state import POLICY, State, Trained, abstract_state, initial_state
from jaxpref.train.update import make_eval_step, make_update

__all__ = [
    "POLICY",
    "Layout",
    "State",
    "Trained",
    "abstract_state",
    "initial_state",
    "lay_out",
    "make_eval_step",
    "make_update",
    "run",
]
