"""A language model at an endpoint as a judge, before a local server with faults."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from judge_server import FAULTS, responses_in, ruled, score_of, serving
from test_cli import ENVIRONMENT, ROOT, wait_for
from test_rewards import read_lines, write_lines

from jaxpref import evaluation
from jaxpref.commands import no_room
from jaxpref.errors import UserError
from jaxpref.evaluation.judges import Asking, answers
from jaxpref.evaluation.judges.client import read_completion

openai = pytest.importorskip("openai")

KEY = "sk-of-a-test-1234567890"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A client that waits for a shorter time, and no key of the developer's."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def files(folder, prompts):
    """Two files, in which every response has a length of its own."""
    sides = {"a": lambda i: 3 + (i * 7) % 13, "b": lambda i: 2 + (i * 5) % 11}
    return [
        write_lines(
            folder / f"{name}.jsonl",
            [{"prompt": f"Question {i}?", "responses": [name * length(i)]} for i in range(prompts)],
        )
        for name, length in sides.items()
    ]


def judge(folder, server, prompts=4, **asking):
    """Files of so many prompts before the server."""
    return evaluation.judge_files(
        *files(folder, prompts),
        "endpoint:m",
        folder / "out.jsonl",
        asking=Asking(base_url=server.url, **asking),
    )


def now_and_then(question, before):
    """A fault in about a tenth of the requests, of any kind, but not thrice for one question."""
    drawn = int(hashlib.sha256(f"{before}{question}".encode()).hexdigest(), 16)
    return FAULTS[drawn // 10 % len(FAULTS)] if drawn % 10 == 0 and before < 2 else None


@pytest.mark.parametrize(
    "prompts", [50, pytest.param(1000, marks=pytest.mark.long)], ids=["100", "2000"]
)
def test_with_faults_none_is_lost_and_no_answered_one_is_asked_again(prompts, tmp_path):
    with serving(fault=now_and_then) as server:
        found = judge(tmp_path, server, prompts)
        assert len(server.answered) == 2 * prompts
        assert {*server.answered.values()} == {1}
        assert len(server.requests) > 2.1 * prompts
        again = judge(tmp_path, server, prompts)
        assert {*server.answered.values()} == {1}
    assert again == found
    for line in read_lines(tmp_path / "out.jsonl"):
        assert line["scores"] == [score_of(*line["responses_a"], *line["responses_b"])]
    assert found.position_bias == 0
    assert found.told["answers"] == 2 * prompts


def test_a_judge_who_always_says_first_gets_a_half_and_a_bias_of_1(tmp_path):
    with serving(lambda question: "Preferred: A") as server:
        found = judge(tmp_path, server, template="summary")
    assert found.win_rate.rate == 0.5
    assert found.win_rate.ties == 4
    assert found.position_bias == 1.0


def test_what_is_asked_is_announced_and_what_it_cost_is_told(tmp_path, capsys):
    with serving() as server:
        judge(tmp_path, server, price=(1.0, 1000.0), max_requests=8)
        told = capsys.readouterr().out
        characters = sum(map(len, server.asked))
    assert f"m: 8 questions to ask, 0 answered before; about {characters // 4:,} tokens in" in told
    assert "at most 8,192 out, which is $8.19 at most" in told
    assert f"m: 8 questions asked, {characters:,} tokens in and 56 out, $0.06" in told
    (body, headers), *_ = server.requests
    assert body.keys() == {"model", "messages", "temperature", "max_tokens"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 1024)
    assert headers["authorization"] == "Bearer none"


def test_so_many_questions_as_were_said_are_under_way_at_a_time(tmp_path):
    def slow(question):
        time.sleep(0.05)
        return "[[A]]"

    with serving(slow) as server:
        judge(tmp_path, server, 5, at_once=4)
    assert server.most == 4


def test_more_than_max_requests_is_refused_before_the_first(tmp_path):
    with serving() as server:
        with pytest.raises(UserError, match="8 questions are to be asked, and max_requests is 7"):
            judge(tmp_path, server, max_requests=7)
        assert not server.requests


def test_answers_without_a_verdict_are_asked_for_again_then_counted(tmp_path, capsys):
    said = {}

    def mumble(question):
        time_of = said[question] = said.get(question, 0) + 1
        if "Question 0" in question or ("Question 1" in question and time_of < 3):
            return "Who knows?"
        return "[[A]]" if "aaa" in responses_in(question)[0] else "[[B]]"

    with serving(mumble) as server:
        found = judge(tmp_path, server)
        assert sorted(server.answered.values()) == [1, 1, 1, 1, 3, 3, 3, 3]
        # At temperature 0 the same would be said again.
        temperatures = [body["temperature"] for body, _ in server.requests]
        assert sorted(temperatures) == [0] * 8 + [1] * 8
        assert judge(tmp_path, server) == found
        assert len(server.requests) == 16
        # More attempts ask for what has no verdict alone.
        judge(tmp_path, server, attempts=4)
        assert len(server.requests) == 18
    assert (found.win_rate.rate, found.prompts_without_score) == (1.0, 1)
    assert (found.if_all_lost, found.if_all_won) == (0.75, 1.0)
    assert found.told["answers_without_a_verdict"] == 2 * 3 + 2 * 2
    assert read_lines(tmp_path / "out.jsonl")[0]["a_first"] == [None]


def test_max_requests_holds_for_questions_that_are_asked_again(tmp_path, capsys):
    with serving(lambda question: "[[A]]" if "Question 1" in question else "Hm") as server:
        with pytest.raises(UserError, match="3 of 4 comparisons have no verdict that can be read"):
            judge(tmp_path, server, max_requests=10)
        assert len(server.requests) == 10
    assert "max_requests is reached; 4 answers without a verdict" in capsys.readouterr().out


def test_the_letters_probability_is_the_score(tmp_path):
    def sure(question):
        likeliest = [("A", 0.75), ("B", 0.25)]
        top = [{"token": name, "logprob": math.log(chance)} for name, chance in likeliest]
        return "A", [{"token": "A", "logprob": 0.0, "top_logprobs": top}]

    with serving(sure) as server:
        found = judge(tmp_path, server, template="chat_letter", logprobs=True)
        assert server.requests[0][0]["top_logprobs"] == 20
    assert found.win_rate.rate == 0.5
    assert found.position_bias == pytest.approx(0.5)
    line = read_lines(tmp_path / "out.jsonl")[0]
    assert line["a_first"] + line["a_second"] == pytest.approx([0.75, 0.25])
    with serving() as server, pytest.raises(UserError, match="gives no log-probs"):
        judge(tmp_path, server, 3, template="chat_letter", logprobs=True, max_tokens=9)
    with serving() as server, pytest.raises(UserError, match="asks for grades, not for a letter"):
        judge(tmp_path, server, template="chat_graded", logprobs=True)


def test_fields_of_the_request_are_set_and_left_out(tmp_path):
    fields = {"max_tokens": None, "max_completion_tokens": 9, "seed": 3}
    with serving() as server:
        judge(tmp_path, server, request=fields)
        body = server.requests[0][0]
        assert (body["max_completion_tokens"], body["seed"]) == (9, 3)
        assert "max_tokens" not in body
        with pytest.raises(UserError, match="'stream' is not to be set"):
            judge(tmp_path, server, request={"stream": True})


BROKEN = {
    "key": ("401 the key sk-of-a-test-1234567890 is wrong", 4, "refuses the key in OPENAI_API_KEY"),
    "forbidden": ("403 no", 4, r"\(403\); set OPENAI_API_KEY"),
    "model": ("404 no such model", 4, "does not know the model 'm'.*no such model"),
    "busy": ("429 slow down", 7 * 4, "answers with 429, though it was tried 7 times: .*slow down"),
    "broken": ("500 oh", 7 * 4, "answers with 500, though it was tried 7 times"),
    "html": ("html", 3 * 4, "not answer with a chat completion in JSON; 3 times .*Please wait"),
    "cut": ("cut", 3 * 4, "not answer with a chat completion"),
    "drop": ("drop", 7 * 4, "cannot be reached, though it was tried 7 times: "),
    "half": ("half", 7 * 4, "cannot be reached, though it was tried 7 times: "),
    "request": ("400 unknown field", 8, "refuses all 8 questions .*unknown field.* --request"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_endpoint_that_fails_for_good_is_told_and_asked_no_more(case, tmp_path, monkeypatch):
    fault, most, message = BROKEN[case]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(fault=lambda question, before: fault) as server:
        with pytest.raises(UserError, match=message) as caught:
            judge(tmp_path, server, 40, at_once=4)
        # Those under way at the first failure, and a few more while it comes to be known.
        assert 1 <= len(server.requests) <= 8 * most
        assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    assert "0 of 80 questions have answers, which are kept in" in str(caught.value)


def test_an_endpoint_that_fails_half_way_keeps_what_was_answered(tmp_path):
    def fault(question, before):
        return "500" if sum(server.answered.values()) >= 20 else None

    with serving(fault=fault) as server:
        with pytest.raises(UserError, match=r"2\d of 80 questions have answers, which are kept"):
            judge(tmp_path, server, 40, at_once=4)
        server.fault = lambda question, before: None
        judge(tmp_path, server, 40)
    assert len(server.answered) == 80
    assert {*server.answered.values()} == {1}


def test_an_endpoint_that_is_away_or_slow_is_told(tmp_path):
    with serving() as server:
        pass
    with pytest.raises(UserError, match=r"http://127.*/v1/ cannot be reached.*refused"):
        judge(tmp_path, server)
    slow = serving(lambda question: time.sleep(0.3) or "A")
    with slow as server, pytest.raises(UserError, match="has not answered in time"):
        judge(tmp_path, server, 2, timeout=0.02, at_once=2)


def test_a_question_that_is_refused_is_counted_and_the_others_are_judged(tmp_path, capsys):
    def fault(question, before):
        return "400 too long" if "Question 2" in question else None

    with serving(fault=fault) as server:
        found = judge(tmp_path, server, 40, at_once=2)
        assert found.prompts_without_score == 11
        assert found.told["questions_refused"] == 22
        # It has no answer, so it is asked again by the same command.
        assert judge(tmp_path, server, 40, at_once=2) == found
        assert {*server.answered.values()} == {1}
    told = capsys.readouterr().out
    assert "22 questions were refused, the first at" in told
    assert "too long" in told


def test_the_key_is_read_from_the_environment_and_written_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        judge(tmp_path, server)
        assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in capsys.readouterr().out
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())
    monkeypatch.setenv("OPENAI_API_KEY", "k\u00e9y")
    with pytest.raises(UserError, match="holds characters that are in no key"):
        judge(tmp_path, server)


def test_without_a_key_an_address_or_the_package_nothing_begins(tmp_path, monkeypatch):
    paths = [*files(tmp_path, 2), "endpoint:m", tmp_path / "x"]
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        evaluation.judge_files(*paths)
    with pytest.raises(UserError, match="should begin with http:// or https://"):
        evaluation.judge_files(*paths, asking=Asking(base_url="localhost:8000/v1"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'jaxpref\[judge\]'"):
        evaluation.judge_files(*paths)


def test_ctrl_c_waits_for_what_is_under_way_and_the_same_command_goes_on(tmp_path):
    sent = []

    def interrupting(question):
        if len(server.answered) >= 20 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.005)
        return "[[A]]"

    with serving(interrupting) as server:
        with pytest.raises(KeyboardInterrupt, match="of 80 questions have answers, which are kept"):
            judge(tmp_path, server, 40, at_once=4)
        kept = len(read_lines(tmp_path / "out.jsonl.answers"))
        assert 20 <= kept == len(server.answered) < 80
        judge(tmp_path, server, 40)
    assert len(server.answered) == 80
    assert {*server.answered.values()} == {1}


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, line):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(line[: self.room])
        self.room -= written
        return written


def test_a_full_disk_loses_no_answer_that_is_there(tmp_path, monkeypatch):
    enter = answers.Answers.__enter__

    def on_full_disk(self):
        enter(self)
        self._file = Full(self._file, 1000)
        return self

    with serving() as server:
        with monkeypatch.context() as patch:
            patch.setattr(answers.Answers, "__enter__", on_full_disk)
            with pytest.raises(OSError, match="No space left") as caught:
                judge(tmp_path, server, 20, at_once=1)
        assert "out.jsonl.answers: the disk is full" in no_room(caught.value)
        kept = read_lines(tmp_path / "out.jsonl.answers")
        assert 2 <= len(kept) < 40
        asked = len(server.requests)
        judge(tmp_path, server, 20)
        assert len(server.requests) == asked + 40 - len(kept)


def test_answers_are_whole_locked_and_their_own(tmp_path):
    path = tmp_path / "answers"
    with answers.Answers(path) as kept:
        kept.keep("x", {"text": "\ud800\n\u2028"})
        with pytest.raises(UserError, match="another command is asking"), answers.Answers(path):
            pass
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "y", "te')
    with answers.Answers(path) as kept:
        assert kept.get("x")["text"] == "\ud800\n\u2028"
        assert kept.get("y") is None
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(UserError, match="answers:2: is not an answer"), answers.Answers(path):
        pass


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"error": {"message": "no"}}',
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": 3}}]}',
        '{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": "many"}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_completion_is_none(completion):
    assert read_completion(completion) is None


def test_a_completion_may_say_nothing_and_not_what_it_cost():
    found = read_completion(json.dumps({"choices": [{"message": {"content": None}}]}))
    assert found == ("", None, None, False)


def test_answers_without_a_verdict_are_told_with_where_they_are(tmp_path, capsys):
    cut = [json.dumps({"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]})]
    assert read_completion(cut[0]).cut
    with serving(
        lambda question: "Both." if "Question 0" in question else ruled(question)
    ) as server:
        judge(tmp_path, server, attempts=2)
    told = " ".join(capsys.readouterr().out.split())
    assert "if none has to be asked again" in told
    assert "the answers to 2 questions have no verdict that can be read; they are in" in told
    assert "out.jsonl.answers. With more attempts" in told


@pytest.mark.parametrize(
    ("request_", "out"),
    [
        ({"max_tokens": None, "max_completion_tokens": 4000}, "at most 32,000 out"),
        ({"max_tokens": None}, "any number out"),
    ],
)
def test_what_an_answer_may_cost_follows_from_the_request(request_, out, tmp_path, capsys):
    with serving() as server:
        judge(tmp_path, server, request=request_)
    assert out in " ".join(capsys.readouterr().out.split())


@pytest.mark.process
def test_a_command_that_is_killed_goes_on_with_what_was_answered(tmp_path):
    a, b = files(tmp_path, 100)
    said = tmp_path / "out.jsonl.answers"
    command = [sys.executable, "-m", "jaxpref.judge", f"--a={a}", f"--b={b}"]
    command += ["--judge=endpoint:m", f"--output={tmp_path / 'out.jsonl'}"]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.DEVNULL}
    with serving(lambda question: time.sleep(0.02) or ruled(question)) as server:
        process = subprocess.Popen([*command, f"--base_url={server.url}"], **options)
        wait_for(lambda: said.exists() and said.read_bytes().count(b"\n") > 20, process)
        process.kill()
        process.wait()
        kept = said.read_bytes().count(b"\n")
        # Those that were under way, 16 at a time, are lost, however busy the machine is.
        assert kept >= len(server.requests) - 16
    # Another server, which no request of the command that was killed can reach late.
    with serving() as server:
        subprocess.run([*command, f"--base_url={server.url}"], **options, check=True)
        assert len(server.requests) == 200 - kept
    assert len(read_lines(tmp_path / "out.jsonl")) == 100


@pytest.mark.process
def test_the_command(tmp_path):
    """What is printed, and a mistake in a sentence."""
    a, b = files(tmp_path, 4)
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    with serving() as server:
        flags = [f"--a={a}", f"--b={b}", "--judge=endpoint:m", f"--base_url={server.url}"]
        flags += [f"--output={tmp_path / 'out.jsonl'}", "--price=0.1,0.4", '--request={"seed": 1}']
        command = [sys.executable, "-m", "jaxpref.judge", *flags]
        done = subprocess.run(command, env=ENVIRONMENT, **options)
        assert done.returncode == 0, done.stderr
        assert "win rate at equal lengths" in done.stdout
        assert "8 questions to ask" in done.stdout
        assert server.requests[0][0]["seed"] == 1
        for flag, message in (
            ("--price=free", "--price=free: should be two numbers"),
            ("--request=[]", "should be a JSON object"),
            ("--template=x", "the template is 'x'; it should be one of summary"),
            ("--a=", "give --a=FILE"),
        ):
            done = subprocess.run([*command, flag], env=ENVIRONMENT, **options)
            assert done.returncode == 2
            assert message in done.stderr
            assert "Traceback" not in done.stderr
