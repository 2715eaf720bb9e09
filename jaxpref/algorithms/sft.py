"""Supervised fine-tuning on the first response of each example.

On preference pairs this is the Preferred-FT baseline of the DPO paper (arXiv
2305.18290, section 6), and the model that DPO starts from.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import Algorithm, LossInputs, Objective, response_logps
from jaxpref.measurements import Metric
from jaxpref.models.protocol import ModelOutput
from jaxpref.packing import PackedBatch


def build(knobs: ConfigDict) -> Algorithm:
    """SFT: the mean negative log-likelihood of a response token."""

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        logps = response_logps(output, batch)[:, 0]
        # Weighted by its tokens, a response's mean loss per token adds up to the mean
        # over all tokens of the step, however they are spread over micro-batches.
        tokens = jnp.asarray(batch.lengths)[:, 0].astype(logps.dtype)
        per_token = losses.nll(logps) / jnp.maximum(tokens, 1)
        present = (tokens > 0).astype(logps.dtype)
        metrics = {"logps/chosen": Metric(logps, present)}
        return Objective(Metric(per_token, tokens), metrics)

    return Algorithm(loss)
