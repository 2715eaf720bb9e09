"""Experiments that train: their runs, what policies say, and what is made of it."""

import json
import signal

import numpy as np
import pytest
from judge_server import serving

from jaxpref import checkpoint, config as config_lib
from jaxpref.data import synthetic
from jaxpref.errors import UserError
from jaxpref.evaluation.ngrams import NaiveBayes
from jaxpref.experiments import select
from jaxpref.experiments.baselines import Generated, Judged
from jaxpref.experiments.policies import Policy, Runs
from jaxpref.experiments.sentiment_study import efficiency
from jaxpref.experiments.win_rate_study import BEST_OF, USUAL, Recipes, Study
from jaxpref.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_device")


def small(method, **changes):
    config = config_lib.default(method)
    config.update_from_flattened_dict(
        {
            "model.width": 16,
            "model.layers": 1,
            "model.heads": 2,
            "model.kv_heads": 2,
            "model.head_dim": 8,
            "model.feed_forward": 16,
            "data.format": "synthetic",
            "data.synthetic_pairs": 40,
            "data.eval_fraction": 0.2,
            "data.batch_size": 8,
            "eval.max_examples": 8,
            "data.max_length": 128,
            "data.max_prompt_length": 64,
            "train.steps": 2,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    return config


def test_efficiency_is_the_jackknife_of_a_ratio():
    random = np.random.default_rng(0)
    gained, kl = random.normal(1, 1, 400), random.normal(4, 1, 400)
    values = efficiency(gained, kl)
    assert values.mean() == pytest.approx(gained.mean() / np.sqrt(kl.mean()), abs=1e-3)
    # As the delta method has it: the mean KL is nearly known.
    assert values.std() == pytest.approx(np.std(gained / 2 - kl / 16), rel=0.05)
    # Where all prompts have the same KL only the reward is uncertain.
    np.testing.assert_allclose(efficiency(gained, np.full(400, 4.0)), gained / 2)


def test_naive_bayes_by_hand():
    judge = NaiveBayes(["a good film", "good fun", "a bad film"], [1, 1, 0])
    # "good" is in both of the good texts and in none of the bad one.
    found = judge.log_odds(["good", "unheard"])
    assert found == pytest.approx(np.log([2 * (3 / 4) / (1 / 3), 2]))
    # A feature counts once, and pairs of neighbours are features, too.
    assert judge.log_odds(["good good"]) == judge.log_odds(["good"])
    assert judge.log_odds(["bad film"])[0] < judge.log_odds(["film bad"])[0]
    with pytest.raises(ValueError, match="a label for each of 2 texts, of both classes"):
        NaiveBayes(["a", "b"], [1, 1])


def test_folders_are_by_settings(tmp_path):
    one, other = Runs(tmp_path / "one"), Runs(tmp_path / "other")
    config = small("sft")
    assert one.folder("sft", config).name == other.folder("sft", config).name
    # The folder of the experiment is none of the settings, where a run begins from one of its own.
    begun = [
        r.folder("dpo", small("dpo", model__init_from=str(r.workdir / "runs" / "sft")))
        for r in (one, other)
    ]
    assert begun[0].name == begun[1].name
    assert one.folder("sft", small("sft", optimizer__learning_rate=1e-9)) != one.folder(
        "sft", config
    )
    # With a constant rate a run may go on; with a schedule its steps make another run.
    longer = small("sft", train__steps=9)
    assert one.folder("sft", longer) == one.folder("sft", config)
    assert one.folder("sft", small("sft", optimizer__schedule="cosine")) != one.folder(
        "sft", small("sft", optimizer__schedule="cosine", train__steps=9)
    )


def test_a_policy_agrees_with_itself(tmp_path):
    runs = Runs(tmp_path)
    folder = runs.train("sft", small("sft"))
    policy = Policy(folder)
    prompts = policy.prompts([pair.prompt for pair in synthetic.generate(3, seed=1)])
    sampling = Sampling(samples=2, max_new_tokens=8, temperature=(1.0, 0.5))
    answers = policy.answers(prompts, sampling)
    assert answers.logps.shape == (3, 2)
    assert len(answers.sampled.responses) == 6
    np.testing.assert_allclose(policy.logps(answers), answers.logps, rtol=1e-4)
    again = policy.answers(prompts, sampling)
    assert again.sampled.responses == answers.sampled.responses
    other = policy.answers(prompts, sampling, seed=1)
    assert other.sampled.responses != answers.sampled.responses


def test_a_signal_while_a_policy_is_saved_stops_the_job(tmp_path, monkeypatch):
    """Which trains no more when it is done again."""
    runs, wait = Runs(tmp_path), checkpoint.Checkpoints.wait

    def signalled(self):
        signal.raise_signal(signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", signalled)
    config = small("sft", train__steps=1)
    with pytest.raises(KeyboardInterrupt):
        runs.train("sft", config)
    assert checkpoint.latest_step(runs.train("sft", config)) == 1


@pytest.mark.long
def test_the_generated_task_end_to_end(tmp_path):
    ppo = small("ppo", sampling__samples=2, sampling__max_new_tokens=8, data__batch_size=4)
    recipes = Recipes(
        {"sft": small("sft"), "dpo": small("dpo"), "reward": small("reward"), "ppo": ppo}
    )
    baselines = {USUAL: Generated(), "shifted": Generated(shifted=True)}
    settings = {"prompts": 4, "samples": 2, "best_of": 4, "best_of_prompts": 3}
    study = Study(recipes, tmp_path, baselines, **settings, max_new_tokens=8, seed=0)
    (early,) = study.at_temperatures("dpo", (1.0,), steps=1).points()
    assert early.labels["step"] == 1
    found = [
        point
        for prompts in baselines
        for method in ("sft", "dpo", "ppo", BEST_OF)
        for point in study.at_temperatures(method, (0.0, 1.0), prompts=prompts).points()
    ]
    for point in found:
        assert (
            (np.array(point.values["win_rate"]) >= 0) & (np.array(point.values["win_rate"]) <= 1)
        ).all()
    (sft,) = select(found, {"method": "sft", "temperature": 1.0, "prompts": USUAL})
    np.testing.assert_allclose(sft.values["kl"], 0, atol=1e-4)
    assert len(select(found, {"method": BEST_OF, "prompts": "shifted"})) == 1
    with pytest.raises(UserError, match=r"already at step 2, beyond train.steps = 1"):
        study.at_temperatures("dpo", (1.0,), steps=1).points()
    best = study.over_n((1, 4)).points()
    (one,), (four,) = (select(best, {"n": n, "chosen by": "true reward"}) for n in (1, 4))
    assert np.mean(four.values["reward"]) >= np.mean(one.values["reward"])


@pytest.mark.long
def test_a_judge_at_an_endpoint_end_to_end(tmp_path):
    """From one start, without PPO: each run once, and nothing asked twice."""
    pytest.importorskip("openai")
    test = tmp_path / "test.jsonl"
    pairs = synthetic.generate(6, seed=3)
    lines = [{"prompt": str(p.prompt), "completion": str(p.responses[0])} for p in pairs]
    test.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipes = Recipes(
        {"start": small("sft"), "dpo": small("dpo"), "model": small("reward")},
        start="start",
        reward="model",
    )
    settings = {"prompts": 6, "samples": 2, "best_of": 4, "best_of_prompts": 3}
    with serving() as server:
        judge = {"name": "endpoint:m", "base_url": server.url}
        baselines = {USUAL: Judged(tmp_path, judge, {"path": str(test)})}
        study = Study(recipes, tmp_path, baselines, **settings, max_new_tokens=8, seed=0)
        jobs = [study.at_temperatures(name, (0.0, 1.0)) for name in ("start", "dpo", BEST_OF)]
        found = [point for job in jobs for point in job.points()]
        assert set(server.asked.values()) == {1}
    units = [
        (p.labels["method"], p.labels["temperature"], len(p.values["win_rate"])) for p in found
    ]
    assert units == [
        ("start", 0.0, 6),
        ("start", 1.0, 6),
        ("dpo", 0.0, 6),
        ("dpo", 1.0, 6),
        (BEST_OF, 1.0, 3),
    ]
    assert all(set(point.values["no_verdict"]) == {0.0} for point in found)
    assert len(list((tmp_path / "runs").iterdir())) == 3
