"""The KL of responses from samples: on a task whose responses are all listed, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import evaluation, logprobs
from jaxpref.evaluation import enumerable
from jaxpref.logprobs import LMHead


@pytest.fixture(scope="module")
def task():
    """All responses of the small task: log-probs of two policies, and the KL at each position."""
    task = enumerable.default_task()
    responses, reference = task.responses, task.reference_logits
    policy = reference + np.cos(3 * np.arange(reference.size).reshape(reference.shape))
    logps, of_reference = (
        np.asarray(enumerable.tabular(logits, responses)) for logits in (policy, reference)
    )
    exact = enumerable.objective(logps.sum(1), of_reference.sum(1), task.rewards, beta=task.beta).kl
    # A prefix's hidden state is its number, and the head has its logits.
    hidden = jnp.eye(responses.prefix_count)
    of_prefix = logprobs.token_kl(
        hidden, LMHead(jnp.asarray(policy).T), hidden, LMHead(jnp.asarray(reference).T)
    )
    token_kl = np.where(responses.here, np.asarray(of_prefix)[responses.prefixes], 0)
    return responses, logps, logps - of_reference, token_kl, float(exact)


def test_both_have_the_exact_kl_as_their_mean_over_all_responses(task):
    """The second one has the smaller variance."""
    _, logps, ratios, token_kl, exact = task
    chances = np.exp(logps.sum(1))
    variances = []
    for values in (ratios.sum(1), token_kl.sum(1)):
        assert chances @ values == pytest.approx(exact, rel=1e-5)
        variances.append(chances @ (values - exact) ** 2)
    assert variances[1] < 0.5 * variances[0]
    assert token_kl.min() >= 0


@pytest.mark.parametrize("seed", range(5))
def test_samples_are_within_three_standard_errors_of_the_exact_kl(task, seed):
    responses, logps, ratios, token_kl, exact = task
    chances = np.exp(logps.sum(1).astype(float))
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(chances), size=800, p=chances / chances.sum())
    finished = responses.tokens[drawn, responses.lengths[drawn] - 1] == 0
    found = evaluation.sequence_kl(
        ratios[drawn],
        responses.here[drawn],
        np.repeat(np.arange(200), 4),
        finished,
        token_kl[drawn],
    )
    for mean, error in (found.by_log_ratios, found.by_token_kl):
        assert abs(mean - exact) < 3 * error
    assert found.by_token_kl.standard_error < found.by_log_ratios.standard_error
    assert (found.prompts, found.samples, found.cut) == (200, 800, (~finished).sum())
    assert 0 < found.cut < 800


def test_prompts_count_alike_and_their_spread_is_the_error():
    """Samples of one prompt are averaged first, in any order; what is not there is not read."""
    ratios = np.array([[1.0, 2.0], [5.0, np.nan], [2.0, 2.0], [1.0, np.inf]])
    here = np.array([[1, 1], [1, 0], [1, 1], [1, 0]], bool)
    finished = np.array([True, True, False, True])
    found = evaluation.sequence_kl(ratios, here, np.array([7, -1, 7, 7]), finished)
    means = np.array([(3 + 4 + 1) / 3, 5])
    assert found.by_log_ratios.mean == pytest.approx(means.mean())
    assert found.by_log_ratios.standard_error == pytest.approx(np.ptp(means) / 2)
    assert (found.by_token_kl, found.cut) == (None, 1)
    twice = evaluation.sequence_kl(
        *(np.concatenate([x, x]) for x in (ratios, here, np.array([7, -1, 7, 7]), finished))
    )
    assert twice.by_log_ratios == found.by_log_ratios


def test_what_says_nothing_of_an_error_is_refused():
    ratios, here, finished = np.ones((2, 2)), np.ones((2, 2), bool), np.ones(2, bool)
    with pytest.raises(ValueError, match="at least 2 prompts; got 2 to 1"):
        evaluation.sequence_kl(ratios, here, np.zeros(2, int), finished)
    ratios[1, 0] = np.nan
    with pytest.raises(ValueError, match="log_ratios should be finite; sample 1 has nan at 0"):
        evaluation.sequence_kl(ratios, here, np.arange(2), finished)
