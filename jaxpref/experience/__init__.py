"""What a step trains on: a source gives it, and may look at the train state.

Offline data are a source that ignores the state (`offline`); responses that the policy itself
samples are another (`rollouts`), in the same loop.
"""

from jaxpref.experience.base import Experience, Source, Work
from jaxpref.experience.held_out import HeldOut, Other
from jaxpref.experience.offline import offline
from jaxpref.experience.parts import (
    Asked,
    Packer,
    Parts,
    Prompts,
    SamplingParts,
    budget_of,
    make_look,
    make_sampler,
)
from jaxpref.experience.rollouts import Rollouts, abstract_batch
from jaxpref.experience.win_rate import AgainstReference

__all__ = [
    "AgainstReference",
    "Asked",
    "Experience",
    "HeldOut",
    "Other",
    "Packer",
    "Parts",
    "Prompts",
    "Rollouts",
    "SamplingParts",
    "Source",
    "Work",
    "abstract_batch",
    "budget_of",
    "make_look",
    "make_sampler",
    "offline",
]
