"""Two files, or the policies that are to write them, before a judge."""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpref.config import is_file
from jaxpref.data.chat import Chat
from jaxpref.data.records import check_source, read_records
from jaxpref.errors import UserError
from jaxpref.evaluation.generation import generate_file
from jaxpref.evaluation.judges.base import Comparison, Judge, Verdicts
from jaxpref.evaluation.judges.compare import compare_files
from jaxpref.evaluation.judges.endpoint import Asking, from_endpoint
from jaxpref.evaluation.judges.function import from_function
from jaxpref.evaluation.judges.person import from_person
from jaxpref.evaluation.judges.report import Judged, as_json, judged
from jaxpref.evaluation.judges.reward import from_reward_model
from jaxpref.evaluation.win_rates import Agreement, agreement
from jaxpref.rewards import find
from jaxpref.sampling import Sampling
from jaxpref.terminal import console, listed
from jaxpref.workdir import as_folder, as_path, is_address


class Reading(NamedTuple):
    """How models read and write, where a policy or a judge is one.

    Attributes:
      prompts: file of the prompts that policies answer; empty for those of the other file.
      sampling: how policies answer.
      chat_template: see `tokenizer.chat_template`; empty for each model's own.
      batch_size: rows of tokens that a reward model scores at a time.
      max_length: tokens of a prompt with a response for a reward model, see
        `evaluation.score_file`.
    """

    prompts: str = ""
    sampling: Sampling = Sampling()
    chat_template: str = ""
    batch_size: int = 16
    max_length: int = 0


_ASKING, _READING = Asking(), Reading()


def judge_files(
    a: str,
    b: str,
    judge: str | Judge,
    output: str | Path,
    *,
    asking: Asking = _ASKING,
    reading: Reading = _READING,
    seed: int = 0,
    compare: str = "",
) -> Judged:
    """How often the responses of A are preferred to those of B.

    A line of the output is a prompt, with lists that have an entry for each comparison of two
    responses: `responses_a`, `responses_b`, `a_first` and `a_second` (A's scores when its response
    came first, and second; null without a verdict), `scores` (their mean), and `lengths_a` and
    `lengths_b` in characters. The summary is in `OUTPUT.summary.json`, what an endpoint or a
    person has answered in `OUTPUT.answers`, what policies have sampled in `OUTPUT.a.jsonl` and
    `OUTPUT.b.jsonl`. With these the same call resumes.

    Args:
      a: file of responses (see `compare_files`); or a run's workdir, a Hugging Face directory or
        hub name of a policy, which is sampled first.
      b: the same.
      judge: a reward model's workdir, directory or hub name; `module:function`;
        `endpoint:MODEL`; `terminal`; or a function of comparisons.
      output: receives one JSON object a prompt.
      asking: how an endpoint is asked.
      reading: how models read and write.
      seed: of what policies sample, of the orders that a person sees, and of the bootstrap.
      compare: the output of another judging of the same responses, to see how much both agree.

    Raises:
      UserError: the judge or the files cannot be used, or the judge fails.
      KeyboardInterrupt: the judging was stopped; what was answered is kept.
    """
    output = as_folder(output, "--output")
    _check_output(output, [a, b, compare, reading.prompts])
    name = judge if isinstance(judge, str) else "a function"
    which = {"a": a, "b": b, "judge": name}
    _check_same(output, which)
    others = _means_of(compare) if compare else {}
    _check_sides(a, b, reading)
    opened = open_judge(judge, output, asking, reading, seed) if isinstance(judge, str) else judge
    paths = _sampled(a, b, output, reading, seed)
    compared = compare_files(*paths)
    console.print(
        f"{compared.prompts:,} prompts, {len(compared.comparisons):,} comparisons"
        f"{listed(compared.counts)}"
    )
    if compare:
        _check_others(compared.comparisons, others, compare)
    verdicts = decide(compared.comparisons, opened)
    found = judged(compared.comparisons, verdicts, compared.counts, seed)
    lines = _lines(compared.comparisons, verdicts)
    if compare:
        found = found._replace(agreement=_agreement(lines, others, compare, seed))
    _write(output, "".join(json.dumps(x, ensure_ascii=False, default=str) + "\n" for x in lines))
    _write(_summary(output), json.dumps({**which, **as_json(found)}, indent=1) + "\n")
    return found


