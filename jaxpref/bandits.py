"""Bandits: DPO against policies that are optimised on a fitted reward, also on further states.

Where a policy chooses one of a few actions, every expectation over actions is a sum, so that
nothing is left of RLHF but its objective. RMB-PO maximises a fitted reward less beta times the KL
to the reference on the states of the preferences; RMB-PO+ on further states too, for which nobody
was asked; DPO learns from the preferences themselves. What counts is the optimality gap: the best
action's expected true reward less that of the policy.

Source: Li, Xu and Yu 2023, Policy Optimization in RLHF: The Impact of Out-of-preference Data
(arXiv 2312.10584), its bandits as the published code defines them: linear ones, in which the
policy's features may differ from the reward's, and ones with networks. `replay_linear`
draws the data sets of that code. All else is pure functions, many of which run at once by
`jax.vmap`, in the precision of their arguments. In float32 Adam makes steps of what is zero but for
rounding, so the study is meant for float64:

    with jax.enable_x64(True):
        gaps = jax.jit(jax.vmap(partial(linear_study, matched=False)))(keys)["dpo"]
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from jaxpref import losses

BETA = 0.01
# Those of the networks' RMB-PO+ are more than RMB-PO's; the last one has as many.
METHODS = ("dpo", "rmb_po", "rmb_po_plus")
EQUAL_UPDATES = "rmb_po_equal_updates"


class Preferences(NamedTuple):
    """A data set.

    Attributes:
      states: in which two actions were compared.
      preferred: the action that won.
      rejected: the action that lost.
      extra_states: further ones, for RMB-PO+.
    """

    states: Float[Array | np.ndarray, "n *state"]
    preferred: Int[Array | np.ndarray, " n"]
    rejected: Int[Array | np.ndarray, " n"]
    extra_states: Float[Array | np.ndarray, "m *state"]


def optimality_gap(
    logits: Float[Array, "states actions"], rewards: Float[Array, "states actions"]
) -> Float[Array, ""]:
    """The expected reward of the best action of each state, less that of the policy."""
    return (rewards.max(-1) - (jax.nn.softmax(logits) * rewards).sum(-1)).mean()


def regularised_reward(
    logits: Float[Array, "states actions"],
    rewards: Float[Array, "states actions"],
    *,
    beta: float = BETA,
) -> Float[Array, ""]:
    """The policy's expected reward less beta times its KL to the uniform policy."""
    logps = jax.nn.log_softmax(logits)
    log_ratios = logps + np.log(logits.shape[-1])
    return (jnp.exp(logps) * (rewards - beta * log_ratios)).sum(-1).mean()


def _compared(values: Array, data: Preferences) -> tuple[Array, Array]:
    """Of values for every action, those of the preferred and of the rejected one."""
    chosen, rejected = (
        jnp.take_along_axis(values, actions[:, None], axis=-1)[:, 0]
        for actions in (data.preferred, data.rejected)
    )
    return chosen, rejected


def _dpo(values: Array, data: Preferences) -> Array:
    """DPO's loss; the uniform reference cancels."""
    chosen, rejected = _compared(values, data)
    return losses.dpo(chosen, rejected, None, None, beta=BETA, reference_free=True).losses.mean()


# The linear setting.
LINEAR_ACTIONS = 4
_LINEAR_TRUTH = (1.0, 2.0)
_LINEAR_STATES, _LINEAR_EXTRA = 20, 10
_DPO_STEPS, _REWARD_STEPS = 200, 1_000
# Midpoints of the quadrature over states.
_MIDPOINTS = 20_000
# What the published code adds to probabilities before it takes their logarithm.
_ADDED = 1e-6
_RIDGE, _NEWTON_STEPS = 1e-10, 200


def linear_features(
    states: Float[Array | np.ndarray, " n"], *, matched: bool = True
) -> Float[Array, "n actions 2"]:
    """Features of every action in states from 0 to 1: of the reward, or those of another policy."""
    number = jnp.arange(1, LINEAR_ACTIONS + 1, dtype=states.dtype)[None]
    cos, sin = (jnp.asarray(f(jnp.pi * states))[:, None] for f in (jnp.cos, jnp.sin))
    first, second = (cos, sin) if matched else (sin, cos)
    return jnp.stack([number * first, second / number], axis=-1)


