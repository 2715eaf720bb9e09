"""What a policy says to a file's prompts: generate, score, train; resumed, and refused."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_cli import ENVIRONMENT, ROOT, wait_for
from test_rewards import ASKED, read_lines, write_lines
from test_weights import GPT2, QWEN3, write_model

from jaxpref import config as config_lib, data as data_lib, evaluation, models, sampling
from jaxpref.data import read_examples
from jaxpref.errors import UserError
from jaxpref.evaluation import generate_file
from jaxpref.sampling import Sampling
from jaxpref.tokenizer import decode, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_device")

RECORDS = [
    {"prompt": f"{'Long ' * (i % 3)}question {i}?", "chosen": " Yes.", "rejected": " No.", "id": i}
    for i in range(6)
]
# A response of this model rarely ends by itself, so some bytes stop it as well.
STOPS = tuple(range(3, 50))
SETTINGS = Sampling(samples=2, max_new_tokens=5, stops=STOPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, a reward model of the same shape, prompts, and what is said to them."""
    folder = tmp_path_factory.mktemp("generation")
    write_model(folder / "model", QWEN3)
    model, params = models.from_pretrained(folder / "model")
    model, params = models.with_scalar_head(model, params, jax.random.key(1))
    models.save_pretrained(model, params, folder / "rewards", tokenizer=load_tokenizer("bytes"))
    write_lines(folder / "prompts.jsonl", RECORDS)
    folder.joinpath("said.jsonl").write_text("")
    written = generate(folder, folder / "said.jsonl")
    assert written.prompts == 6
    return folder


def generate(folder, output, settings=SETTINGS, prompts="prompts.jsonl", **options):
    options = {"seed": 3, "at_once": 4, **options}
    return generate_file(folder / "model", str(folder / prompts), output, settings, **options)


def test_what_is_said_is_scored_and_trained_on(folder, tmp_path):
    """Three commands in a row; nothing that the prompts' records had is lost."""
    said, path = read_lines(folder / "said.jsonl"), str(folder / "prompts.jsonl")
    tokenizer = load_tokenizer("bytes")
    for number, (record, line) in enumerate(zip(RECORDS, said, strict=True), start=1):
        assert record.items() <= line.items()
        assert line["where"] == f"{path}:{number}"
        assert len(line["logps"]) == 2
        assert all(logp < 0 for logp in line["logps"])
        ids = tokenizer("".join(line["responses"]), add_special_tokens=False).input_ids
        assert not set(ids) & set(STOPS)
    assert {reason for line in said for reason in line["finish"]} == {"stop", "length"}

    # The pair that the prompt came with is no longer what the record is read as.
    evaluation.score_file(folder / "rewards", str(folder / "said.jsonl"), tmp_path / "scored.jsonl")
    scored = read_lines(tmp_path / "scored.jsonl")
    assert [line | {"scores": 0} for line in scored] == [line | {"scores": 0} for line in said]
    examples, _ = read_examples(str(tmp_path / "scored.jsonl"))
    assert [example.responses for example in examples] == [tuple(x["responses"]) for x in said]
    config = config_lib.default("sft")
    config.data.update(path=str(tmp_path / "scored.jsonl"), eval_fraction=0.0)
    data = data_lib.load(config, tokenizer, "sft").train
    for index, line in enumerate(scored):
        best = int(np.argmax(line["scores"]))
        end = [tokenizer.eos_token_id] * (line["finish"][best] == "stop")
        # The name of a special token that was sampled is read as text.
        ids = tokenizer(
            line["responses"][best], add_special_tokens=False, split_special_tokens=True
        ).input_ids
        assert data.group(index).responses[0].tolist() == ([*ids, *end] or [tokenizer.eos_token_id])


