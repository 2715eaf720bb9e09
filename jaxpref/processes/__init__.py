"""Several processes of one run: how they join, agree, miss one that hangs, and end together.

What they tell each other here are texts, by the service through which JAX joins processes. So a
process can be told of an error while it waits for another one on its devices.
"""

from jaxpref.processes.agreement import after_first, agree, check_same, in_first
from jaxpref.processes.ending import leave_unsaved, together
from jaxpref.processes.last_acts import at_any_end
from jaxpref.processes.life import beat, watched
from jaxpref.processes.service import join

__all__ = [
    "after_first",
    "agree",
    "at_any_end",
    "beat",
    "check_same",
    "in_first",
    "join",
    "leave_unsaved",
    "together",
    "watched",
]
