"""The enumerable task: how much reward each method gains for its KL, beside what is possible.

A policy has a logit for every token after every prefix, and starts as the reference. Methods that
learn from preferences see pairs of the reference's responses with labels drawn from the
Bradley-Terry model of the true reward: a set of a given size, or fresh ones each step. PPO and its
kin sample from the policy, and see the true reward or one that was fitted to such pairs. All use
one optimizer, learning rate and batch size, in float64. Reward and KL are exact, from the listed
responses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from jaxpref import advantages, losses
from jaxpref.errors import UserError
from jaxpref.evaluation import best_of_n, enumerable, frontier
from jaxpref.experiments.points import Job, Label, Point, check_counts, shown

# The pairs are drawn anew each step.
FRESH = 0
# The label "at": what training ends with, what it passes on the way, and what is exact.
END, ON_THE_WAY, EXACT = "end", "on the way", "exact"
_PPO_EPOCHS = 4
_BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128)
_CURVE = tuple(float(f"{x:.3g}") for x in np.geomspace(0.02, 30, 60))

# A loss of a batch of pairs, from the log-probs of chosen and rejected responses under the policy
# and the reference, and from the method's strength.
PairLoss = Callable[[Array, Array, Array, Array, Array], Array]
# Updates a train state from a key, with its reward and its strength.
Step = Callable[[Array, Any], Any]


def _dpo(*logps_and_beta: Array) -> Array:
    *logps, beta = logps_and_beta
    return losses.dpo(*logps, beta=beta).losses


def _ipo(*logps_and_beta: Array) -> Array:
    *logps, beta = logps_and_beta
    return losses.ipo(*logps, beta=beta).losses


def _unlikelihood(chosen: Array, rejected: Array, *others: Array) -> Array:
    return losses.unlikelihood(chosen, rejected, alpha=others[-1]).losses


# Of each method on pairs: its loss, and what its strength is called.
ON_PAIRS: dict[str, tuple[PairLoss, str]] = {
    "dpo": (_dpo, "beta"),
    "ipo": (_ipo, "beta"),
    "preferred_ft": (lambda chosen, *others: losses.nll(chosen), ""),
    "unlikelihood": (_unlikelihood, "alpha"),
}
# Those that sample from the policy.
SAMPLING = ("ppo", "rloo", "remax")


class Settings(NamedTuple):
    """What all methods have in common.

    Attributes:
      seeds: of the random numbers, from 0 on; they run side by side.
      steps: updates; in each one PPO has four epochs.
      batch_size: pairs, or responses, a step.
      learning_rate: of Adam at the first step; it falls to 0 along a cosine.
      checkpoints: at how many steps all is measured, evenly spaced by their logarithm.
    """

    seeds: int
    steps: int
    batch_size: int
    learning_rate: float
    checkpoints: int

    @property
    def measured(self) -> tuple[int, ...]:
        """The steps at which all is measured, the last one among them."""
        at = np.geomspace(self.steps, max(self.steps / 100, 1), self.checkpoints)
        return tuple(dict.fromkeys(np.round(at[::-1]).astype(int).tolist()))


def jobs(
    *, betas: Sequence[float], alphas: Sequence[float], pairs: Sequence[int], **common: Any
) -> list[Job]:
    """Every method with every strength and every number of pairs, and what is possible.

    Args:
      betas: of the methods that have a reference.
      alphas: of unlikelihood.
      pairs: sizes of the sets of pairs; 0 for fresh ones each step.
      common: see `Settings`.

    Raises:
      UserError: a number is below 1.
    """
    settings = _checked(common)
    strengths = {"beta": tuple(betas), "alpha": tuple(alphas), "": (0.0,)}
    made = [Job("frontier, what is possible", {}, _possible)]
    for method, (loss, strength) in ON_PAIRS.items():
        for count in pairs:
            labels = {"method": method, "pairs": _named(count)}
            train = partial(_on_pairs, loss, count)
            made.append(_job(train, labels, strength, strengths[strength], settings))
    for method in SAMPLING:
        labels = {"method": method, "learns from": "true reward"}
        train = partial(_sampling, method, None)
        made.append(_job(train, labels, "beta", strengths["beta"], settings))
    made += [_learned(count, {}, strengths["beta"], settings) for count in pairs if count]
    return made


def sensitivity(
    *, betas: Sequence[float], learning_rates: Sequence[float], pairs: int, **common: Any
) -> list[Job]:
    """DPO, and PPO on a learned reward, from the same number of pairs at every learning rate.

    Args:
      betas: of both.
      learning_rates: of policies, critics and rewards.
      pairs: how many both learn from.
      common: see `Settings`, without the learning rate.

    Raises:
      UserError: a number is below 1.
    """
    made = []
    for rate in learning_rates:
        settings = _checked({**common, "learning_rate": rate})
        labels: dict[str, Label] = {"learning rate": rate}
        train = partial(_on_pairs, _dpo, pairs)
        of_dpo = {"method": "dpo", "pairs": _named(pairs), **labels}
        made += [
            _job(train, of_dpo, "beta", betas, settings),
            _learned(pairs, labels, betas, settings),
        ]
    return made


def _named(pairs: int) -> Label:
    return "fresh" if pairs == FRESH else pairs


def _checked(common: Mapping[str, Any]) -> Settings:
    settings = Settings(**common)
    counts = ("seeds", "steps", "batch_size", "checkpoints")
    check_counts(**{name: getattr(settings, name) for name in counts})
    if not settings.learning_rate > 0:
        raise UserError(f"--config.learning_rate should be above 0; got {settings.learning_rate}.")
    return settings


def _learned(
    pairs: int, labels: Mapping[str, Label], betas: Sequence[float], settings: Settings
) -> Job:
    """PPO on a reward that is fitted to pairs."""
    of_ppo = {"method": "ppo", "learns from": "learned reward", "pairs": pairs, **labels}
    return _job(partial(_sampling, "ppo", pairs), of_ppo, "beta", betas, settings)


def _job(
    train: Callable,
    labels: Mapping[str, Label],
    strength: str,
    strengths: Sequence[float],
    settings: Settings,
) -> Job:
    return Job(
        f"frontier, {shown(labels)}",
        {**labels, "strengths": tuple(strengths), **settings._asdict()},
        partial(_points, train, labels, strength, strengths, settings),
    )


class _Task(NamedTuple):
    """The task's arrays."""

    logits: Float[Array, "prefixes vocabulary"]
    reference: Float[Array, "responses steps"]
    rewards: Float[Array, " responses"]
    here: Array
    ends: Array
    prefixes: Array