def test_a_prompts_responses_hang_on_its_number_and_the_seed(folder, tmp_path):
    said = read_lines(folder / "said.jsonl")
    write_lines(
        folder / "fewer.jsonl", [RECORDS[0], {**RECORDS[1], "prompt": "Another?"}, *RECORDS[2:4]]
    )
    generate(folder, tmp_path / "out.jsonl", prompts="fewer.jsonl")
    lines = read_lines(tmp_path / "out.jsonl")
    for number in (0, 2, 3):
        assert lines[number]["responses"] == said[number]["responses"]
    generate(folder, tmp_path / "other.jsonl", prompts="fewer.jsonl", seed=4)
    assert [x["responses"] for x in read_lines(tmp_path / "other.jsonl")] != [
        x["responses"] for x in lines
    ]


def test_the_same_command_goes_on_and_another_one_is_refused(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    generate(folder, output)
    whole, said = output.read_bytes(), read_lines(folder / "said.jsonl")
    end = [i for i, byte in enumerate(whole) if byte == ord("\n")][2]
    output.write_bytes(whole[: end + 40])
    written = generate(folder, output)
    assert "has 3 of 6 prompts already" in capsys.readouterr().out
    for line, expected in zip(read_lines(output), said, strict=True):
        assert line["responses"] == expected["responses"]
        np.testing.assert_allclose(line["logps"], expected["logps"], atol=1e-4)
    cut = sum("length" in line["finish"] for line in said)
    assert written.counts["with_a_response_cut_by_length"] == cut
    done = output.read_bytes()
    assert generate(folder, output) == written
    assert output.read_bytes() == done

    with pytest.raises(UserError, match=r"other settings \(top_k was 0 and is 5; seed was 3 and"):
        generate(folder, output, SETTINGS._replace(top_k=5), seed=1)
    (tmp_path / "out.jsonl.settings").unlink()
    with pytest.raises(UserError, match=r"is there already, and out.jsonl.settings"):
        generate(folder, output)
    assert output.read_bytes() == done


@pytest.mark.long
def test_prompts_that_are_too_long_are_refused_cut_or_left_out(folder, tmp_path):
    settings = SETTINGS._replace(max_new_tokens=2)
    with pytest.raises(UserError, match=r"jsonl:2: the prompt has 16 tokens, over .*\(12\), as "):
        generate(folder, tmp_path / "x", settings, max_prompt_length=12)
    assert not (tmp_path / "x").exists()
    options = {"max_prompt_length": 12, "at_once": 2}
    cut = generate(folder, tmp_path / "x", settings, on_long_prompt="truncate", **options)
    left = generate(folder, tmp_path / "y", settings, on_long_prompt="skip", **options)
    assert (cut.prompts, cut.counts["prompts_cut"]) == (6, 4)
    assert (left.prompts, left.counts["dropped/long_prompt"]) == (2, 4)
    both = [read_lines(tmp_path / name) for name in ("x", "y")]
    assert [line["id"] for line in both[1]] == [0, 3]
    assert [both[0][i]["responses"] for i in (0, 3)] == [x["responses"] for x in both[1]]


class Recorded(Exception):
    """Ends a command where it would sample."""


@pytest.fixture
def settings_of(monkeypatch):
    """What a command would sample with, and the prompts' ids."""

    class Sampler:
        def __init__(self, model, settings, **options):
            self.settings = settings

        def prepare(self, params):
            return None

        def as_they_end(self, weights, prompts, keys):
            raise Recorded(self.settings, prompts)

    monkeypatch.setattr(evaluation.generation, "Sampler", Sampler)

    def record(*args, **options):
        with pytest.raises(Recorded) as found:
            generate_file(*args, **options)
        return found.value.args

    return record


def test_responses_stop_where_the_models_files_say(folder, tmp_path, settings_of):
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 1]}))
    talks = write_lines(tmp_path / "talks.jsonl", [{"prompt": ASKED, "responses": ["x"]}])
    template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    settings, (prompt,) = settings_of(
        folder / "model", talks, tmp_path / "x", Sampling(stops=(9,)), chat_template=template
    )
    path.unlink()
    assert settings.stops == (1, 0, 7, 9)
    tokenizer = load_tokenizer("bytes")
    assert prompt.tolist() == [*tokenizer("Which soup?", add_special_tokens=False).input_ids, 0]


