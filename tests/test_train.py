import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import (
    algorithms,
    checkpoint,
    config as config_lib,
    metrics,
    reference,
    train,
    workdir as workdir_lib,
)
from jaxpref.errors import UserError
from jaxpref.train import layout, loop

pytestmark = pytest.mark.usefixtures("one_device")


def small(algorithm="dpo", **changes):
    """A run of seconds: generated data, 16 wide, one compiled shape."""
    config = config_lib.default(algorithm)
    config.update_from_flattened_dict(
        {
            "model.width": 16,
            "model.layers": 1,
            "model.heads": 2,
            "model.kv_heads": 2,
            "model.head_dim": 8,
            "model.feed_forward": 16,
            "data.format": "synthetic",
            "data.synthetic_pairs": 60,
            "data.eval_fraction": 0.2,
            "data.batch_size": 8,
            # A whole batch of those held out, so that one shape is compiled.
            "eval.max_examples": 8,
            "data.max_length": 128,
            "data.max_prompt_length": 64,
            "optimizer.learning_rate": 1e-3,
            "train.steps": 4,
            "train.log_every": 1,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    return config


def final_params(workdir):
    """The parameters of the last checkpoint, as NumPy arrays by path."""
    import orbax.checkpoint as ocp

    step = checkpoint.latest_step(workdir)
    with ocp.StandardCheckpointer() as checkpointer:
        folder = workdir_lib.absolute(workdir / "checkpoints" / str(step) / "params")
        tree = checkpointer.restore(folder)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def assert_same_params(one, other):
    one, other = final_params(one), final_params(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def lines_of(workdir):
    return metrics.read(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished SFT run and a finished DPO run from it."""
    folder = tmp_path_factory.mktemp("runs")
    train.run(small("sft"), folder / "sft")
    train.run(small(model__init_from=str(folder / "sft")), folder / "dpo")
    return folder


def test_a_run_leaves_what_it_promises(finished, tmp_path):
    workdir = finished / "dpo"
    lines = lines_of(workdir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    trained = {
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    }
    assert trained <= lines[1].keys()
    speed = {f"perf/{name}" for name in ("tokens_per_second", "pairs_per_second", "step_seconds")}
    assert any(speed <= line.keys() for line in lines)
    evaluated = {f"eval/{name}" for name in trained - {"grad_norm", "learning_rate"}}
    truth = {"eval/rewards/rank_correlation", "eval/rewards/best_accuracy"}
    assert evaluated | truth <= lines[0].keys()
    assert evaluated | truth <= lines[-1].keys()
    sides = ("train_examples", "held_out_examples", "held_out_unused")
    assert sum(lines[0][f"data/{side}"] for side in sides) == 60
    conftest.plot_curves(lines, tmp_path / "curves.png", "dpo")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert list((workdir / "tensorboard").iterdir())
    assert checkpoint.latest_step(workdir) == 4


def test_before_the_first_update_policy_and_reference_are_one(finished):
    first = lines_of(finished / "dpo")[0]
    np.testing.assert_allclose(first["eval/loss"], np.log(2), rtol=1e-5)
    # Whether it is 0 but for rounding is the compiler's affair, who may not treat both alike.
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_dpo_starts_from_the_sft_weights(finished):
    sft, dpo = lines_of(finished / "sft")[-1], lines_of(finished / "dpo")[0]
    np.testing.assert_allclose(dpo["eval/logps/chosen"], sft["eval/logps/chosen"], rtol=1e-5)


def test_a_finished_run_run_again_changes_nothing(finished, capsys):
    before = lines_of(finished / "dpo")
    params = final_params(finished / "dpo")
    train.run(small(model__init_from=str(finished / "sft")), finished / "dpo")
    assert lines_of(finished / "dpo") == before
    for name, value in final_params(finished / "dpo").items():
        np.testing.assert_array_equal(value, params[name])
    assert "Held-out examples" in capsys.readouterr().out


def test_resuming_is_bit_identical_and_needs_nothing_but_the_workdir(finished, tmp_path):
    """Half the steps, then the rest: constant rates do not depend on the number of steps."""
    source = str(finished / "sft")
    train.run(small(model__init_from=source, train__steps=2), tmp_path / "run")
    assert lines_of(tmp_path / "run")[-1]["step"] == 2
    # Not even the weights it began with: the reference is kept in the workdir.
    train.run(small(), tmp_path / "run")
    assert_same_params(tmp_path / "run", finished / "dpo")
    ours, theirs = lines_of(tmp_path / "run"), lines_of(finished / "dpo")
    for step in (3, 4):
        a, b = (next(x for x in lines if x["step"] == step) for lines in (ours, theirs))
        assert a["loss"] == b["loss"]
        assert a["grad_norm"] == b["grad_norm"]


def test_other_data_under_the_same_name_is_refused(tmp_path):
    def pairs(name, *prompts):
        record = {"chosen": " a", "rejected": " b"}
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": p, **record}) + "\n" for p in prompts))
        return small(
            data__format="explicit",
            data__path=str(path),
            data__eval_fraction=0.0,
            data__batch_size=2,
            train__steps=1,
        )

    train.run(pairs("x.jsonl", "p", "q"), tmp_path / "run")
    with pytest.raises(UserError, match="data_fingerprint"):
        train.run(pairs("x.jsonl", "p", "r"), tmp_path / "run")
    # The same data elsewhere is the same data; with another path, it is told which.
    train.run(pairs("moved.jsonl", "p", "q"), tmp_path / "run")
    with pytest.raises(UserError, match=r"data.path: '.*y.jsonl' now, '.*x.jsonl' there"):
        train.run(pairs("y.jsonl", "p", "r"), tmp_path / "run")


def test_a_step_larger_than_the_data_is_refused(tmp_path):
    config = small(data__batch_size=64)
    with pytest.raises(UserError, match=r"data.batch_size is 64, but there are 4\d examples"):
        train.run(config, tmp_path)


def test_resuming_does_not_need_the_weights_it_began_with(finished, tmp_path):
    import shutil

    source = tmp_path / "moved"
    shutil.copytree(finished / "sft", source)
    config = small(model__init_from=str(source), train__steps=2)
    train.run(config, tmp_path / "run")
    shutil.rmtree(source)
    config.train.steps = 4
    train.run(config, tmp_path / "run")
    assert_same_params(tmp_path / "run", finished / "dpo")


@pytest.fixture
def mixture(tmp_path):
    """Two files of pairs, with margins in neither."""
    entries = []
    for name, count, weight in (("fruit", 30, 1.0), ("soup", 14, 2.5)):
        record = {"chosen": f" {name}, please", "rejected": " no"}
        lines = [json.dumps({"prompt": f"{name} {i}?", **record}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        entries.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    return {"data__format": "auto", "data__mixture": tuple(entries)}


@pytest.mark.long
def test_mixed_sources_are_evaluated_apart_and_resume_bit_identical(mixture, tmp_path, capsys):
    train.run(small(**mixture), tmp_path / "whole")
    train.run(small(**mixture, train__steps=2), tmp_path / "parts")
    train.run(small(**mixture, data__cache=str(tmp_path / "kept")), tmp_path / "parts")
    assert_same_params(tmp_path / "whole", tmp_path / "parts")
    first, *_, last = lines_of(tmp_path / "whole")
    assert {"eval/loss", "eval/fruit/loss", "eval/soup/loss"} <= last.keys()
    np.testing.assert_allclose(first["eval/soup/loss"], np.log(2), rtol=1e-5)
    assert last["eval/fruit/loss"] != last["eval/soup/loss"]
    bounds = sorted(last[f"eval/{name}/loss"] for name in ("fruit", "soup"))
    assert bounds[0] < last["eval/loss"] < bounds[1]
    assert "fruit.jsonl: read as format 'explicit', by its columns" in capsys.readouterr().out


def test_a_mixture_of_other_weights_is_another_run(mixture, tmp_path):
    train.run(small(**mixture, train__steps=1), tmp_path / "run")
    mixture["data__mixture"][0]["weight"] = 9.0
    with pytest.raises(UserError, match=r"data.mixture: .*'weight': 9.0.* now"):
        train.run(small(**mixture), tmp_path / "run")


def test_a_missing_reference_or_fewer_steps_are_errors(finished, tmp_path):
    import shutil

    shutil.copytree(finished / "dpo", tmp_path / "run")
    with pytest.raises(UserError, match=r"already at step 4, beyond train.steps = 2"):
        train.run(small(train__steps=2), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reference")
    with pytest.raises(UserError, match="frozen reference of this run cannot be found"):
        train.run(small(train__steps=6), tmp_path / "run")


def test_precomputed_log_probs_are_used_again_only_for_the_same_reference(finished, tmp_path):
    first = small(reference__mode="precomputed", train__steps=1)
    train.run(first, tmp_path)
    table = tmp_path / "reference_logps.npz"
    written = table.stat().st_mtime_ns

    def forget_checkpoints():
        import shutil

        shutil.rmtree(tmp_path / "checkpoints")

    forget_checkpoints()
    train.run(first, tmp_path)
    assert table.stat().st_mtime_ns == written
    forget_checkpoints()
    with pytest.raises(UserError, match="data fingerprint"):
        train.run(small(reference__mode="precomputed", seed=1), tmp_path)
    tables = reference.load_table(tmp_path, *fingerprints_of(table))
    assert tables.keys() == {"train", "held_out"}
    data_fingerprint, _ = fingerprints_of(table)
    with pytest.raises(UserError, match="reference digest"):
        reference.load_table(tmp_path, data_fingerprint, "another")
    assert reference.load_table(tmp_path, data_fingerprint, None).keys() == tables.keys()


def fingerprints_of(table):
    with np.load(table) as stored:
        return str(stored["data_fingerprint"]), str(stored["reference_digest"])


def test_digest_sees_a_bit_a_swap_and_nothing_else():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    bit, swap = x.copy(), x[::-1].copy()
    bit.view(np.uint32)[3, 3] ^= 1
    digests = [reference.digest({"a": jnp.asarray(v)}) for v in (x, x.copy(), bit, swap)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert reference.digest({"a": jnp.asarray(x, jnp.bfloat16)}) not in digests


def test_precomputed_reference_equals_live(finished, tmp_path):
    source = str(finished / "sft")
    precomputed = small(model__init_from=source, reference__mode="precomputed")
    precomputed.train.steps = 2
    train.run(precomputed, tmp_path)
    precomputed.train.steps = 4
    train.run(precomputed, tmp_path)
    assert not (tmp_path / "reference").exists()
    ours, live = lines_of(tmp_path), lines_of(finished / "dpo")
    for key in ("loss", "rewards/margins", "grad_norm"):
        np.testing.assert_allclose(ours[1][key], live[1][key], rtol=1e-4, atol=1e-4)
    # Later parameters may differ where a gradient is 0 but for rounding, to which the loss is deaf;
    # a table whose rows belong to other examples would change it much more.
    losses, expected = ([x["loss"] for x in lines if "loss" in x] for lines in (ours, live))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    np.testing.assert_allclose(ours[-1]["eval/loss"], live[-1]["eval/loss"], rtol=1e-3)


def test_reference_free_runs(tmp_path, capsys):
    """And what has no effect is told: a warm-up beyond the last step, evaluation of no data."""
    idle = {"optimizer__warmup_steps": 1, "train__eval_every": 1, "data__eval_fraction": 0.0}
    idle["eval__win_rate_prompts"] = 2
    train.run(small(reference__mode="free", train__steps=1, **idle), tmp_path)
    assert not (tmp_path / "reference").exists()
    told = capsys.readouterr().out
    assert "optimizer.warmup_steps is 1, which this run of 1 steps does not reach" in told
    assert "train.eval_every has no effect" in told
    assert "eval.win_rate_prompts has no effect" in told


def test_a_run_that_shows_no_samples_has_no_table_of_them(tmp_path, capsys):
    lines = [{"step": 0, "eval/loss": 1.0}, {"step": 1, "eval/loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "samples.jsonl").write_text("")
    loop._report(tmp_path, small())
    told = capsys.readouterr().out
    assert "0.500" in told
    assert "None" not in told
    assert "samples" not in told


def test_micro_batches_and_row_length_change_no_update(finished, tmp_path):
    """One global normaliser, and packing that only changes the cost: the same gradient."""
    config = small("sft", data__rows=2, data__row_length=160, train__steps=1)
    train.run(config, tmp_path)
    ours, whole = lines_of(tmp_path)[1], lines_of(finished / "sft")[1]
    for key in ("loss", "grad_norm", "logps/chosen"):
        np.testing.assert_allclose(ours[key], whole[key], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm__beta": 0.3}, "algorithm.beta: 0.3 now, 0.1 there"),
        ({"seed": 1}, "seed: 1 now, 0 there"),
        ({"data__synthetic_pairs": 50}, "data.synthetic_pairs: 50 now, 60 there"),
    ],
)
def test_workdir_of_another_run_is_an_error_that_lists_what_differs(finished, change, message):
    with pytest.raises(UserError, match=f"holds the checkpoint of another run.*(?s:.*){message}"):
        train.run(small(**change), finished / "dpo")


def test_weights_of_another_shape_are_an_error(finished, tmp_path):
    config = small(model__init_from=str(finished / "sft"), model__layers=2)
    with pytest.raises(UserError, match=r"model.layers is 1 there and 2 here; give --config"):
        train.run(config, tmp_path)


def test_weights_that_are_nowhere_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is neither a directory nor a hub name"):
        train.run(small(model__init_from="no/such/place"), tmp_path)


def test_workdir_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.run(small(), tmp_path / "file" / "run")


def test_nan_stops_naming_metric_and_step(tmp_path):
    config = small(
        train__steps=30,
        train__save_every=1,
        optimizer__learning_rate=1e38,
        optimizer__clip_norm=0.0,
    )
    message = r"step \d+: .*(loss|norm).* = (nan|inf).* Stopped; there is no checkpoint yet"
    with pytest.raises(UserError, match=message):
        train.run(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) is None
    assert all(np.isfinite(list(line.values())).all() for line in lines_of(tmp_path))


def test_nan_later_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Weights that turn bad at step 3 are never saved, and the save of step 2 is awaited."""
    original = layout.make_update

    def make_update(*args, **options):
        update = original(*args, **options)

        def breaks(state, *inputs):
            step = int(state.step) + 1
            state, measured = update(state, *inputs)
            if step == 3:
                roles = jax.tree.map(lambda x: x * jnp.nan, state.roles)
                state = state._replace(roles=roles)
            return state, measured

        return breaks

    monkeypatch.setattr(layout, "make_update", make_update)
    message = "step 3: loss after the update = nan. Stopped; the checkpoint of step 2 is kept"
    with pytest.raises(UserError, match=message):
        train.run(small(train__steps=9, train__save_every=1), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 2
    assert all(np.isfinite(x).all() for x in final_params(tmp_path).values())


def test_nan_in_evaluation_stops_too(tmp_path):
    config = small("sft", train__steps=1, optimizer__learning_rate=1e30, optimizer__clip_norm=0.0)
    with pytest.raises(UserError, match=r"step 1: .*(eval/|norm)"):
        train.run(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) is None


def test_log_lines_do_not_depend_on_interruptions(tmp_path):
    settings = {"train__log_every": 3, "train__save_every": 2}
    train.run(small("sft", train__steps=6, **settings), tmp_path / "whole")
    train.run(small("sft", train__steps=4, **settings), tmp_path / "parts")
    train.run(small("sft", train__steps=6, **settings), tmp_path / "parts")

    def losses(name):
        return [(x["step"], x["loss"]) for x in lines_of(tmp_path / name) if "loss" in x]

    assert losses("whole") == losses("parts")
    assert [step for step, _ in losses("whole")] == [1, 2, 3, 4, 6]


def test_a_run_that_trains_nothing_stops(tmp_path, monkeypatch):
    original = algorithms.build

    def frozen(config):
        algorithm = original(config)

        def loss(output, batch, inputs):
            return algorithm.loss(jax.tree.map(jax.lax.stop_gradient, output), batch, inputs)

        return algorithm._replace(loss=loss)

    monkeypatch.setattr(algorithms, "build", frozen)
    # A pass over the 48 examples.
    with pytest.raises(UserError, match="gradient was exactly zero everywhere in all 6 steps"):
        train.run(small(train__steps=10), tmp_path)
    assert checkpoint.latest_step(tmp_path) is None