def linear_rewards(states: Float[Array, " n"]) -> Float[Array, "n actions"]:
    """The true reward of every action."""
    return linear_features(states) @ jnp.asarray(_LINEAR_TRUTH, states.dtype)


def draw_linear(key: Key[Array, ""]) -> tuple[Preferences, dict[str, Float[Array, " 2"]]]:
    """A data set, and where each method starts."""
    of_states, of_actions, of_labels, of_extra, of_starts = jax.random.split(key, 5)
    states = jax.random.uniform(of_states, (_LINEAR_STATES,))
    pairs = _pairs(of_actions, len(states), LINEAR_ACTIONS)
    data = _labelled(of_labels, states, pairs, linear_rewards(states))
    starts = jax.random.uniform(of_starts, (len(METHODS), 2))
    extra = jax.random.uniform(of_extra, (_LINEAR_EXTRA,))
    return data._replace(extra_states=extra), dict(zip(METHODS, starts, strict=True))


def replay_linear(seed: int) -> tuple[Preferences, dict[str, Float[np.ndarray, " 2"]]]:
    """The data set and the starts that the published code draws from a seed."""
    random = np.random.RandomState(seed)
    evaluation = 10_000

    def skip(times: int) -> None:
        for _ in range(times):
            random.uniform(size=evaluation)

    random.uniform()
    skip(2)
    states, preferred, rejected = [], [], []
    for _ in range(_LINEAR_STATES):
        state = random.uniform(size=1)
        first, second = random.choice(LINEAR_ACTIONS, 2, replace=False, p=[1 / LINEAR_ACTIONS] * 4)
        rewards = _linear_rewards_of(state[0])
        won = random.binomial(1, 1 / (1 + np.exp(rewards[first] - rewards[second])), 1)[0]
        states.append(state[0])
        preferred.append(second if won else first)
        rejected.append(first if won else second)
    random.standard_normal(2)
    random.uniform()
    skip(1)
    starts = {"dpo": random.uniform(size=2)}
    skip(11)
    starts["rmb_po"] = random.uniform(size=2)
    skip(11)
    extra = np.concatenate([random.uniform(size=1) for _ in range(_LINEAR_EXTRA)])
    starts["rmb_po_plus"] = random.uniform(size=2)
    data = Preferences(*map(np.asarray, (states, preferred, rejected, extra)))
    return data, starts


def _linear_rewards_of(state: float) -> Float[np.ndarray, " actions"]:
    """`linear_rewards` of one state, in NumPy: the labels of a replay depend on every bit of it."""
    number = np.arange(1, LINEAR_ACTIONS + 1)
    features = np.cos(np.pi * state) * number, np.sin(np.pi * state) / number
    return sum(weight * of for weight, of in zip(_LINEAR_TRUTH, features, strict=True))


def fit_linear_reward(data: Preferences) -> Float[Array, " 2"]:
    """The maximum likelihood estimate of the Bradley-Terry model.

    It does not exist for the few data sets that are separable: there a ridge of 1e-10 and at most
    200 steps of Newton's method, each halved until it descends, leave a parameter in the hundreds.
    """
    features = linear_features(data.states)
    rows = jnp.arange(len(data.states))
    chosen, rejected = features[rows, data.preferred], features[rows, data.rejected]

    def loss(psi: Array) -> Array:
        found = losses.bradley_terry(chosen @ psi, rejected @ psi).mean()
        return found + _RIDGE * jnp.square(psi).sum()

    sizes = jnp.concatenate([jnp.zeros(1), 0.5 ** jnp.arange(20)]).astype(features.dtype)

    def step(_: Array, psi: Array) -> Array:
        direction = jnp.linalg.solve(jax.hessian(loss)(psi), jax.grad(loss)(psi))
        tried = psi[None] - sizes[:, None] * direction[None]
        return tried[jnp.argmin(jax.vmap(loss)(tried))]

    return jax.lax.fori_loop(0, _NEWTON_STEPS, step, jnp.zeros(2, features.dtype))