def open_judge(name: str, output: Path, asking: Asking, reading: Reading, seed: int) -> Judge:
    """The judge of a name, before anything is sampled or asked.

    Args:
      name: see `judge_files`.
      output: beside which answers are kept.
      asking: how an endpoint is asked.
      reading: how a reward model reads.
      seed: of the orders that a person sees.

    Raises:
      UserError: there is no such judge.
    """
    answers = output.with_name(f"{output.name}.answers")
    if name == "terminal":
        return from_person(answers, seed=seed)
    kind, colon, model = name.partition(":")
    if kind == "endpoint" and colon:
        if not model:
            raise UserError("judge=endpoint: names no model; it should be endpoint:MODEL.")
        return from_endpoint(model, answers, asking)
    if colon and not is_address(name) and not Path(name).exists():
        return from_function(f"the judge {name!r}", find(name, "judge"))
    return from_reward_model(
        name,
        batch_size=reading.batch_size,
        max_length=reading.max_length,
        chat_template=reading.chat_template,
    )


def decide(comparisons: Sequence[Comparison], judge: Judge) -> Verdicts:
    """The verdicts on all comparisons: the judge's, and ties where the responses are equal.

    Raises:
      UserError: the judge fails.
      KeyboardInterrupt: the judging was stopped.
    """
    asked = np.array([x.a != x.b for x in comparisons], bool)
    different = [x for x in comparisons if x.a != x.b]
    said = judge(different) if different else Verdicts(np.zeros(0))
    orders = []
    for scores in (said.first, said.second):
        every = np.full(len(comparisons), 0.5)
        if scores is not None:
            every[asked] = scores
        orders.append(every)
    return Verdicts(orders[0], None if said.second is None else orders[1], said.told)


def _check_output(output: Path, inputs: Sequence[str]) -> None:
    """Refuses an output before anything is spent on it."""
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"{output}: should be a file to write, in a directory that exists.")
    if same := [path for path in inputs if path and Path(path).resolve() == output.resolve()]:
        raise UserError(f"{same[0]}: is read, so it cannot be the output. Give another output.")


def _summary(output: Path) -> Path:
    return output.with_name(f"{output.name}.summary.json")


def _check_same(output: Path, which: Mapping[str, str]) -> None:
    """Refuses to write over another judging, which may have cost much."""
    try:
        before = json.loads(_summary(output).read_text(encoding="utf-8"))
        different = [name for name in which if before[name] != which[name]]
    except (OSError, ValueError, LookupError, TypeError):
        # There is none, or no summary of a judging.
        return
    if different:
        name = different[0]
        raise UserError(
            f"{output}: holds another judging, whose {name} was {before[name]}, and this one's is "
            f"{which[name]}. Give another output, or remove it with its .summary.json."
        )


def _is_policy(side: str) -> bool:
    return not (is_file(side) or as_path(side).is_file())


def _check_sides(a: str, b: str, reading: Reading) -> None:
    """Refuses missing files, and policies without prompts."""
    for key, path in (("a", a), ("b", b), ("prompts", reading.prompts)):
        if path and not (key != "prompts" and _is_policy(path)):
            check_source(path, key)
    if reading.prompts and not (_is_policy(a) or _is_policy(b)):
        raise UserError(
            f"prompts={reading.prompts}: {a} and {b} are files, so nothing is sampled; leave "
            "prompts out."
        )
    if _is_policy(a) and _is_policy(b) and not reading.prompts:
        raise UserError(f"{a} and {b} are both policies; name a file of prompts for them.")


