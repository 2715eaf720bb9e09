"""Preference pairs whose true reward is known.

A guest asks about a dish; a response describes it, or by mistake another one, with three
adjectives. Each adjective has a fixed warmth. The true reward of a response is the sum
of its warmths, less a penalty if it describes the wrong dish. Labels are drawn from the
Bradley-Terry model with this reward, $p(y_1 \\succ y_2) = \\sigma(r(y_1) - r(y_2))$. So some
labels are wrong on purpose, and no model can be expected to agree with more labels than the
true reward does.
"""

import numpy as np

from jaxpref.data.examples import Example

_DISHES = (
    "apple", "bread", "broth", "cake", "curry", "honey", "jam", "lemon", "melon", "milk",
    "noodles", "olive", "pasta", "peach", "pear", "pie", "plum", "rice", "salad", "soup",
    "stew", "tea", "tofu", "toast",
)  # fmt: skip
_ADJECTIVES = (
    "dreadful", "bitter", "stale", "bland", "dry", "plain", "mild", "decent", "fresh", "tasty",
    "lovely", "superb",
)  # fmt: skip
_ADJECTIVES_A_RESPONSE = 3
_WRONG_DISH_RATE = 0.25
_WRONG_DISH_PENALTY = 2.0

# The warmth of each adjective; the values are evenly spaced.
WARMTH: dict[str, float] = dict(
    zip(_ADJECTIVES, np.linspace(-1.4, 1.4, len(_ADJECTIVES)).tolist(), strict=True)
)


def true_reward(adjectives: tuple[str, ...], right_dish: bool) -> float:
    """The reward of a response with these adjectives."""
    return sum(WARMTH[word] for word in adjectives) - (0 if right_dish else _WRONG_DISH_PENALTY)


def generate(pairs: int, seed: int) -> list[Example]:
    """Draws preference pairs.

    Args:
      pairs: how many.
      seed: the same seed gives the same pairs.

    Returns:
      Examples with `responses` (chosen, rejected) by the drawn label, and their
      `true_rewards`.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    return [_pair(rng, index) for index in range(pairs)]


def _pair(rng: np.random.Generator, index: int) -> Example:
    dish = str(rng.choice(_DISHES))
    # The number makes prompts differ, so that held-out prompts are not seen in training.
    prompt = f"Guest {rng.integers(10_000)}: how is the {dish}?"
    texts, rewards = [], []
    for _ in range(2):
        adjectives = tuple(map(str, rng.choice(_ADJECTIVES, _ADJECTIVES_A_RESPONSE, replace=False)))
        wrong = rng.random() < _WRONG_DISH_RATE
        described = str(rng.choice([d for d in _DISHES if d != dish])) if wrong else dish
        first, second, third = adjectives
        texts.append(f" The {described} is {first}, {second} and {third}.")
        rewards.append(true_reward(adjectives, right_dish=not wrong))
    first_wins = rng.random() < 1 / (1 + np.exp(rewards[1] - rewards[0]))
    chosen, rejected = (0, 1) if first_wins else (1, 0)
    return Example(
        prompt,
        (texts[chosen], texts[rejected]),
        where=f"synthetic:{index}",
        true_rewards=(rewards[chosen], rewards[rejected]),
    )