_DEFAULT = enumerable.default_task()


def _task() -> _Task:
    responses = _DEFAULT.responses
    logits = jnp.asarray(_DEFAULT.reference_logits)
    return _Task(
        logits,
        enumerable.tabular(logits, responses),
        jnp.asarray(_DEFAULT.rewards),
        jnp.asarray(responses.here),
        jnp.asarray(responses.ends),
        jnp.asarray(responses.prefixes),
    )


def _points(
    train: Callable,
    labels: Mapping[str, Label],
    strength: str,
    strengths: Sequence[float],
    settings: Settings,
) -> list[Point]:
    """Trains with all seeds and strengths side by side, and measures each checkpoint."""
    with jax.enable_x64(True):
        of_strengths = jax.vmap(partial(train, _task(), settings), (None, 0))
        of_seeds = jax.jit(jax.vmap(of_strengths, (0, None)))
        keys = jax.vmap(jax.random.key)(jnp.arange(settings.seeds))
        logits = of_seeds(keys, jnp.asarray(strengths))
        found = jax.device_get(_measured(_all_logps(logits)))
    points = []
    for number, value in enumerate(strengths):
        own: dict[str, Label] = {strength: value} if strength else {}
        for place, step in enumerate(settings.measured):
            at = END if step == settings.steps else ON_THE_WAY
            when: dict[str, Label] = {"step": step, "at": at}
            values = {name: x[:, number, place] for name, x in found.items()}
            if strength == "beta":
                # Of the objective that the method is after.
                values["value"] = values["reward"] - value * values["kl"]
            points.append(Point({**labels, **own, **when}, values))
    return points


def _logps(logits: Any) -> Array:
    return enumerable.tabular(logits, _DEFAULT.responses).sum(1)


# For any number of policies, along leading axes.
_all_logps = jax.jit(jnp.vectorize(_logps, signature="(p,v)->(r)"))


