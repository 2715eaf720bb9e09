import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref import logprobs
from jaxpref.logprobs import LMHead

TOKENS, WIDTH, VOCABULARY = 12, 8, 50


def inputs(dtype=jnp.float32, *, bias=True, soft_cap=None, shape=(TOKENS,)):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (*shape, WIDTH), dtype)
    kernel = jax.random.normal(keys[1], (VOCABULARY, WIDTH), dtype)
    offset = jax.random.normal(keys[2], (VOCABULARY,), dtype) if bias else None
    targets = jax.random.randint(keys[3], shape, 0, VOCABULARY)
    # The first and the last column are where a block's edge would go wrong.
    targets = targets.at[..., 0].set(0).at[..., 1].set(VOCABULARY - 1)
    return hidden, LMHead(kernel, offset, soft_cap), targets


def full(hidden, head, targets):
    """The plain way: all logits, log-softmax, entropy."""
    logits = hidden @ head.kernel.T
    if head.bias is not None:
        logits = logits + head.bias[None]
    if head.soft_cap is not None:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    logps = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    chosen = jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(logps) * logps).sum(-1)


HEADS = [{"bias": False}, {"bias": True}, {"soft_cap": 3.0}, {"bias": False, "soft_cap": 3.0}]
BLOCKS = [7, 10, 25, 49, 50, 64, None]
LONG = [pytest.mark.long]


@pytest.mark.parametrize(
    ("head_kind", "block_size"),
    [
        # All sizes with a bias, with the other heads those that differ most.
        pytest.param(head, size, marks=[] if head == HEADS[1] or size in (7, 50, 64) else LONG)
        for head in HEADS
        for size in BLOCKS
    ],
)
def test_equals_full_logits(head_kind, block_size):
    with jax.enable_x64(True):
        hidden, head, targets = inputs(jnp.float64, **head_kind)
        weights = jnp.arange(1.0, TOKENS + 1)

        def blockwise(hidden, kernel, bias):
            out = logprobs.token_logprobs_and_entropy(
                hidden, LMHead(kernel, bias, head.soft_cap), targets, block_size=block_size
            )
            return (weights * (out.logprobs + 0.5 * out.entropy)).sum(), out

        def plain(hidden, kernel, bias):
            chosen, entropy = full(hidden, LMHead(kernel, bias, head.soft_cap), targets)
            return (weights * (chosen + 0.5 * entropy)).sum(), (chosen, entropy)

        which = (0, 1) if head.bias is None else (0, 1, 2)
        arrays = (hidden, head.kernel, head.bias)
        (_, out), gradients = jax.value_and_grad(blockwise, which, has_aux=True)(*arrays)
        (_, expected), wanted = jax.value_and_grad(plain, which, has_aux=True)(*arrays)
        np.testing.assert_allclose(out.logprobs, expected[0], rtol=1e-10)
        np.testing.assert_allclose(out.entropy, expected[1], rtol=1e-10)
        for gradient, want in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(gradient, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block_size", [7, 25, 64])
def test_collision_is_the_chance_that_two_samples_agree(block_size):
    with jax.enable_x64(True):
        hidden, head, targets = inputs(jnp.float64, soft_cap=3.0)

        def both(hidden):
            return logprobs.token_logprobs_and_collision(
                hidden, head, targets, block_size=block_size
            )

        probabilities = jax.nn.softmax(head.logits(hidden))
        np.testing.assert_allclose(
            both(hidden).log_collision, jnp.log((probabilities**2).sum(-1)), rtol=1e-10
        )
        np.testing.assert_allclose(both(hidden).logprobs, full(hidden, head, targets)[0])
        gradient = jax.grad(lambda hidden: both(hidden).log_collision.sum())(hidden)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("soft_cap", "temperature"), [(None, 1.7), (3.0, 0.4)])