def solve_linear(
    data: Preferences, starts: Mapping[str, Float[Array, " 2"]], *, matched: bool = True
) -> dict[str, Float[Array, " 2"]]:
    """The parameters that each method ends with.

    Args:
      data: the preferences.
      starts: parameters by method.
      matched: whether the policy has the reward's features.
    """
    psi = fit_linear_reward(data)

    def logits(theta: Array, states: Array | np.ndarray) -> Array:
        return linear_features(states, matched=matched) @ theta

    def of_preferences(theta: Array) -> Array:
        logps = jax.nn.log_softmax(logits(theta, data.states))
        # The published gradient reads the smaller ratios, and is otherwise that of the logarithm.
        read = jnp.log(jnp.exp(logps) + _ADDED)
        return _dpo(logps + jax.lax.stop_gradient(read - logps), data)

    def of_reward(states: Array) -> Callable[[Array], Array]:
        rewards = linear_features(states) @ psi
        return lambda theta: -regularised_reward(logits(theta, states), rewards)

    everything = jnp.concatenate([data.extra_states, data.states])
    objectives = (of_preferences, of_reward(jnp.asarray(data.states)), of_reward(everything))
    steps = (_DPO_STEPS, _REWARD_STEPS, _REWARD_STEPS)
    return {
        name: _adagrad_norm(jax.grad(objective), starts[name], count)
        for name, objective, count in zip(METHODS, objectives, steps, strict=True)
    }


def _adagrad_norm(gradient: Callable[[Array], Array], start: Array, steps: int) -> Array:
    """Gradient descent whose rate is one over the root of all squared norms so far."""

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        theta, total = carry
        found = gradient(theta)
        total += jnp.square(found).sum()
        return theta - found / jnp.sqrt(jnp.where(total > 0, total, 1)), total

    start = jnp.asarray(start)
    return jax.lax.fori_loop(0, steps, step, (start, jnp.zeros((), start.dtype)))[0]


def linear_gap(theta: Float[Array, " 2"], *, matched: bool = True) -> Float[Array, ""]:
    """The optimality gap of a linear policy, by quadrature over the states."""
    states = (jnp.arange(_MIDPOINTS, dtype=theta.dtype) + 0.5) / _MIDPOINTS
    logits = linear_features(states, matched=matched) @ theta
    return optimality_gap(logits, linear_rewards(states))


def linear_study(key: Key[Array, ""], *, matched: bool = True) -> dict[str, Float[Array, ""]]:
    """The gap of each method on a data set of its own."""
    solved = solve_linear(*draw_linear(key), matched=matched)
    return {name: linear_gap(theta, matched=matched) for name, theta in solved.items()}


# The setting with networks.
NEURAL_ACTIONS = 10
_STATE_WIDTH, _HIDDEN = 50, 64
_NEURAL_STATES, _NEURAL_EXTRA, _NEURAL_EVALUATED = 50, 25, 5_000
_REWARD_EPOCHS, _POLICY_EPOCHS, _BATCH = 20, 50, 64
_RATE = 1e-3

# Weights `[inputs, outputs]` and biases of the layers of a network, from the first to the last.
Layers = tuple[tuple[Array, Array], ...]


class RewardNetwork(NamedTuple):
    """A reward of state and action: the last layer reads what one network makes of each.

    Attributes:
      state: layers for states.
      action: layers for actions, which are one-hot.
      last: one layer for both, the state's part first.
    """

    state: Layers
    action: Layers
    last: Layers


def init_layers(key: Key[Array, ""], *widths: int) -> Layers:
    """Weights and biases as PyTorch draws them: uniform within one over the root of the inputs."""
    layers = []
    for one, inputs, outputs in zip(
        jax.random.split(key, len(widths) - 1), widths[:-1], widths[1:], strict=True
    ):
        of_weight, of_bias = jax.random.split(one)
        bound = inputs**-0.5
        weight = jax.random.uniform(of_weight, (inputs, outputs), minval=-bound, maxval=bound)
        bias = jax.random.uniform(of_bias, (outputs,), minval=-bound, maxval=bound)
        layers.append((weight, bias))
    return tuple(layers)


