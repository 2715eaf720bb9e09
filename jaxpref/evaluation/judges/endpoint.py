"""A language model at an endpoint as a judge, who is asked in both orders."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpref.errors import UserError
from jaxpref.evaluation.judges.answers import Answers, key_of
from jaxpref.evaluation.judges.base import Comparison, Judge, Verdicts
from jaxpref.evaluation.judges.client import Answer, Client, RefusedError, ask_all
from jaxpref.evaluation.judges.templates import Template, find_template
from jaxpref.evaluation.judges.verdicts import find_verdict, letter_score
from jaxpref.interrupts import interrupts
from jaxpref.terminal import console, progress

# A rough mean of English texts, to know beforehand about how much a judgement costs.
_CHARACTERS_A_TOKEN = 4
# Fields of a request that say how many tokens an answer may have.
_LIMITS = ("max_tokens", "max_completion_tokens")
# The most that the protocol knows.
_LIKELIEST = 20
# One question may be too long; so many, and no other, tell of a wrong request.
_REFUSED_AT_FIRST = 8


class Asking(NamedTuple):
    """How an endpoint is asked.

    Attributes:
      base_url: of the endpoint, as in "http://localhost:8000/v1"; empty for OpenAI's.
      template: a name in `templates.TEMPLATES`, or a file.
      logprobs: whether the score is the probability of the verdict's letter.
      at_once: how many questions are under way at a time.
      attempts: how often a question is asked whose answer has no verdict.
      max_tokens: of an answer; 0 for what fits the template.
      max_requests: how many questions may be asked, at most; 0 for any number.
      price: of a million tokens, going in and coming out; None if it is not known.
      timeout: seconds until a request counts as lost.
      request: further fields of the request, for a model that needs them; None leaves one out.
    """

    base_url: str = ""
    template: str = "chat"
    logprobs: bool = False
    at_once: int = 16
    attempts: int = 3
    max_tokens: int = 0
    max_requests: int = 0
    price: tuple[float, float] | None = None
    timeout: float = 120.0
    request: Mapping[str, Any] = {}

    def check(self) -> None:
        """Refuses what no endpoint can be asked with.

        Raises:
          UserError: saying what is wrong.
        """
        for name, least in (("at_once", 1), ("attempts", 1), ("max_tokens", 0), ("timeout", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it should be at least {least}.")
        if self.price is not None and not min(self.price) >= 0:
            raise UserError(f"price is {self.price}; it should be two numbers from 0 on.")
        if own := {"model", "messages", "stream", "n"} & self.request.keys():
            raise UserError(f"request: {min(own)!r} is not to be set; the judge's own is used.")
        if self.logprobs and not find_template(self.template).letters:
            raise UserError(
                f"the template {self.template} asks for grades, not for a letter whose probability "
                "could be read; leave logprobs out, or take the template chat_letter."
            )


def from_endpoint(model: str, path: Path, asking: Asking) -> Judge:
    """A judge who is a language model at an endpoint.

    It is asked about every pair in both orders, so that one who prefers a place calls a tie. An
    answer without a verdict is asked for again, then counted. Every answer is kept on disk at
    once, and no question that has one is asked.

    Args:
      model: as the endpoint names it.
      path: of the answers.
      asking: how it is asked.

    Raises:
      UserError: the settings cannot be used, the package `openai` is missing, or there is no key.
    """
    asking.check()
    client = Client(model, base_url=asking.base_url, timeout=asking.timeout)
    template = find_template(asking.template)

    def judge(comparisons: Sequence[Comparison]) -> Verdicts:
        orders = [
            (template.fill(x.text, x.a, x.b), template.fill(x.text, x.b, x.a)) for x in comparisons
        ]
        places = {
            question: comparison.where
            for comparison, both in zip(comparisons, orders, strict=True)
            for question in both
        }
        with Answers(path) as kept, client:
            judging = _Judging(model, template, asking, kept, places)
            judging.run(client)
        scores = np.array([[judging.score(question) for question in both] for both in orders])
        return Verdicts(scores[:, 0], 1 - scores[:, 1], judging.told())

    return judge


class _Judging:
    """Questions, their answers so far, and what they have cost."""

    def __init__(
        self,
        model: str,
        template: Template,
        asking: Asking,
        kept: Answers,
        places: Mapping[str, str],
    ):
        """Takes the questions, each with the place of its prompt."""
        self._model, self._asking, self._kept, self._places = model, asking, kept, places
        self._max_tokens = asking.max_tokens or template.max_tokens
        self._made: list[Mapping[str, Any]] = []
        self._refused: dict[str, str] = {}
        self._failures: list[Exception] = []

    def run(self, client: Client) -> None:
        """Asks until every question has a verdict, or was asked as often as may be.

        Raises:
          UserError: the endpoint fails, or more would be asked than may be.
          KeyboardInterrupt: interrupted; the answers so far are kept.
        """
        waiting = self._waiting()
        self._announce(waiting)
        with interrupts("waiting for the answers under way") as interrupted:
            while waiting:
                self._round(client, waiting, lambda: bool(self._failures) or interrupted())
                if self._failures:
                    raise self._failure()
                if interrupted():
                    raise KeyboardInterrupt(f"interrupted. {self._so_far()}")
                waiting = self._waiting()
                if waiting and len(waiting) > (room := self._room()):
                    console.print(
                        f"{self._model}: max_requests is reached; {len(waiting) - room:,} answers "
                        "without a verdict are not asked for again"
                    )
                    waiting = dict(list(waiting.items())[:room])
        if len(self._refused) == len(self._places):
            raise self._refuses_all()
        if self._made:
            console.print(f"{self._model}: {self._cost(self._made)}")
        self._tell_unread()
        if self._refused:
            question, why = next(iter(self._refused.items()))
            console.print(
                f"{self._model}: {len(self._refused):,} questions were refused, the first at "
                f"{self._places[question]}: {why}"
            )

    def _tell_unread(self) -> None:
        """Tells of questions whose answers have no verdict, and what may be done."""
        unread = [q for q in self._places if self._answers(q) and np.isnan(self.score(q))]
        if not unread:
            return
        cut = sum(any(answer.get("cut") for answer in self._answers(q)) for q in unread)
        why = f", those to {cut:,} were cut by length (max_tokens)" if cut else ""
        console.print(
            f"{self._model}: the answers to {len(unread):,} questions have no verdict that can be "
            f"read{why}; they are in {self._kept.path}. With more attempts, or other parameters, "
            "these questions are asked anew"
        )

    def score(self, question: str) -> float:
        """The score of the response that came first; NaN if there is none."""
        found = (self._read(answer) for answer in self._answers(question))
        return next((score for score in found if score is not None), np.nan)

    def told(self) -> dict[str, Any]:
        """What was asked and spent for these questions, now and before."""
        answers = [answer for question in self._places for answer in self._answers(question)]
        tokens = _tokens(answers)
        return {
            "model": self._model,
            "template": self._asking.template,
            "answers": len(answers),
            "answers_without_a_verdict": sum(self._read(answer) is None for answer in answers),
            "questions_refused": len(self._refused),
            "tokens_in": tokens[0],
            "tokens_out": tokens[1],
            **({"dollars": self._dollars(tokens)} if self._asking.price else {}),
        }

    def _parameters(self, attempt: int) -> dict[str, Any]:
        parameters = {
            # At temperature 0 it would say the same again.
            "temperature": 0.0 if attempt == 0 else 1.0,
            "max_tokens": self._max_tokens,
            **({"logprobs": True, "top_logprobs": _LIKELIEST} if self._asking.logprobs else {}),
            **self._asking.request,
        }
        return {name: value for name, value in parameters.items() if value is not None}

    def _key(self, question: str, attempt: int) -> str:
        return key_of(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            parameters=self._parameters(attempt),
            attempt=attempt,
        )

    def _answers(self, question: str) -> list[Mapping[str, Any]]:
        """The answers to a question, of the first attempt and of those after it."""
        keys = (self._key(question, attempt) for attempt in range(self._asking.attempts))
        return [answer for key in keys if (answer := self._kept.get(key)) is not None]

    def _read(self, answer: Mapping[str, Any]) -> float | None:
        if self._asking.logprobs:
            return letter_score(answer["text"], answer["likeliest"])
        verdict = find_verdict(answer["text"])
        return verdict and verdict.score

    def _waiting(self) -> dict[str, int]:
        """The questions without a verdict that may be asked, with the number of the attempt."""
        waiting = {}
        for question in self._places:
            answers = self._answers(question)
            read = any(self._read(answer) is not None for answer in answers)
            if not read and len(answers) < self._asking.attempts and question not in self._refused:
                waiting[question] = len(answers)
        return waiting

    def _announce(self, waiting: Mapping[str, int]) -> None:
        """Tells what is going to be asked, and about what it costs.

        Raises:
          UserError: that is more than may be asked.
        """
        if not waiting:
            console.print(f"{self._model}: all {len(self._places):,} questions are answered")
            return
        limits = (self._parameters(0).get(name) for name in _LIMITS)
        most = max((limit for limit in limits if isinstance(limit, int)), default=0)
        tokens = sum(map(len, waiting)) // _CHARACTERS_A_TOKEN, most * len(waiting)
        out = f"at most {tokens[1]:,} out" if most else "any number out"
        price = f", which is ${self._dollars(tokens):,.2f} at most" if self._asking.price else ""
        console.print(
            f"{self._model}: {len(waiting):,} questions to ask, "
            f"{len(self._places) - len(waiting):,} answered before; about {tokens[0]:,} tokens in "
            f"(taken as {_CHARACTERS_A_TOKEN} characters each), {out}{price if most else ''}, if "
            "none has to be asked again"
        )
        if len(waiting) > self._room():
            raise UserError(
                f"{len(waiting):,} questions are to be asked, and max_requests is "
                f"{self._asking.max_requests:,}. Raise it, or judge fewer prompts."
            )

    def _room(self) -> int:
        """How many more requests may be made."""
        return (self._asking.max_requests or sys.maxsize) - len(self._made)

    def _round(
        self, client: Client, waiting: Mapping[str, int], stopped: Callable[[], bool]
    ) -> None:
        def ask(question: str) -> Answer:
            try:
                answer = client.ask(question, self._parameters(waiting[question]))
                if self._asking.logprobs and answer.likeliest is None:
                    raise UserError("the endpoint gives no log-probs; leave logprobs out.")
                return answer
            except RefusedError:
                raise
            except Exception as error:
                # It is noted here, since this thread asks the next question at once.
                self._failures.append(error)
                raise

        with progress(f"asking {self._model}", "answers") as tell:
            for question, answer in ask_all(ask, waiting, self._asking.at_once, stopped):
                self._take(question, waiting[question], answer)
                tell(len(self._made))

    def _take(self, question: str, attempt: int, answer: Answer | Exception) -> None:
        if isinstance(answer, Answer):
            record = answer._asdict()
            self._made.append(record)
            try:
                self._kept.keep(self._key(question, attempt), record)
            except OSError as error:
                self._failures.append(error)
        elif isinstance(answer, RefusedError):
            self._refused[question] = str(answer)
            known = self._made or any(map(self._answers, self._places))
            if len(self._refused) == _REFUSED_AT_FIRST and not known:
                self._failures.append(self._refuses_all())

    def _refuses_all(self) -> UserError:
        why = next(iter(self._refused.values()))
        return UserError(
            f"the endpoint refuses all {len(self._refused):,} questions that it was asked: {why}. "
            "Further fields of a request are set, or left out by null, with --request."
        )

    def _failure(self) -> Exception:
        first = self._failures[0]
        return UserError(f"{first} {self._so_far()}") if isinstance(first, UserError) else first

    def _so_far(self) -> str:
        answered = sum(bool(self._answers(question)) for question in self._places)
        return (
            f"{answered:,} of {len(self._places):,} questions have answers, which are kept in "
            f"{self._kept.path}; the same command asks the others."
        )

    def _dollars(self, tokens: tuple[int, int]) -> float:
        assert self._asking.price is not None
        return float(np.dot(self._asking.price, tokens)) / 1e6

    def _cost(self, answers: Sequence[Mapping[str, Any]]) -> str:
        tokens = _tokens(answers)
        silent = sum(answer["tokens"] is None for answer in answers)
        return (
            f"{len(answers):,} questions asked, {tokens[0]:,} tokens in and {tokens[1]:,} out"
            f"{f', without those of {silent:,} answers that do not tell' if silent else ''}"
            f"{f', ${self._dollars(tokens):,.2f}' if self._asking.price else ''}"
        )


def _tokens(answers: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Tokens in and out, of those answers that say it."""
    said = [answer["tokens"] for answer in answers if answer["tokens"] is not None]
    return sum(tokens[0] for tokens in said), sum(tokens[1] for tokens in said)
