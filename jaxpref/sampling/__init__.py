"""Generation: what a policy says to prompts, sampled token by token on the tree.

A prompt is read once for all of its samples (see `jaxpref.models.cache`). Every random number is a
function of the prompt's key, the number of the sample and the place of the token, so that a
sample does not depend on what else is decoded beside it.
"""

from jaxpref.sampling.calls import Call, calls_of
from jaxpref.sampling.distribution import Sampling, draw, prompt_keys, truncated
from jaxpref.sampling.sampler import Generated, Sampler, generate

__all__ = [
    "Call",
    "Generated",
    "Sampler",
    "Sampling",
    "calls_of",
    "draw",
    "generate",
    "prompt_keys",
    "truncated",
]
