"""The variance of policy gradients, exactly: REINFORCE, ReMax and RLOO at shifted rewards.

    python benchmarks/policy_gradients.py [--steps=3] [--samples=2]

On the enumerable task, at its reference, all draws of a few samples are listed, so that no number
here is an estimate. Rewards are centred, then shifted by deviations of themselves. All estimators
train on as many samples; ReMax's greedy response is one more that is generated.

REINFORCE's baseline is a moving average, which has no one variance. Its two ends are given: before
it has moved it is 0, the mean of the centred rewards; once it has settled it is the mean of the
shifted ones, and its own noise is left out. In between, after n updates with decay d, the first
row holds at d**n times the shift. An average over prompts never settles for each of them: it stays
off by how far a prompt's mean reward lies from the average, and that is a shift too.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import advantages, losses
from jaxpref.evaluation import enumerable

SHIFTS = (0.0, 1.0, 3.0, 10.0)


def variances(
    shifts: Sequence[float] = SHIFTS, steps: int = 3, samples: int = 2
) -> dict[str, list[float]]:
    """Variances of the gradient over the squared length of the exact one, for each shift."""
    task = enumerable.default_task(steps)
    logits = jnp.asarray(task.reference_logits)

    def tokens_of(logits: jax.Array) -> jax.Array:
        return enumerable.tabular(logits, task.responses)

    logps = tokens_of(logits)
    best, logps = enumerable.greedy(logps, task.responses), logps.sum(1)
    chances = jnp.exp(logps)
    centred = task.rewards - chances @ task.rewards
    centred /= jnp.sqrt(chances @ jnp.square(centred))
    exact = enumerable.exact_gradient(
        lambda x: tokens_of(x).sum(1), logits, logps, centred, beta=0.0
    )

    def variance(advantages_of: Callable[[jax.Array], jax.Array]) -> float:
        def loss(logps: jax.Array, drawn: jax.Array) -> jax.Array:
            return losses.reinforce(logps[drawn].sum(1), advantages_of(drawn)).mean()

        found = enumerable.all_gradients(loss, tokens_of, logits, samples=samples)
        np.testing.assert_allclose(-found.mean, exact.ravel(), rtol=1e-6, atol=1e-9)
        return float(found.variance / jnp.square(exact).sum())

    def of(rewards: jax.Array) -> dict[str, float]:
        mean = chances @ rewards
        return {
            "REINFORCE, baseline not moved": variance(lambda drawn: rewards[drawn]),
            "REINFORCE, baseline settled": variance(lambda drawn: rewards[drawn] - mean),
            "ReMax": variance(
                lambda drawn: advantages.against_greedy(rewards[drawn], rewards[best])
            ),
            "RLOO": variance(lambda drawn: advantages.leave_one_out(rewards[drawn])),
        }

    rows = [of(centred + shift) for shift in shifts]
    return {name: [row[name] for row in rows] for name in rows[0]}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="tokens of the longest response")
    parser.add_argument("--samples", type=int, default=2, help="trained on at a time, at least 2")
    arguments = parser.parse_args()
    with jax.enable_x64(True):
        table = variances(SHIFTS, arguments.steps, arguments.samples)
    print("| variance over squared gradient | " + " | ".join(f"{x:g}" for x in SHIFTS) + " |")
    print("|---|" + "---|" * len(SHIFTS))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in row) + " |")


if __name__ == "__main__":
    main()
