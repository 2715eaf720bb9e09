"""Implicit rewards against true ones, where the data knows them."""

import numpy as np
from jaxtyping import Float


def reward_recovery(
    margins: Float[np.ndarray, " pairs"], true_rewards: Float[np.ndarray, "pairs 2"]
) -> dict[str, float]:
    """How well learned rewards of chosen and rejected responses recover the true ones.

    A reward is only determined up to a function of the prompt, since the Bradley-Terry
    likelihood does not change with it (Rafailov et al. 2023, arXiv 2305.18290, lemma 1).
    So rewards are compared after subtracting each prompt's mean, and a pair's margin says it all.

    Args:
      margins: learned reward of the chosen response less that of the rejected one.
      true_rewards: of the chosen and of the rejected responses.

    Returns:
      `rewards/rank_correlation`, Spearman's, 0 if all learned rewards are alike; and
      `rewards/best_accuracy`, the share of labels that the true reward agrees with
      (a tie counts half), which no one can expect to exceed.
    """
    from scipy import stats

    true_margins = true_rewards[:, 0] - true_rewards[:, 1]
    # A pair's rewards less their mean are plus and minus half its margin.
    learned = np.concatenate([margins, -margins])
    true = np.concatenate([true_margins, -true_margins])
    alike = np.ptp(learned) == 0 or np.ptp(true) == 0
    return {
        "rewards/rank_correlation": 0.0 if alike else float(stats.spearmanr(learned, true)[0]),
        "rewards/best_accuracy": float(np.mean((1 + np.sign(true_margins)) / 2)),
    }