def _sampled(a: str, b: str, output: Path, reading: Reading, seed: int) -> list[str]:
    """The files of both sides; a policy's is sampled here, or goes on."""
    paths = []
    for name, side, other in (("a", a, b), ("b", b, a)):
        if not _is_policy(side):
            paths.append(side)
            continue
        path = output.with_name(f"{output.name}.{name}.jsonl")
        written = generate_file(
            side,
            reading.prompts or other,
            path,
            reading.sampling,
            seed=seed,
            chat_template=reading.chat_template,
        )
        console.print(f"{path}: {written.prompts:,} prompts{listed(written.counts)}")
        paths.append(str(path))
    return paths


def _lines(comparisons: Sequence[Comparison], verdicts: Verdicts) -> list[dict[str, Any]]:
    """The output's lines."""
    columns = {"scores": verdicts.scores}
    if verdicts.second is not None:
        columns = {"a_first": verdicts.first, "a_second": verdicts.second, **columns}
    lines = []
    for _, places in groupby(range(len(comparisons)), key=lambda i: comparisons[i].number):
        some = list(places)
        here = [comparisons[i] for i in some]
        prompt = here[0].prompt
        lines.append(
            {
                "where": here[0].where,
                "prompt": list(prompt.messages) if isinstance(prompt, Chat) else prompt,
                "responses_a": [x.a for x in here],
                "responses_b": [x.b for x in here],
                "lengths_a": [len(x.a) for x in here],
                "lengths_b": [len(x.b) for x in here],
                **{name: [as_json(float(x[i])) for i in some] for name, x in columns.items()},
            }
        )
    return lines


def _means_of(path: str) -> dict[str, float]:
    """The score of each prompt in the output of a judging, by prompt and responses."""
    found = {}
    for record, where in read_records(path):
        try:
            scores = [float(score) for score in record["scores"] if score is not None]
            found[_key(record)] = float(np.mean(scores)) if scores else np.nan
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: is no line of a judging's output, which has 'prompt', 'responses_a', "
                f"'responses_b' and 'scores' ({type(error).__name__}: {error})."
            ) from error
    return found


def _key(line: Any) -> str:
    return json.dumps([line[name] for name in ("prompt", "responses_a", "responses_b")])


def _check_others(comparisons: Sequence[Comparison], others: dict[str, float], path: str) -> None:
    """Refuses another judging of other responses, before anybody is asked."""
    nothing = Verdicts(np.zeros(len(comparisons)))
    lines = _lines(comparisons, nothing)
    if any(_key(line) in others for line in lines):
        return
    swapped = any(
        _key({**line, "responses_a": line["responses_b"], "responses_b": line["responses_a"]})
        in others
        for line in lines
    )
    raise UserError(
        f"{path}: judges other responses than these, so there is nothing to compare."
        + (" It has A and B the other way round; give a and b in its order." if swapped else "")
    )


def _agreement(
    lines: Sequence[dict[str, Any]], others: dict[str, float], path: str, seed: int
) -> Agreement:
    """How much this judging agrees with another, over the prompts that both have a score for."""
    ours = {}
    for line in lines:
        scores = [score for score in line["scores"] if score is not None]
        if scores and not np.isnan(others.get(_key(line), np.nan)):
            ours[_key(line)] = float(np.mean(scores))
    if len(ours) < 2:
        raise UserError(
            f"{path}: has a score for {len(ours)} of these prompts with these responses; to say "
            "how much two judges agree, both should have judged at least 2 alike."
        )
    left = len(lines) - len(ours)
    console.print(f"{path}: {len(ours):,} prompts are compared, {left:,} have no score in both")
    return agreement(np.array([*ours.values()]), np.array([others[key] for key in ours]), seed=seed)


def _write(path: Path, text: str) -> None:
    """Writes a file whole, or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