@jax.jit
def _measured(logps: Float[Array, "*policies responses"]) -> dict[str, Float[Array, "*policies"]]:
    """Exact reward and KL, and the share of what this KL could gain."""
    reference, rewards = _logps(_DEFAULT.reference_logits), _DEFAULT.rewards

    def worth(logps: Array) -> tuple[Array, Array]:
        found = enumerable.objective(logps, reference, rewards, beta=0.0)
        return found.reward, found.kl

    reward, kl = jnp.vectorize(worth, signature="(r)->(),()")(logps)
    share = frontier.gain_share(reward, kl, reference, rewards)
    return {"reward": reward, "kl": kl, "gain_share": share}


def _possible() -> list[Point]:
    """The optimum for all beta, and best-of-N of the reference."""
    with jax.enable_x64(True):
        reference, rewards = _logps(_DEFAULT.reference_logits), _DEFAULT.rewards
        exact: list[tuple[dict[str, Label], Array]] = []
        for beta in _CURVE:
            best = enumerable.optimum(reference, rewards, beta=beta)
            exact.append(({"method": "optimum", "beta": beta}, best.logps))
        for n in _BEST_OF:
            chosen = best_of_n.exact_best_of_n(reference, rewards, n)
            exact.append(({"method": "best of n", "n": n}, chosen))
        found = jax.device_get(_measured(jnp.stack([logps for _, logps in exact])))
    return [
        Point({**labels, "at": EXACT}, {name: [x[number]] for name, x in found.items()}, over="")
        for number, (labels, _) in enumerate(exact)
    ]


def _trajectory(
    step: Callable[[Array, Any], Any], state: Any, settings: Settings
) -> Float[Array, "checkpoints prefixes vocabulary"]:
    """The policies' logits, which are first in a state, at each step that is measured."""
    ends = jnp.asarray(settings.measured)

    def segment(carry: tuple[Array, Any], end: Array) -> tuple[tuple[Array, Any], Array]:
        begin, state = carry
        state = jax.lax.fori_loop(begin, end, step, state)
        return (end, state), state[0]

    return jax.lax.scan(segment, (jnp.zeros_like(ends[0]), state), ends)[1]


def _adam(settings: Settings, updates: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, updates))


def _draw_pairs(task: _Task, key: Key[Array, ""], count: int) -> Int[Array, "pairs two"]:
    """Two responses of the reference each, the preferred one first."""
    of_pairs, of_labels = jax.random.split(key)
    pairs = _draw(task.reference.sum(1), of_pairs, (count, 2))
    rewards = task.rewards[pairs]
    first = jax.random.bernoulli(of_labels, jax.nn.sigmoid(rewards[:, 0] - rewards[:, 1]))
    return jnp.where(first[:, None], pairs, pairs[:, ::-1])


def _draw(logps: Array, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "..."]:
    return jax.random.choice(key, len(logps), shape, p=jnp.exp(logps))


def _batches(
    task: _Task, settings: Settings, key: Key[Array, ""], count: int
) -> Callable[[Array], Int[Array, "pairs two"]]:
    """The pairs of each step: fresh ones, or some of a set that is drawn here."""
    of_set, of_steps = jax.random.split(key)
    if count == FRESH:
        return lambda step: _draw_pairs(
            task, jax.random.fold_in(of_steps, step), settings.batch_size
        )
    pairs = _draw_pairs(task, of_set, count)

    def batch(step: Array) -> Int[Array, "pairs two"]:
        drawn = jax.random.randint(
            jax.random.fold_in(of_steps, step), (settings.batch_size,), 0, count
        )
        return pairs[drawn]

    return batch


def _on_pairs(
    loss: PairLoss,
    count: int,
    task: _Task,
    settings: Settings,
    key: Key[Array, ""],
    strength: Float[Array, ""],
) -> Float[Array, "checkpoints prefixes vocabulary"]:
    """A method on pairs."""
    optimizer = _adam(settings, settings.steps)
    batches = _batches(task, settings, key, count)
    reference = task.reference.sum(1)

    def mean_loss(logits: Array, pairs: Array) -> Array:
        chosen, rejected = pairs.T
        logps = _logps(logits)
        of_pairs = (logps[chosen], logps[rejected], reference[chosen], reference[rejected])
        return loss(*of_pairs, strength).mean()

    def step(number: Array, state: Any) -> Any:
        logits, moments = state
        gradient = jax.grad(mean_loss)(logits, batches(number))
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(logits, updates), moments

    return _trajectory(step, (task.logits, optimizer.init(task.logits)), settings)


