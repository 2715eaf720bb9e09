"""RewardBench: the sums by hand, and what is refused; `test_rewards` scores whole files."""

import numpy as np
import pytest
from test_rewards import write_lines

from jaxpref.data import read_examples
from jaxpref.errors import UserError
from jaxpref.evaluation import reward_bench
from jaxpref.evaluation.reward_bench import SECTIONS, SUBSETS_2, Question, results


def pair(subset, chosen, rejected):
    """A prompt of version 1 with its rewards."""
    return Question("x:1", subset, 1, 2), np.array([chosen, rejected])


def worth(*prompts):
    return results(*zip(*prompts, strict=True))


def every_subset(right):
    """A prompt of each of version 1's subsets, that of code right or not."""
    names = [name for section in SECTIONS.values() for name in section]
    return [pair(name, float(right(name)), 0.5) for name in names]


def test_a_section_counts_prompts_and_math_counts_as_much_as_code():
    assert reward_bench.COUNTS_AS["math-prm"] == 6 * 164
    found = worth(
        # Two prompts count as two: 1 of 3.
        pair("mt-bench-easy", 1.0, 0.0),
        pair("mt-bench-med", 0.0, 1.0),
        pair("mt-bench-med", 0.0, 1.0),
        pair("math-prm", 1.0, 0.0),
        *[pair("hep-js", 0.0, 1.0)] * 164,
    )
    assert found.subsets["mt-bench-med"] == (2, 0.0)
    assert found.sections == {"Chat": pytest.approx(1 / 3), "Reasoning": pytest.approx(984 / 1148)}
    assert found.score == pytest.approx((1 / 3 + 984 / 1148) / 2)
    assert "hep-cpp" in found.missing


def test_all_right_is_1_all_wrong_is_0_and_a_tie_is_wrong():
    for right, score in ((lambda n: 1, 1.0), (lambda n: 0, 0.0), (lambda n: 0.5, 0.0)):
        found = worth(*every_subset(right))
        assert found.score == score
        assert found.missing == ()
        assert list(found.sections) == ["Chat", "Chat Hard", "Safety", "Reasoning"]


def test_rewards_may_be_shifted_and_scaled():
    """A benchmark of order reads nothing else; Ties compares differences with each other."""
    rng = np.random.default_rng(0)
    asked = [Question("x:1", name, 1, 4) for name in SUBSETS_2[:-1] for _ in range(3)]
    asked += [
        Question("x:1", "Ties", 1 + 2 * (k > 3), 6, f"{'rt'[k > 3]}:{k % 4}") for k in range(8)
    ]
    asked = [q._replace(id=q.id.replace("r:", "ref:").replace("t:", "tied:")) for q in asked]
    given = [rng.normal(size=q.responses) for q in asked]
    before, after = (results(asked, values) for values in (given, [3 * x - 7 for x in given]))
    assert after.score == pytest.approx(before.score, rel=1e-9)
    assert 0 < before.score < 1


def test_responses_that_share_the_highest_reward_share_the_prompt():
    cases = {(1, 0, 0, 0): 1, (0, 0, 0, 0): 1 / 4, (1, 1, 0, 0): 1 / 2, (0, 1, 0, 0): 0}
    for rewards, score in cases.items():
        found = worth((Question("x:1", "Math", 1, 4), np.array(rewards, float)))
        assert found.score == score


# Rewards of the good and the bad responses, to the prompt with one good one and to that with
# several; and the two shares of margins and the last term that follow.
TIES = {
    "near each other": (([3.0], [0.0]), ([3.0, 2.5], [0.0]), 1, 1, np.tanh(2.5 / 0.5 - 1)),
    "near each other, a narrow reference": (([0.2], [0.0]), ([3, 2.5], [0]), 1, 0, np.tanh(-0.6)),
    "far apart": (([3.0], [0.0]), ([3.0, 1.0], [0.0]), 0, 0, np.tanh(-0.5)),
    "all the same": (([3.0], [0.0]), ([2.0, 2.0], [0.0]), 1, 1, 1.0),
    "all the same and as bad": (([3.0], [0.0]), ([0.0, 0.0], [0.0]), 0, 0, 0.0),
}


@pytest.mark.parametrize("case", TIES)
def test_ties_by_hand(case):
    single, several, preferred, hard, margin = TIES[case]
    single, several = ({"7": tuple(np.array(x, float) for x in both)} for both in (single, several))
    right = [float(good.min() > bad.max()) for x in (single, several) for good, bad in x.values()]
    expected = 0.3 * sum(right) + 0.2 * preferred + 0.2 * hard + 0.01 * margin
    assert reward_bench.ties_score(single, several) == pytest.approx(expected, abs=1e-12)


V1 = {"prompt": "Which soup?", "chosen": "Leek", "rejected": "None", "subset": "donotanswer"}
V2 = {"prompt": "2+3?", "chosen": ["5"], "rejected": ["4", "", "6"], "subset": "Math"}
GOOD = {"prompt": "A color?", "chosen": ["red"], "rejected": ["two"], "subset": "Ties"}
REFUSED = {
    "unknown": ([V1, {**V1, "subset": "donotask"}], r"x.jsonl:2: the subset is 'donotask'.*hep-js"),
    "both versions": ([V1, V2], "x.jsonl:1 is of .* version 1 .*x.jsonl:2 of version 2"),
    "two chosen": ([{**V2, "chosen": ["5", "five"]}], "2 chosen and 3 rejected .* subset Math"),
    "none rejected": ([{**V2, "rejected": []}], "1 chosen and 0 rejected"),
    "none at all": ([{**V2, "chosen": [], "rejected": []}], "are empty lists"),
    "no subset": ([{k: v for k, v in V1.items() if k != "subset"}], "no column 'subset'"),
    "no text": ([{**V2, "rejected": [5]}], "column 'rejected' should be text; got int"),
    "ties without ids": ([GOOD], "should be ref:N or tied:N in subset Ties; got ''"),
    "one id twice": ([{**GOOD, "id": "ref:1"}] * 2, "'ref:1', as at .*x.jsonl:1"),
    "no two together": ([{**GOOD, "id": "ref:1"}, {**GOOD, "id": "tied:2"}], "of the same N"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_the_benchmarks_is_refused(case, tmp_path):
    lines, message = REFUSED[case]
    path = write_lines(tmp_path / "x.jsonl", lines)

    def asked():
        examples, _ = read_examples(path, "reward_bench", keep_records=True)
        return reward_bench.questions(examples)

    with pytest.raises(UserError, match=message):
        asked()