def init_reward(key: Key[Array, ""], depth: int) -> RewardNetwork:
    """A reward network with `depth` hidden layers for each of state and action."""
    of_state, of_action, of_last = jax.random.split(key, 3)
    hidden = (_HIDDEN,) * depth
    return RewardNetwork(
        init_layers(of_state, _STATE_WIDTH, *hidden),
        init_layers(of_action, NEURAL_ACTIONS, *hidden),
        init_layers(of_last, 2 * _HIDDEN, 1),
    )


def init_policy(key: Key[Array, ""]) -> Layers:
    """A policy network."""
    return init_layers(key, _STATE_WIDTH, _HIDDEN, _HIDDEN, NEURAL_ACTIONS)


def _hidden(layers: Layers, x: Any, activation: Callable[[Array], Array]) -> Array:
    for weight, bias in layers:
        x = activation(x @ weight + bias[None])
    return x


def network_rewards(
    network: RewardNetwork,
    states: Float[Array | np.ndarray, "n width"],
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> Float[Array, "n actions"]:
    """The reward of every action."""
    of_states = _hidden(network.state, states, activation)
    actions = jnp.eye(NEURAL_ACTIONS, dtype=states.dtype)
    of_actions = _hidden(network.action, actions, activation)
    ((weight, bias),) = network.last
    split = weight[: of_states.shape[-1], 0], weight[of_states.shape[-1] :, 0]
    return (of_states @ split[0])[:, None] + (of_actions @ split[1] + bias)[None]


def true_network_rewards(
    network: RewardNetwork, states: Float[Array, "n width"]
) -> Float[Array, "n actions"]:
    """The true reward of every action, which jumps where the network's output changes its sign."""
    found = network_rewards(network, states, jnp.tanh)
    return found + jnp.sign(found)


def policy_logits(
    layers: Layers, states: Float[Array | np.ndarray, "n width"]
) -> Float[Array, "n actions"]:
    """The logits of every action."""
    *hidden, (weight, bias) = layers
    return _hidden(tuple(hidden), states, jax.nn.relu) @ weight + bias[None]


class Neural(NamedTuple):
    """A data set of the setting with networks, and where all begins.

    Attributes:
      data: the preferences.
      truth: the network of the true reward.
      reward: where the fitted reward starts.
      policy: where every policy starts.
      evaluated: states over which gaps are means.
    """

    data: Preferences
    truth: RewardNetwork
    reward: RewardNetwork
    policy: Layers
    evaluated: Float[Array, "states width"]


def draw_neural(
    key: Key[Array, ""], *, extra: int = _NEURAL_EXTRA, evaluated: int = _NEURAL_EVALUATED
) -> Neural:
    """A data set with so many further states, and all that starts at random."""
    keys = jax.random.split(key, 8)

    def states(key: Array, count: int) -> Array:
        return jax.random.uniform(key, (count, _STATE_WIDTH), minval=-1, maxval=1)

    truth = init_reward(keys[0], 1)
    compared = states(keys[1], _NEURAL_STATES)
    pairs = _pairs(keys[2], len(compared), NEURAL_ACTIONS)
    data = _labelled(keys[3], compared, pairs, true_network_rewards(truth, compared))
    return Neural(
        data._replace(extra_states=states(keys[4], extra)),
        truth,
        init_reward(keys[5], 2),
        init_policy(keys[6]),
        states(keys[7], evaluated),
    )


class SolvedNeural(NamedTuple):
    """What the setting with networks ends with.

    Attributes:
      reward: the fitted reward.
      policies: by method; `EQUAL_UPDATES` is RMB-PO with as many updates as RMB-PO+.
    """

    reward: RewardNetwork
    policies: dict[str, Layers]


def solve_neural(
    data: Preferences, reward: RewardNetwork, policy: Layers, *, log_probs: bool = False
) -> SolvedNeural:
    """Fits the reward, then each policy, by Adam over batches in order.

    Args:
      data: the preferences.
      reward: where the fitted reward starts.
      policy: where every policy starts.
      log_probs: whether DPO reads log-probabilities, as it should; the published code reads
        probabilities in their place.
    """

    def fit(network: RewardNetwork, part: Preferences) -> Array:
        return losses.bradley_terry(*_compared(network_rewards(network, part.states), part)).mean()

    def dpo(layers: Layers, part: Preferences) -> Array:
        read = jax.nn.log_softmax if log_probs else jax.nn.softmax
        return _dpo(read(policy_logits(layers, part.states)), part)

    def compared(start: int, stop: int) -> Preferences:
        cut = slice(start, stop)
        return Preferences(
            data.states[cut], data.preferred[cut], data.rejected[cut], data.extra_states[:0]
        )

    pairs = [compared(i, i + _BATCH) for i in range(0, len(data.states), _BATCH)]
    fitted = _adam(fit, reward, pairs, _REWARD_EPOCHS)

    def on_reward(layers: Layers, states: Array) -> Array:
        rewards = network_rewards(fitted, states)
        return -regularised_reward(policy_logits(layers, states), rewards)

    def batches(states: Array) -> list[Array]:
        return [states[i : i + _BATCH] for i in range(0, len(states), _BATCH)]

    own = batches(jnp.asarray(data.states))
    more = batches(jnp.concatenate([data.extra_states, data.states]))
    # The greatest whole number of epochs with no more updates than RMB-PO+ has.
    equal = _POLICY_EPOCHS * len(more) // len(own)
    policies = {
        "dpo": _adam(dpo, policy, pairs, _POLICY_EPOCHS),
        "rmb_po": _adam(on_reward, policy, own, _POLICY_EPOCHS),
        "rmb_po_plus": _adam(on_reward, policy, more, _POLICY_EPOCHS),
        EQUAL_UPDATES: _adam(on_reward, policy, own, equal),
    }
    return SolvedNeural(fitted, policies)


def _adam(loss: Callable[[Any, Any], Array], params: Any, batches: list[Any], epochs: int) -> Any:
    """Epochs of Adam over batches, which may differ in size, in order."""
    optimizer = optax.adam(_RATE)

    def epoch(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        for batch in batches:
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
            params = optax.apply_updates(params, updates)
        return params, state

    return jax.lax.fori_loop(0, epochs, epoch, (params, optimizer.init(params)))[0]


def neural_study(
    key: Key[Array, ""], *, extra: int = _NEURAL_EXTRA, log_probs: bool = False
) -> dict[str, Float[Array, ""]]:
    """The gap of each method on a data set of its own."""
    data, truth, reward, policy, evaluated = draw_neural(key, extra=extra)
    solved = solve_neural(data, reward, policy, log_probs=log_probs)
    rewards = true_network_rewards(truth, evaluated)
    return {
        name: optimality_gap(policy_logits(layers, evaluated), rewards)
        for name, layers in solved.policies.items()
    }


def _pairs(key: Key[Array, ""], count: int, actions: int) -> Int[Array, "n two"]:
    """Two different actions for each state, each pair as probable as any other."""
    of_first, of_second = jax.random.split(key)
    first = jax.random.randint(of_first, (count,), 0, actions)
    step = jax.random.randint(of_second, (count,), 1, actions)
    return jnp.stack([first, (first + step) % actions], axis=1)


def _labelled(
    key: Key[Array, ""],
    states: Array,
    pairs: Int[Array, "n two"],
    rewards: Float[Array, "n actions"],
) -> Preferences:
    """Preferences drawn from the Bradley-Terry model of these rewards."""
    first, second = jnp.take_along_axis(rewards, pairs, axis=1).T
    won = jax.random.bernoulli(key, jax.nn.sigmoid(second - first))
    preferred, rejected = (
        jnp.where(won, pairs[:, 1], pairs[:, 0]),
        jnp.where(won, pairs[:, 0], pairs[:, 1]),
    )
    return Preferences(states, preferred, rejected, states[:0])