def test_temperature_divides_the_logits_of_every_function(soft_cap, temperature, float64):
    """After bias and bound, forward and backward, in blocks and at once."""
    hidden, plain, targets = inputs("float64", soft_cap=soft_cap)
    weights = jnp.arange(1.0, TOKENS + 1)

    def blockwise(hidden, kernel, bias):
        head = LMHead(kernel, bias, soft_cap, temperature)
        out = logprobs.token_logprobs_and_entropy(hidden, head, targets, block_size=16)
        return (weights * (out.logprobs + 0.5 * out.entropy)).sum(), out

    def scaled(hidden, kernel, bias):
        logits = LMHead(kernel, bias, soft_cap).logits(hidden) / temperature
        probabilities = jax.nn.softmax(logits)
        entropy = -(probabilities * jnp.log(probabilities)).sum(-1)
        chosen = logprobs.from_logits(logits, targets)
        return (weights * (chosen + 0.5 * entropy)).sum(), (chosen, entropy)

    arrays = (hidden, plain.kernel, plain.bias)
    (_, out), gradients = jax.value_and_grad(blockwise, (0, 1, 2), has_aux=True)(*arrays)
    (_, expected), wanted = jax.value_and_grad(scaled, (0, 1, 2), has_aux=True)(*arrays)
    for found, want in zip((*out, *gradients), (*expected, *wanted), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-11)

    head = dataclasses.replace(plain, temperature=temperature)
    logits = plain.logits(hidden) / temperature
    np.testing.assert_allclose(head.logits(hidden), logits, rtol=1e-12)
    collision = logprobs.token_logprobs_and_collision(hidden, head, targets, block_size=16)
    both = jnp.log((jax.nn.softmax(logits) ** 2).sum(-1))
    np.testing.assert_allclose(collision.log_collision, both, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(collision.logprobs, out.logprobs, rtol=1e-9, atol=1e-12)


def test_temperature_1_adds_no_operation():
    hidden, head, targets = inputs()

    def operations(temperature):
        def loss(hidden, head):
            return logprobs.token_logprobs(hidden, head, targets, block_size=16).sum()

        given = dataclasses.replace(head, temperature=temperature)
        return str(jax.make_jaxpr(jax.grad(loss))(hidden, given))

    # Without a bound nothing else divides.
    assert " div " not in operations(1.0)
    assert " div " in operations(0.5)


def test_a_head_keeps_its_numbers_through_jit():
    hidden, head, targets = inputs(soft_cap=3.0)
    head = dataclasses.replace(head, temperature=0.5)
    returned = jax.jit(lambda: head)()
    assert (returned.soft_cap, returned.temperature) == (3.0, 0.5)
    np.testing.assert_array_equal(
        jax.jit(logprobs.token_logprobs)(hidden, returned, targets),
        logprobs.token_logprobs(hidden, head, targets),
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_0_is_refused(temperature):
    with pytest.raises(ValueError, match=r"LMHead expected temperature above 0; got"):
        dataclasses.replace(inputs()[1], temperature=temperature)


def test_check_grads():
    with jax.enable_x64(True):
        hidden, head, targets = inputs(jnp.float64, soft_cap=5.0)

        def function(*arrays):
            h, k, b = map(jnp.asarray, arrays)
            return logprobs.token_logprobs(h, LMHead(k, b, 5.0), targets, block_size=16)

        check_grads(
            function,
            (hidden, head.kernel, head.bias),
            order=1,
            modes=["rev"],
        )


def largest_array(jaxpr) -> int:
    """Entries of the largest intermediate in a jaxpr and in all it calls."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


def test_full_logits_exist_in_neither_pass():
    tokens, vocabulary, block = 64, 4096, 256
    hidden, kernel = jnp.ones((tokens, 4)), jnp.ones((vocabulary, 4))
    targets = jnp.zeros(tokens, jnp.int32)

    def loss(hidden, kernel):
        return logprobs.token_logprobs(hidden, LMHead(kernel), targets, block_size=block).sum()

    def loss_full(hidden, kernel):
        return full(hidden, LMHead(kernel), targets)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel)
    assert largest_array(jaxpr.jaxpr) == tokens * block
    plain = jax.make_jaxpr(jax.grad(loss_full, (0, 1)))(hidden, kernel)
    assert largest_array(plain.jaxpr) == tokens * vocabulary


def test_any_leading_shape_and_vmap(float64):
    hidden, head, targets = inputs("float64", shape=(2, 3, 2))
    out = logprobs.token_logprobs(hidden, head, targets)
    expected = full(hidden.reshape(-1, WIDTH), head, targets.ravel())[0].reshape(2, 3, 2)
    np.testing.assert_allclose(out, expected, rtol=1e-9)
    mapped = jax.vmap(lambda h, t: logprobs.token_logprobs(h, head, t))(hidden, targets)
    np.testing.assert_allclose(mapped, out, rtol=1e-9)


def test_bfloat16_gives_float32_close_to_float32():
    hidden, head, targets = inputs(jnp.bfloat16, bias=False)
    out = logprobs.token_logprobs(hidden, head, targets, block_size=16)
    assert out.dtype == jnp.float32
    # bfloat16 products are exact in float32, so only the order of summation differs.
    exact = full(hidden.astype(jnp.float32), LMHead(head.kernel.astype(jnp.float32)), targets)[0]
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda h, k: logprobs.token_logprobs(h, LMHead(k), targets).sum(), (0, 1))(
        hidden, head.kernel
    )
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_huge_logits_stay_finite(scale):
    hidden, head, targets = inputs(bias=False)

    def both(hidden):
        out = logprobs.token_logprobs_and_entropy(scale * hidden, head, targets, block_size=16)
        return (out.logprobs + out.entropy).sum(), out

    (_, out), gradient = jax.value_and_grad(both, has_aux=True)(hidden)
    assert np.isfinite(out.logprobs).all()
    assert (np.asarray(out.logprobs) <= 0).all()
    np.testing.assert_allclose(out.entropy, 0, atol=1e-3)
    assert np.isfinite(gradient).all()


def test_nan_is_not_hidden():
    hidden, head, targets = inputs()
    out = logprobs.token_logprobs(hidden.at[3, 0].set(jnp.nan), head, targets)
    np.testing.assert_array_equal(np.isnan(out), np.arange(TOKENS) == 3)


def test_vocabulary_entries_switched_off_by_an_infinite_bias(float64):
    """The entropy, the log-probs and all gradients are those of the smaller vocabulary."""
    hidden, head, _ = inputs("float64", bias=False)
    targets = jnp.arange(TOKENS) % 40
    bias = jnp.where(jnp.arange(VOCABULARY) < 40, 0.0, -jnp.inf)

    def total(hidden, kernel, bias):
        out = logprobs.token_logprobs_and_entropy(
            hidden, LMHead(kernel, bias), targets, block_size=16
        )
        return (out.logprobs + out.entropy).sum()

    value, gradients = jax.value_and_grad(total, (0, 1))(hidden, head.kernel, bias)
    small, wanted = jax.value_and_grad(total, (0, 1))(hidden, head.kernel[:40], None)
    np.testing.assert_allclose(value, small, rtol=1e-9)
    np.testing.assert_allclose(gradients[0], wanted[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gradients[1][:40], wanted[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(gradients[1][40:], 0)


@pytest.mark.parametrize("outside", [-100, -1, VOCABULARY])
def test_targets_outside_the_vocabulary_give_nan_in_both_functions(outside):
    hidden, head, targets = inputs(bias=False)
    targets = targets.at[4].set(outside)
    for out in (
        logprobs.token_logprobs(hidden, head, targets),
        logprobs.from_logits(hidden @ head.kernel.T, targets),
    ):
        np.testing.assert_array_equal(np.isnan(out), np.arange(TOKENS) == 4)


def test_from_logits_agrees(float64):
    hidden, head, targets = inputs("float64", bias=False)
    out = logprobs.from_logits(hidden @ head.kernel.T, targets)
    np.testing.assert_allclose(out, logprobs.token_logprobs(hidden, head, targets), rtol=1e-9)


def test_an_nnx_model_enters_through_split_and_merge():
    """The core takes functions of parameters; an NNX module becomes one."""
    from flax import nnx

    from jaxpref import losses

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, tokens):
            return jnp.tanh(self.mix(self.embed(tokens)))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (6, TOKENS), 0, VOCABULARY)

    @jax.jit
    def sequence_logps(params):
        model = nnx.merge(graph, params)
        head = LMHead(model.embed.embedding[...])
        return logprobs.token_logprobs(model(tokens[:, :-1]), head, tokens[:, 1:]).sum(-1)

    reference = sequence_logps(params)

    def loss(params):
        policy = sequence_logps(params)
        return losses.dpo(policy[:3], policy[3:], reference[:3], reference[3:]).losses.mean()

    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert loss(stepped) < value


def test_a_bare_kernel_is_told_from_a_head(monkeypatch):
    hidden, head, targets = inputs(bias=False)
    # As a user calls them, without the run-time checker of the test run.
    for name in ("_blockwise", "_check"):
        monkeypatch.setattr(logprobs, name, inspect.unwrap(getattr(logprobs, name)))
    for name in ("", "_and_entropy", "_and_collision"):
        function = inspect.unwrap(getattr(logprobs, f"token_logprobs{name}"))
        with pytest.raises(TypeError, match=r"expected an LMHead; got .*Pass LMHead\(kernel\)"):
            function(hidden, head.kernel, targets)
    with pytest.raises(TypeError, match="token_kl expected an LMHead"):
        inspect.unwrap(logprobs.token_kl)(hidden, head, hidden, head.kernel)


def test_errors_say_what_does_not_fit():
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match=r"expected hidden states \(12, 8\)"):
        logprobs.token_logprobs.__wrapped__(hidden[:, :4], head, targets)
    with pytest.raises(ValueError, match="one target a position"):
        logprobs.from_logits.__wrapped__(hidden, targets[:-1])
    kl = inspect.unwrap(logprobs.token_kl)
    with pytest.raises(ValueError, match=r"expected hidden states \(12, 8\), p's positions"):
        kl(hidden, head, hidden[:3], head)
    with pytest.raises(ValueError, match="one vocabulary; got 50 entries and 49"):
        kl(hidden, head, hidden, LMHead(head.kernel[:-1]))


# Two heads of one vocabulary, of other widths, with all parts that a head may have.
KL_HEADS = {
    "plain": (LMHead, LMHead),
    "bounded, at two temperatures": (
        lambda kernel: LMHead(kernel, None, 3.0, 0.7),
        lambda kernel: LMHead(
            kernel, jnp.linspace(-1, 1, VOCABULARY, dtype=kernel.dtype), 5.0, 1.3
        ),
    ),
}


def two(dtype="float64", shape=(TOKENS,)):
    """Hidden states and kernels of p and q."""
    keys = jax.random.split(jax.random.key(1), 4)
    arrays = [
        jax.random.normal(key, (*size, width), dtype)
        for key, size, width in zip(keys, (shape, (VOCABULARY,)) * 2, (8, 8, 6, 6), strict=True)
    ]
    return tuple(arrays)


def dense_kl(hidden_p, head_p, hidden_q, head_q):
    p, q = (jax.nn.log_softmax(h.logits(x)) for x, h in ((hidden_p, head_p), (hidden_q, head_q)))
    return (jnp.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize(
    ("case", "block_size"),
    [
        pytest.param(c, b, marks=[] if c != "plain" and b in (7, None) else LONG)
        for c in KL_HEADS
        for b in (7, 25, 50, None)
    ],
)
def test_token_kl_equals_that_of_all_logits(case, block_size, float64):
    """And so does its gradient, for any block of the vocabulary."""
    make_p, make_q = KL_HEADS[case]
    weights = jnp.arange(1.0, TOKENS + 1)

    def of(function, **options):
        def total(hidden_p, kernel_p, hidden_q, kernel_q):
            found = function(hidden_p, make_p(kernel_p), hidden_q, make_q(kernel_q), **options)
            return (weights * found).sum(), found

        return jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*two())

    (_, found), gradients = of(logprobs.token_kl, block_size=block_size)
    (_, expected), wanted = of(dense_kl)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-9, atol=1e-12)


def test_token_kl_is_0_of_equals_and_above_0_of_others():
    hidden_p, kernel_p, hidden_q, kernel_q = two("bfloat16", (2, 3))
    p, q = LMHead(kernel_p), LMHead(kernel_q)
    found = logprobs.token_kl(hidden_p, p, hidden_q, q, block_size=16)
    assert (found.shape, found.dtype) == ((2, 3), jnp.float32)
    assert (np.asarray(found) > 0).all()
    same = logprobs.token_kl(1e3 * hidden_p, p, 1e3 * hidden_p, p, block_size=16)
    np.testing.assert_array_equal(same, 0)
    # A constant more in all logits is the same distribution; rounding does not make it negative.
    shifted = LMHead(kernel_p, jnp.full(VOCABULARY, 0.3, "bfloat16"))
    near = np.asarray(logprobs.token_kl(hidden_p, p, hidden_p, shifted, block_size=16))
    assert ((near >= 0) & (near < 1e-5)).all()


def test_token_kl_of_vocabulary_entries_that_are_switched_off(float64):
    """What p never says counts nothing; what q never says and p does is infinitely far."""
    hidden_p, kernel_p, hidden_q, kernel_q = two()
    off = jnp.where(jnp.arange(VOCABULARY) < 40, 0.0, -jnp.inf)
    p, q, narrow = LMHead(kernel_p, off), LMHead(kernel_q), LMHead(kernel_q, off)
    for other, small in ((q, q), (narrow, LMHead(kernel_q[:40]))):
        found = logprobs.token_kl(hidden_p, p, hidden_q, other, block_size=16)
        full_q = jax.nn.log_softmax(small.logits(hidden_q))[:, :40]
        full_p = jax.nn.log_softmax(hidden_p @ kernel_p[:40].T)
        np.testing.assert_allclose(found, (jnp.exp(full_p) * (full_p - full_q)).sum(-1), rtol=1e-9)
    there = logprobs.token_kl(hidden_p, LMHead(kernel_p), hidden_q, narrow, block_size=16)
    np.testing.assert_array_equal(there, np.inf)
    spoiled = logprobs.token_kl(hidden_p.at[3, 0].set(jnp.nan), p, hidden_q, q)
    np.testing.assert_array_equal(np.isnan(spoiled), np.arange(TOKENS) == 3)


def test_token_kl_makes_no_full_logits_in_either_pass():
    tokens, vocabulary, block = 64, 4096, 256
    hidden, kernel = jnp.ones((tokens, 4)), jnp.ones((vocabulary, 4))

    def total(hidden, kernel):
        return logprobs.token_kl(
            hidden, LMHead(kernel), hidden, LMHead(kernel), block_size=block
        ).sum()

    assert largest_array(jax.make_jaxpr(total)(hidden, kernel).jaxpr) == tokens * block
    both = jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, kernel)
    assert largest_array(both.jaxpr) <= max(tokens * block, kernel.size)