def _fitted(
    task: _Task, settings: Settings, key: Key[Array, ""], count: int
) -> Float[Array, " responses"]:
    """A reward for each response, trained on a set of pairs as long as a policy is."""
    optimizer = _adam(settings, settings.steps)
    batches = _batches(task, settings, key, count)

    def mean_loss(rewards: Array, pairs: Array) -> Array:
        return losses.bradley_terry(rewards[pairs[:, 0]], rewards[pairs[:, 1]]).mean()

    def step(number: Array, state: Any) -> Any:
        rewards, moments = state
        gradient = jax.grad(mean_loss)(rewards, batches(number))
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(rewards, updates), moments

    start = jnp.zeros_like(task.rewards)
    return jax.lax.fori_loop(0, settings.steps, step, (start, optimizer.init(start)))[0]


def _sampling(
    method: str,
    count: int | None,
    task: _Task,
    settings: Settings,
    key: Key[Array, ""],
    beta: Float[Array, ""],
) -> Float[Array, "checkpoints prefixes vocabulary"]:
    """A method that samples, on the true reward or on one that was fitted to `count` pairs."""
    of_reward, of_steps = jax.random.split(key)
    rewards = task.rewards if count is None else _fitted(task, settings, of_reward, count)
    if method == "ppo":
        return _ppo(task, settings, rewards, of_steps, beta)
    optimizer = _adam(settings, settings.steps)
    reference = task.reference.sum(1)

    def mean_loss(logits: Array, drawn: Array) -> Array:
        tokens = enumerable.tabular(logits, _DEFAULT.responses)
        logps = tokens.sum(1)
        worth = jax.lax.stop_gradient(rewards - beta * (logps - reference))
        if method == "rloo":
            found = advantages.leave_one_out(worth[drawn])
        else:
            greedy = enumerable.greedy(jax.lax.stop_gradient(tokens), _DEFAULT.responses)
            found = advantages.against_greedy(worth[drawn], worth[greedy])
        return losses.reinforce(logps[drawn], found).mean()

    def step(number: Array, state: Any) -> Any:
        logits, moments = state
        drawn = _draw(_logps(logits), jax.random.fold_in(of_steps, number), (settings.batch_size,))
        updates, moments = optimizer.update(jax.grad(mean_loss)(logits, drawn), moments)
        return optax.apply_updates(logits, updates), moments

    return _trajectory(step, (task.logits, optimizer.init(task.logits)), settings)


def _ppo(
    task: _Task,
    settings: Settings,
    rewards: Float[Array, " responses"],
    key: Key[Array, ""],
    beta: Float[Array, ""],
) -> Float[Array, "checkpoints prefixes vocabulary"]:
    """PPO with a critic that has a value for every prefix, and the KL in the tokens' rewards."""
    optimizer = _adam(settings, settings.steps * _PPO_EPOCHS)
    critic = jnp.zeros(len(task.logits))

    def step(number: Array, state: Any) -> Any:
        logits, critic, moments = state
        tokens = enumerable.tabular(logits, _DEFAULT.responses)
        shape = (settings.batch_size,)
        drawn = _draw(tokens.sum(1), jax.random.fold_in(key, number), shape)
        here, ends, prefixes = task.here[drawn], task.ends[drawn], task.prefixes[drawn]
        old, before = tokens[drawn], critic[prefixes]
        of_tokens = advantages.token_rewards(
            jnp.broadcast_to(rewards[drawn][:, None], old.shape),
            old,
            task.reference[drawn],
            ends,
            beta=beta,
            where=here,
        )
        found = advantages.gae(of_tokens, before, ends, where=here)

        def loss(params: tuple[Array, Array]) -> Array:
            logits, critic = params
            logps = enumerable.tabular(logits, _DEFAULT.responses)[drawn]
            policy = losses.ppo(logps, old, found.advantages, where=here).losses
            value = losses.clipped_value(
                critic[prefixes], before, found.returns, clip=math.inf, where=here
            ).losses
            return (policy + value).sum() / here.sum()

        def epoch(_: Array, carry: Any) -> Any:
            params, moments = carry
            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return optax.apply_updates(params, updates), moments

        (logits, critic), moments = jax.lax.fori_loop(
            0, _PPO_EPOCHS, epoch, ((logits, critic), moments)
        )
        return logits, critic, moments

    start = (task.logits, critic)
    return _trajectory(step, (*start, optimizer.init(start)), settings)
