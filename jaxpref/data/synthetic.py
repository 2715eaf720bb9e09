"""Preference pairs whose true reward is known.

A guest asks about a dish; a response describes it, or by mistake another one, with three
adjectives. Each adjective has a fixed warmth. The true reward of a response is the sum
of its warmths, less a penalty if it describes the wrong dish. Labels are drawn from the
Bradley-Terry model with this reward, $p(y_1 \\succ y_2) = \\sigma(r(y_1) - r(y_2))$. So some
labels are wrong on purpose, and no model can be expected to agree with more labels than the
true reward does. `true_rewards` knows the reward of any other response, too.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpref.data.examples import Example

_DISHES = (
    "apple", "bread", "broth", "cake", "curry", "honey", "jam", "lemon", "melon", "milk",
    "noodles", "olive", "pasta", "peach", "pear", "pie", "plum", "rice", "salad", "soup",
    "stew", "tea", "tofu", "toast",
)  # fmt: skip
# Of these nobody asks in training.
_OTHER_DISHES = ("bean", "garlic", "kale", "mango", "onion", "papaya", "sorbet", "waffle")
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


# What a word counts that is no adjective of this task, or comes a second time.
_COLDEST = min(WARMTH.values())
# The true reward of a text that is no description at all, the lowest that there is.
LOWEST_REWARD = _ADJECTIVES_A_RESPONSE * _COLDEST - _WRONG_DISH_PENALTY

_ASKED = re.compile(f"how is the ({'|'.join(_DISHES + _OTHER_DISHES)})\\?\\Z")
_DESCRIBED = re.compile(r" The (\w+) is (\w+), (\w+) and (\w+)\.")


def true_rewards(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The true rewards of any responses to prompts of this task.

    It is a function for `reward.function`: jaxpref.data.synthetic:true_rewards.

    Args:
      prompts: as `generate` makes them, one a response.
      completions: of the form that `generate` gives its responses, " The tea is superb, fresh and
        mild."; any other text gets `LOWEST_REWARD`. A word in an adjective's place that is none of
        this task, or comes again, counts as the coldest one; another word than the dish that was
        asked about is the wrong dish.
      columns: whatever else is known; not read.

    Raises:
      ValueError: a prompt is none of this task.

    >>> true_rewards(["Guest 7: how is the tea?"], [" The tea is superb, fresh and mild."])[0] > 0
    True
    """
    return [_reward_of(*pair) for pair in zip(prompts, completions, strict=True)]


def _reward_of(prompt: str, response: str) -> float:
    asked, described = _ASKED.search(prompt), _DESCRIBED.fullmatch(response)
    if asked is None:
        raise ValueError(f"a prompt should ask how a dish is; got {prompt!r}.")
    if described is None:
        return LOWEST_REWARD
    dish, *words = described.groups()
    known = [word for word in dict.fromkeys(words) if word in WARMTH]
    missing = _ADJECTIVES_A_RESPONSE - len(known)
    return true_reward(tuple(known), right_dish=dish == asked[1]) + missing * _COLDEST


def generate(pairs: int, seed: int, *, shifted: bool = False) -> list[Example]:
    """Draws preference pairs.

    Args:
      pairs: how many.
      seed: the same seed gives the same pairs.
      shifted: whether guests are named in other words, and ask about dishes that are none of
        the task otherwise; so a policy can be asked what it has not been trained on.

    Returns:
      Examples with `responses` (chosen, rejected) by the drawn label, and their
      `true_rewards`.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    return [_pair(rng, index, shifted) for index in range(pairs)]


def _pair(rng: np.random.Generator, index: int, shifted: bool) -> Example:
    dish = str(rng.choice(_OTHER_DISHES if shifted else _DISHES))
    # The number makes prompts differ, so that held-out prompts are not seen in training.
    guest = f"Guest {rng.integers(10_000)}{' at table 7' if shifted else ''}"
    prompt = f"{guest}: how is the {dish}?"
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
