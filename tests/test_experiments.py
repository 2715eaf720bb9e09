"""Experiments: verdicts by intervals, jobs that are done once, tables and figures of both."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from jaxpref import experiments
from jaxpref.errors import UserError
from jaxpref.evaluation import enumerable
from jaxpref.experiments import (
    Claim,
    Diagram,
    Experiment,
    Job,
    Point,
    Published,
    bandit_study,
    decide,
    estimate,
    frontier_study,
    select,
)
from jaxpref.experiments.frontier_study import END, EXACT, FRESH
from jaxpref.experiments.report import in_words

RECORDS = Path(__file__).parents[1] / "configs" / "experiments"
# Those that are about the papers' own data, and at their size.
JUDGED = ("tldr", "hh", "cnn_dailymail")
GOOD, BAD = {"method": "good"}, {"method": "bad"}


def points(good, bad, over="seeds"):
    return [Point(GOOD, {"gain": good}, over), Point(BAD, {"gain": bad}, over)]


def test_an_estimate_is_students():
    values = np.random.default_rng(0).normal(2, 3, 12)
    found = estimate(values, "seeds")
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.error == pytest.approx(stats.sem(values))
    assert estimate([3.0], "")[:4] == (3, 0, 3, 3)
    assert np.isnan(estimate([3.0], "seeds").low)


def test_verdicts_go_by_the_whole_interval():
    claim = Claim("better", "gain", GOOD, BAD)
    noise = np.random.default_rng(0).normal(size=20)
    shared = 10 * np.random.default_rng(1).normal(size=20)
    assert decide(claim, points(1 + 0.1 * noise, 0 * noise)).verdict == "held"
    assert decide(claim, points(0 * noise, 1 + 0.1 * noise)).verdict == "did not hold"
    assert decide(claim, points(0.1 + noise, 0 * noise)).verdict == "not resolved"
    assert decide(claim, points(noise, noise)).verdict == "not resolved"
    # What both share unit by unit cancels, but only where the units are the same.
    paired = decide(claim, points(1 + 0.1 * noise + shared, shared))
    assert paired.verdict == "held"
    apart = decide(claim, points(1 + 0.1 * noise[:19] + shared[:19], shared))
    assert apart.verdict == "not resolved"
    assert apart.found.mean == pytest.approx((1 + 0.1 * noise + shared)[:19].mean() - shared.mean())


def test_one_unit_resolves_nothing_and_what_is_exact_everything():
    claim = Claim("better", "gain", GOOD, by=0.5)
    assert decide(claim, points([9.0], [0.0])).verdict == "not resolved"
    assert decide(claim, points([9.0], [0.0], over="")).verdict == "held"
    assert decide(claim, points([0.4], [0.0], over="")).verdict == "did not hold"


def test_a_claim_on_several_points_is_on_their_mean_in_each_unit():
    found = decide(Claim("x", "gain", {"method": ("good", "bad")}), points([1.0, 2.0], [3.0, 6.0]))
    assert found.found == estimate([2.0, 4.0], "seeds")
    for absent in (Claim("x", "gain", {"method": "ugly"}), Claim("x", "loss", GOOD, BAD)):
        nothing = decide(absent, points([1.0], [1.0]))
        assert (nothing.verdict, in_words(nothing)) == ("not measured", "no point has it")
    with pytest.raises(UserError, match="with points of other units"):
        decide(Claim("x", "gain", {}), [*points([1.0], [1.0]), *points([1.0], [1.0], "prompts")])


def of_jobs(*jobs, **fields):
    return Experiment(
        "A title",
        "A source.",
        jobs,
        [Diagram("panel", "beta", "gain"), Diagram("names", "method", "gain", joined=False)],
        [Claim("Good is better", "gain", GOOD, BAD)],
        **fields,
    )


def job(name, settings, done, values=(1.0, 1.1, 1.2)):
    def measured():
        done.append(name)
        return [Point({"method": name, "beta": 0.5}, {"gain": values})]

    return Job(name, settings, measured)


def test_jobs_are_done_once_and_again_where_their_settings_changed(tmp_path, capsys):
    done: list = []
    good, bad = job("good", {"seeds": 3}, done), job("bad", {}, done, (0.0, 0.1, 0.1))
    experiment = of_jobs(good, bad, published=[Published(BAD, "gain", 0.25, 0.125)])
    first = experiments.run(experiment, tmp_path)
    # A process that was killed leaves half a line.
    with (tmp_path / "points.jsonl").open("a") as file:
        file.write('{"job": "bad')
    again = experiments.run(experiment, tmp_path)
    assert done == ["good", "bad"]
    assert [v.verdict for v in first.verdicts] == [v.verdict for v in again.verdicts] == ["held"]
    assert again.points == first.points
    table = (tmp_path / "table.md").read_text()
    assert "| Good is better | difference 1.033 (0.8899 to 1.177) over 3 seeds | held |" in table
    assert "| bad | 0.5 | 0.06667 (0.03333) | 0.25 (0.125) | 3 seeds |" in table
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    experiments.run(of_jobs(job("good", {"seeds": 4}, done), bad), tmp_path)
    assert done == ["good", "bad", "good"]
    assert "1 jobs of other settings, not shown" in capsys.readouterr().out


def test_the_table_tells_the_settings_and_whose_it_is(tmp_path):
    experiment = of_jobs(job("good", {}, []), job("bad", {}, [], (0.0, 0.1, 0.1)))
    experiments.run(experiment, tmp_path, "seeds 3, steps 9")
    assert "\n\nSettings: seeds 3, steps 9.\n\n" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match=r"table\.md: is of another experiment.*--workdir"):
        experiments.run(experiment._replace(title="Another"), tmp_path)


def test_an_interruption_tells_what_is_kept(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    done: list = []
    experiment = of_jobs(job("good", {}, done), Job("bad", {}, interrupted))
    message = "1 of 2 jobs are done and kept in .*points.jsonl; the same command goes on"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match=message):
            experiments.run(experiment, tmp_path)
    assert done == ["good"]


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--config\.learning_rate should be above 0; got 0"):
        frontier_study.jobs(**{**SMALL, "learning_rate": 0})
    with pytest.raises(UserError, match=r"--config\.seeds should be at least 1; got 0"):
        frontier_study.jobs(**{**SMALL, "seeds": 0})
    with pytest.raises(
        UserError, match=r"good: gain of good, beta 0\.5 is not finite in all of its"
    ):
        experiments.run(of_jobs(job("good", {}, [], (1.0, np.nan))), tmp_path)
    (tmp_path / "points.jsonl").write_text('{"steps": 1}\n')
    with pytest.raises(UserError, match=r"points\.jsonl, line 1: is no line of an experiment's"):
        experiments.run(of_jobs(job("good", {}, [])), tmp_path)


SMALL = {
    "betas": (0.5, 2.0),
    "alphas": (0.1,),
    "pairs": (50, FRESH),
    "seeds": 2,
    "steps": 30,
    "batch_size": 16,
    "learning_rate": 0.05,
    "checkpoints": 3,
}


def frontier_job(**labels):
    (found,) = [
        j
        for j in frontier_study.jobs(**SMALL)
        if all(j.settings.get(k, labels[k]) == labels[k] for k in labels)
        and labels.keys() <= j.settings.keys()
    ]
    return found


def test_the_exact_frontier_is_above_best_of_n():
    found = frontier_study.jobs(**SMALL)[0].points()
    optimum, best = (select(found, {"method": name}) for name in ("optimum", "best of n"))
    assert all(p.over == "" and p.labels["at"] == EXACT for p in found)
    np.testing.assert_allclose([p.values["gain_share"] for p in optimum], 1, atol=1e-6)
    shares = np.ravel([p.values["gain_share"] for p in best if p.labels["n"] > 1])
    assert ((shares > 0.8) & (shares < 1)).all()


@pytest.mark.parametrize(
    "labels", [{"method": "dpo", "pairs": 50}, {"method": "ppo", "learns from": "true reward"}]
)
def test_a_method_climbs_the_frontier(labels):
    found = frontier_job(**labels).points()
    assert len(found) == 2 * 3
    assert {p.labels["step"] for p in found} == {1, 5, 30}
    with jax.enable_x64(True):
        task = enumerable.default_task()
        logps = enumerable.tabular(task.reference_logits, task.responses).sum(1)
        before = float((np.exp(logps) * task.rewards).sum())
    for beta in (0.5, 2.0):
        (end,) = select(found, {"beta": beta, "at": END})
        assert len(end.values["reward"]) == 2
        assert (np.array(end.values["reward"]) > before).all()
        assert (np.array(end.values["kl"]) > 0).all()
        assert (np.array(end.values["gain_share"]) <= 1 + 1e-9).all()
        # The seeds are different runs.
        assert np.ptp(end.values["reward"]) > 0


def test_bandits_are_measured_over_seeds():
    jobs = bandit_study.jobs(seeds=3, extra=(25, 100), extra_seeds=2)
    assert [j.settings["seeds"] for j in jobs] == [3, 3, 3, 2]
    found = jobs[1].points()
    assert [p.labels["method"] for p in found] == ["dpo", "rmb_po", "rmb_po_plus"]
    gaps = np.array([p.values["gap"] for p in found])
    assert gaps.shape == (3, 3)
    assert (gaps >= 0).all()
    assert np.ptp(gaps) > 0


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.py")), ids=lambda path: path.stem)
def test_records_are_whole(path, tmp_path):
    """Their claims and panels read labels and measures that their jobs could have."""
    record = runpy.run_path(str(path))
    sizes = ("paper", "tiny") if path.stem in JUDGED else ("full", "quick")
    for size in sizes:
        config = record["get_config"](size)
        if path.stem == "sentiment":
            (tmp_path / "sentences.jsonl.gz").touch()
            config.settings.sentences = str(tmp_path / "sentences.jsonl.gz")
        if "judge" in config:
            pytest.importorskip("openai")
            config.judge.update({"name": "endpoint:m", "base_url": "http://localhost:1/v1"})
        if size == "tiny":
            file = tmp_path / "test.jsonl"
            file.touch()
            config.test.path = config.pairs = str(file)
            if "sft" in config:
                config.sft = str(file)
        made = record["get_experiment"](config, str(tmp_path))
        keys = [j.key for j in made.jobs]
        assert len(set(keys)) == len(keys)
        assert all(json.loads(key) for key in keys)
        assert made.claims
        assert made.figure
        texts = [claim.text for claim in made.claims]
        assert len(set(texts)) == len(texts)
    with pytest.raises(
        ValueError, match=f"argument is 'ful'; it should be one of {', '.join(sizes)}"
    ):
        record["get_config"]("ful")
