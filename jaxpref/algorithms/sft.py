"""Supervised fine-tuning on the first response of each example.

On preference pairs this is the Preferred-FT baseline of the DPO paper (arXiv
2305.18290, section 6), and the model that DPO starts from.
"""

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from jaxpref import losses
from jaxpref.algorithms.base import Algorithm, Objective, Params, score
from jaxpref.metrics import Metric
from jaxpref.models import Decoder
from jaxpref.packing import PackedBatch


def build(config: ConfigDict, model: Decoder) -> Algorithm:
    """SFT: the mean negative log-likelihood of a response token."""

    def loss(params: Params, batch: PackedBatch, key: Array | None) -> Objective:
        scores = score(model, params, batch, key)
        logps = scores.logps[:, 0]
        # Weighted by its tokens, a response's mean loss per token adds up to the mean
        # over all tokens of the step, however they are spread over micro-batches.
        tokens = jnp.asarray(batch.lengths)[:, 0].astype(logps.dtype)
        per_token = losses.nll(logps) / jnp.maximum(tokens, 1)
        present = (tokens > 0).astype(logps.dtype)
        metrics = {"logps/chosen": Metric(logps, present)}
        return scores.complete(Objective(Metric(per_token, tokens), metrics))

    return Algorithm(loss)