@pytest.mark.long
def test_a_model_with_few_positions_takes_shorter_prompts(tmp_path, settings_of):
    write_model(tmp_path / "gpt2", GPT2)
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "x" * 95}])
    options = {"on_long_prompt": "truncate"}
    _, (prompt,) = settings_of(
        tmp_path / "gpt2", path, tmp_path / "o", Sampling(max_new_tokens=20), **options
    )
    assert len(prompt) == 80
    with pytest.raises(UserError, match="knows 100 positions"):
        generate_file(
            tmp_path / "gpt2",
            path,
            tmp_path / "o",
            Sampling(max_new_tokens=20),
            max_prompt_length=90,
        )


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ({"text": "x"}, {}, "has text alone"),
        ({"prompt": 1}, {}, "'prompt' should be text"),
        ({"prompt": "x"}, {"top_p": 2.0}, "top_p should be above 0 and at most 1; got 2.0"),
        ({"prompt": ASKED}, {}, "no chat template"),
    ],
)
def test_what_cannot_be_continued_is_refused(line, settings, message, folder, tmp_path):
    write_lines(tmp_path / "p.jsonl", [line])
    with pytest.raises(UserError, match=message):
        generate(folder, tmp_path / "x", Sampling(**settings), prompts=tmp_path / "p.jsonl")


def test_reward_models_and_models_that_diverged_are_refused(folder, tmp_path):
    path = str(folder / "prompts.jsonl")
    with pytest.raises(UserError, match="gives no words"):
        generate_file(folder / "rewards", path, tmp_path / "x", SETTINGS)
    said = sampling.Generated(
        np.zeros((1, 2), np.int32), np.array([2]), np.array([True]), np.full((1, 2), np.nan), None
    )
    with pytest.raises(UserError, match=r"here:1: the policy's log-probs are nan"):
        evaluation.generation._line(data_lib.Example("x", (), where="here:1"), said, None)


def command(name, *flags):
    return [sys.executable, "-m", f"jaxpref.{name}", *map(str, flags)]


@pytest.mark.long
def test_the_command(folder, tmp_path):
    """It takes what the function takes, and says a mistake in a sentence."""
    flags = [f"--model={folder / 'model'}", f"--prompts={folder / 'prompts.jsonl'}"]
    flags += [f"--output={tmp_path / 'out.jsonl'}", "--samples=2", "--max_new_tokens=3"]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    done = subprocess.run(command("generate", *flags), **options, check=True)
    assert "6 prompts, " in done.stdout
    generate_file(
        folder / "model",
        str(folder / "prompts.jsonl"),
        tmp_path / "ours.jsonl",
        Sampling(samples=2, max_new_tokens=3),
    )
    ours = read_lines(tmp_path / "ours.jsonl")
    theirs = read_lines(tmp_path / "out.jsonl")
    assert [line["responses"] for line in ours] == [line["responses"] for line in theirs]
    done = subprocess.run(command("generate", *flags[:1]), **options, check=False)
    assert "give --model=W" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_leaves_whole_lines_and_goes_on(which, folder, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(300)])
    said = tmp_path / "said.jsonl"
    flags = [f"--model={folder / 'model'}", f"--prompts={tmp_path / 'prompts.jsonl'}"]
    flags += [f"--output={said}", "--max_new_tokens=64", "--at_once=4"]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "text": True}
    process = subprocess.Popen(
        command("generate", *flags), **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(lambda: said.exists() and said.read_bytes().count(b"\n") > 3, process)
    process.send_signal(which)
    told, _ = process.communicate()
    assert "Traceback" not in told
    assert process.returncode == (-which if which == signal.SIGKILL else 130)
    before = read_lines(said)
    assert len(before) < 300
    subprocess.run(command("generate", *flags), **options, check=True, capture_output=True)
    after = read_lines(said)
    assert after[: len(before)] == before
    assert [line["prompt"] for line in after] == [f"Question {i}?" for i in range(300)]


def test_an_id_that_the_tokenizer_does_not_have_is_shown():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer("ab", add_special_tokens=False).input_ids
    assert decode(tokenizer, [ids[0], 390, 399, ids[1], 1]) == "a\ufffd\ufffdb</s>"
    assert decode(tokenizer, []) == ""
