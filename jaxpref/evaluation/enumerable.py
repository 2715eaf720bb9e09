"""A task so small that all of its answers can be listed: what an algorithm should find, exactly.

With a few tokens and a few steps, every response that a policy can give stands in one table, and
whatever is an expectation over responses is a sum over its rows: the objective, its optimum, its
gradient, and the mean and the variance of what an estimator makes of a few samples. A policy is
here the log-probs of all responses. Two kinds of policies give them: `tabular` with logits for
every prefix, and any model through `Responses.group`, a prompt with all responses behind it, which
is packed and scored like every other group:

    responses = list_responses(vocabulary=4, steps=3)
    batch = packing.pack([responses.group(prompt)], row_length=...)
    logps = algorithms.response_logps(model(params, batch), batch)[0]  # Their exps sum to 1.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses.inputs import check_range
from jaxpref.packing import Group

# One number a response, in the order of `Responses`.
OfResponses = Float[Array | np.ndarray, " responses"]


class Responses(NamedTuple):
    """All responses that there are, in the order of their tokens. No one begins another.

    Attributes:
      tokens: token ids; 0 behind the end.
      here: which tokens are there.
      prefixes: what each token follows: the number of its prefix, 0 for the empty one; 0 behind
        the end.
    """

    tokens: Int[np.ndarray, "responses steps"]
    here: Bool[np.ndarray, "responses steps"]
    prefixes: Int[np.ndarray, "responses steps"]

    @property
    def lengths(self) -> Int[np.ndarray, " responses"]:
        """Tokens of each response, its stop token among them."""
        return self.here.sum(1)

    @property
    def ends(self) -> Bool[np.ndarray, "responses steps"]:
        """Which tokens are the last of their response."""
        return self.here & (np.arange(self.here.shape[1]) == self.lengths[:, None] - 1)

    @property
    def prefix_count(self) -> int:
        """How many prefixes a token may follow."""
        return int(self.prefixes.max()) + 1

    def group(self, prompt: Int[np.ndarray, " prompt_tokens"]) -> Group:
        """The prompt with all responses, to be packed; the model has this vocabulary alone."""
        rows = zip(self.tokens, self.lengths, strict=True)
        return Group(prompt, [tokens[:length].astype(np.int32) for tokens, length in rows])


def list_responses(vocabulary: int, steps: int, stops: Collection[int] = (0,)) -> Responses:
    """Lists every response: it ends with a stop token, or is cut at the longest length.

    Args:
      vocabulary: token ids, from 0 on.
      steps: tokens of the longest response.
      stops: tokens that end a response. Both ends are final: nothing is expected after them.

    Raises:
      ValueError: there is nothing to list, or a stop token that the vocabulary does not have.

    >>> list_responses(vocabulary=2, steps=2).tokens.tolist()
    [[0, 0], [1, 0], [1, 1]]
    """
    if vocabulary < 1 or steps < 1 or not set(stops) <= set(range(vocabulary)):
        raise ValueError(
            "list_responses expected a vocabulary, steps, and stop tokens of the vocabulary; got "
            f"vocabulary={vocabulary}, steps={steps}, stops={sorted(stops)}."
        )
    going_on = [token for token in range(vocabulary) if token not in stops]
    prefixes = [p for length in range(steps) for p in itertools.product(going_on, repeat=length)]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    responses = sorted(
        (*prefix, token)
        for prefix in prefixes
        for token in range(vocabulary)
        if token in stops or len(prefix) == steps - 1
    )
    tokens, places = np.zeros((2, len(responses), steps), int)
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = response
        places[row, : len(response)] = [number[response[:t]] for t in range(len(response))]
    here = np.arange(steps) < np.array([[len(response)] for response in responses])
    return Responses(tokens, here, places)


def tabular(
    logits: Float[Array | np.ndarray, "prefixes vocabulary"], responses: Responses
) -> Float[Array, "responses steps"]:
    """Log-probs of every token of every response under a policy with logits for each prefix.

    Args:
      logits: of the next token after each prefix, `Responses.prefix_count` rows.
      responses: those that there are.

    Returns:
      The log-probs in nats, 0 behind the end; summed over the steps, those of the responses.
    """
    logps = jax.nn.log_softmax(jnp.asarray(logits))
    return jnp.where(responses.here, logps[responses.prefixes, responses.tokens], 0)


def greedy(
    token_logps: Float[Array | np.ndarray, "responses steps"], responses: Responses
) -> Int[Array, ""]:
    """Which response takes the likeliest token after every prefix; of equals the lowest id."""
    logps = jnp.where(responses.here, jnp.asarray(token_logps), -jnp.inf)
    best = jax.ops.segment_max(
        logps.ravel(), responses.prefixes.ravel(), num_segments=responses.prefix_count
    )
    takes_it = (logps == best[responses.prefixes]) | ~responses.here
    return takes_it.all(1).argmax()


def exact_values(
    returns: Float[Array | np.ndarray, "responses steps"],
    token_logps: Float[Array | np.ndarray, "responses steps"],
    responses: Responses,
) -> Float[Array, "responses steps"]:
    """What a perfect critic says before every token: the mean of what follows that prefix.

    Formula: $V(y_{<t}) = E[G_t | y_{<t}]$ over responses of the policy.

    Args:
      returns: $G_t$, rewards from each token of each response on.
      token_logps: of the policy.
      responses: those that there are.

    Returns:
      The value of each token's prefix, as often as responses begin with it; 0 behind the end.
    """
    chances = jnp.exp(jnp.asarray(token_logps).sum(1, keepdims=True)) * responses.here

    def by_prefix(x: Array) -> Array:
        return jax.ops.segment_sum(
            x.ravel(), responses.prefixes.ravel(), num_segments=responses.prefix_count
        )

    means = by_prefix(chances * jnp.asarray(returns)) / by_prefix(chances)
    return jnp.where(responses.here, means[responses.prefixes], 0)


class Worth(NamedTuple):
    """What a policy is worth.

    Attributes:
      value: the mean reward less beta times the KL.
      reward: the mean reward.
      kl: KL(policy, reference), in nats.
    """

    value: Float[Array, ""]
    reward: Float[Array, ""]
    kl: Float[Array, ""]


def objective(
    logps: OfResponses, reference_logps: OfResponses, rewards: OfResponses, *, beta: float
) -> Worth:
    """The objective of learning from rewards with a KL penalty.

    Formula: $J(\\pi) = E_{y \\sim \\pi}[r(y)] - \\beta \\, KL(\\pi, \\pi_{ref})$.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2.

    Args:
      logps: of all responses under the policy, finite, in nats.
      reference_logps: of the same under the reference.
      rewards: of all responses.
      beta: the coefficient of the KL, at least 0.

    Returns:
      `Worth(value, reward, kl)`; their gradients with respect to `logps` are exact where the
      log-probs are those of a policy, whatever its parameters.

    Raises:
      ValueError: beta is below 0.
    """
    check_range("objective", least=0, beta=beta)
    logps, reference = jnp.asarray(logps), jnp.asarray(reference_logps)
    chances = jnp.exp(logps)
    reward = (chances * jnp.asarray(rewards)).sum()
    kl = (chances * (logps - reference)).sum()
    return Worth(reward - beta * kl, reward, kl)


class Optimum(NamedTuple):
    """The best policy and what it is worth.

    Attributes:
      logps: of all responses under it.
      value: of the objective, which no policy exceeds.
    """

    logps: Float[Array, " responses"]
    value: Float[Array, ""]


def optimum(reference_logps: OfResponses, rewards: OfResponses, *, beta: float) -> Optimum:
    """The policy that maximises `objective`, of all there are.

    Formula: $\\pi^*(y) = \\pi_{ref}(y) e^{r(y) / \\beta} / Z$, with the value $\\beta \\log Z$;
    another policy's value is less by $\\beta \\, KL(\\pi, \\pi^*)$.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4.

    Args:
      reference_logps: of all responses under the reference, in nats.
      rewards: of all responses.
      beta: the coefficient of the KL, above 0.

    Raises:
      ValueError: beta is not above 0.
    """
    check_range("optimum", above=0, beta=beta)
    tilted = jnp.asarray(reference_logps) + jnp.asarray(rewards) / beta
    log_z = jax.nn.logsumexp(tilted)
    return Optimum(tilted - log_z, beta * log_z)


def exact_gradient(
    policy: Callable[[Any], Float[Array, " responses"]],
    params: Any,
    reference_logps: OfResponses,
    rewards: OfResponses,
    *,
    beta: float,
) -> Any:
    """The gradient of `objective` with respect to a policy's parameters.

    Args:
      policy: from parameters to the log-probs of all responses.
      params: a pytree.
      reference_logps: see `objective`.
      rewards: see `objective`.
      beta: see `objective`.
    """

    def value(params: Any) -> Array:
        return objective(policy(params), reference_logps, rewards, beta=beta).value

    return jax.grad(value)(params)


class Gradients(NamedTuple):
    """The gradient that each draw of a few samples gives, with the chance of that draw.

    Attributes:
      chances: of each draw; they sum to 1.
      values: the gradient, parameters in the order of `jax.flatten_util.ravel_pytree`.
    """

    chances: Float[Array, " draws"]
    values: Float[Array, "draws parameters"]

    @property
    def mean(self) -> Float[Array, " parameters"]:
        """The expected gradient."""
        return self.chances @ self.values

    @property
    def variance(self) -> Float[Array, ""]:
        """The variance of the gradient, summed over the parameters."""
        return self.chances @ jnp.square(self.values - self.mean[None]).sum(1)


def all_gradients(
    loss: Callable[[Array, Array], Float[Array, ""]],
    policy: Callable[[Any], Float[Array, "responses ..."]],
    params: Any,
    *,
    samples: int,
) -> Gradients:
    """The gradients of a loss of independent samples, for all draws that there are.

    Args:
      loss: of the policy's log-probs and of which responses are drawn (`Int[Array, " samples"]`).
        It may read the log-probs of all responses, with gradients stopped where an algorithm
        stops them.
      policy: from parameters to log-probs: of the responses, or of each of their tokens as
        `tabular` gives them.
      params: a pytree.
      samples: drawn from the policy at a time. There are as many draws as responses to this power,
        and an array of all draws by all parameters.
    """
    flat, unravel = ravel_pytree(params)
    logps = policy(params)
    count = logps.shape[0]
    draws = jnp.asarray(np.indices((count,) * samples).reshape(samples, -1).T)
    of_response = logps.reshape(count, -1).sum(1)
    by_logps = jax.vmap(jax.grad(loss), (None, 0))(logps, draws)
    by_params = jax.jacrev(lambda flat: policy(unravel(flat)).ravel())(flat)
    return Gradients(
        jnp.exp(of_response[draws].sum(1)), by_logps.reshape(len(draws), -1) @ by_params
    )


class Task(NamedTuple):
    """A task for algorithms to be compared on.

    Attributes:
      responses: all that there are.
      rewards: of each.
      reference_logits: of a `tabular` reference, which training starts from too.
      beta: the coefficient of the KL.
    """

    responses: Responses
    rewards: Float[np.ndarray, " responses"]
    reference_logits: Float[np.ndarray, "prefixes vocabulary"]
    beta: float


def reward(tokens: Sequence[int]) -> float:
    """The reward of a response in `default_task`.

    Tokens are worth different amounts, less the later they come; a 2 right after a 1 is good, and
    to be cut is bad. So no tokens and no places can be exchanged, and the greedy choice of each
    token is not the best response.

    Args:
      tokens: of the response; without a 0 at its end it was cut.
    """
    worth = (0.2, -0.3, 0.4, 0.7)
    pairs = sum(pair == (1, 2) for pair in itertools.pairwise(tokens))
    cut = tokens[-1] != 0
    return sum(worth[x] / (1 + t) for t, x in enumerate(tokens)) + 1.5 * pairs - 0.6 * cut


def default_task(steps: int = 3, beta: float = 0.5) -> Task:
    """The task of tests and benchmarks: 4 tokens, of which 0 stops; 40 responses of up to 3.

    Args:
      steps: tokens of the longest response; with 4 there are 121 responses.
      beta: the coefficient of the KL.
    """
    responses = list_responses(vocabulary=4, steps=steps)
    rewards = [
        reward(tokens[:length].tolist())
        for tokens, length in zip(responses.tokens, responses.lengths, strict=True)
    ]
    # Irregular numbers from -1 to 1, the same with every version of every library.
    logits = np.sin(1 + 7 * np.arange(4 * responses.prefix_count) ** 2)
    return Task(responses, np.array(rewards), logits.reshape(-1, 4), beta)
