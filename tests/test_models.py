import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from jaxpref import config as config_lib, models
from jaxpref.errors import UserError
from jaxpref.models import Decoder, make_rope

TOKENS = jax.random.randint(jax.random.key(9), (2, 19), 0, TINY.vocabulary_size)


def build(**changes):
    model = Decoder(dataclasses.replace(TINY, **changes))
    params = jax.jit(lambda key: models.init_params(model, key))(jax.random.key(0))
    return model, {"params": params}


def test_causal_by_gradient():
    """The gradient of position t's output with respect to a later input is exactly zero."""
    model, variables = build()
    length = TOKENS.shape[1]

    def outputs(offset):
        embedding = variables["params"]["embedding"]
        # One embedding row a position, so that the rows stand for the positions.
        table = jnp.concatenate([embedding[TOKENS[0]] + offset, embedding[length:]])
        params = {**variables["params"], "embedding": table}
        tokens = jnp.arange(length)[None]
        hidden = model.apply({"params": params}, tokens, method="hidden_states")
        return hidden[0].sum(-1)

    jacobian = jax.jacrev(outputs)(jnp.zeros((length, TINY.width)))
    reached = np.abs(jacobian).sum(-1)
    assert (reached[np.triu_indices(length, 1)] == 0).all()
    assert (reached[np.tril_indices(length)] > 0).all()


@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.long), "dots"])
def test_remat_changes_no_gradient(remat, float64):
    def gradient(**changes):
        model, variables = build(dtype="float64", param_dtype="float64", **changes)
        return jax.jit(jax.grad(lambda v: (model.apply(v, TOKENS) ** 2).sum()))(variables)

    plain, recomputed = gradient(), gradient(remat=remat)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * float(np.abs(a).max()))


def test_compute_dtype_is_apart_from_parameter_dtype():
    model, variables = build(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    hidden = model.apply(variables, TOKENS, method="hidden_states")
    assert hidden.dtype == jnp.bfloat16
    logits = model.apply(variables, TOKENS)
    assert logits.dtype == jnp.float32
    exact = build()[0].apply(variables, TOKENS)
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_layers_are_stacked_and_head_untied_on_request():
    _, variables = build(tied_head=False)
    params = variables["params"]
    assert params["layers"]["query"].shape == (2, 16, 4, 4)
    assert params["layers"]["key"].shape == (2, 16, 2, 4)
    assert params["head"].shape == params["embedding"].shape == (64, 16)
    assert "head" not in build()[1]["params"]


def test_ids_outside_the_table_give_nan_not_another_token():
    model, variables = build()
    assert np.isnan(model.apply(variables, jnp.array([[1, TINY.vocabulary_size]]))[0, 1]).all()


def test_initial_loss_is_that_of_a_uniform_guess():
    model, variables = build(width=64, head_dim=16, feed_forward=128, rope=(make_rope(16),))
    logps = jax.nn.log_softmax(model.apply(variables, TOKENS))
    assert abs(-float(logps.mean()) - np.log(TINY.vocabulary_size)) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must divide"),
        ({"head_dim": 2}, "turn 4 entries, but a head has 2"),
        ({"windows": (3,)}, "one entry a layer"),
        ({"rope": ()}, "a decoder needs positions"),
        ({"norm": "batch"}, "one of rms, rms_plus_one, layer"),
        ({"remat": "some"}, "one of none, full, dots"),
    ],
)
def test_impossible_shapes_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_tokenizer_larger_than_the_table_is_an_error_with_both_sizes():
    config = config_lib.default("dpo").model
    config.vocabulary_size = 64
    assert models.build(config, 64).config.vocabulary_size == 64
    config.vocabulary_size = 0
    assert models.build(config, 100).config.vocabulary_size == 100
    config.vocabulary_size = 64
    with pytest.raises(UserError, match="is 64, but the tokenizer gives ids up to 99"):
        models.build(config, 100)


def test_odd_heads_cannot_be_rotated():
    config = config_lib.default("dpo").model
    config.head_dim = 5
    with pytest.raises(UserError, match="must be even"):
        models.build(config, 64)
