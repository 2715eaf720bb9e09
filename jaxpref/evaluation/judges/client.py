"""Questions to an endpoint that speaks OpenAI's protocol of chat completions, many at once."""

import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxpref.errors import UserError

Question = TypeVar("Question")
Said = TypeVar("Said")

# Waiting is the client's own: after a 408, 409, 429 or 5xx, a time-out or a lost connection it asks
# again, after as long as the endpoint says, else after 0.5, 1, 2, ... 8 seconds.
_RETRIES = 6
# How often an answer that is no completion at all is asked for, before it is taken as the rule.
_UNUSABLE = 3
_SHOWN = 200


class Answer(NamedTuple):
    """What an endpoint has answered.

    Attributes:
      text: of the answer.
      tokens: how many went in and came out; None where the endpoint does not say.
      likeliest: each token of the text with the log-probs (nats) of the likeliest tokens in its
        place; None where this was not asked for, or not given.
      cut: whether it was cut by length.
    """

    text: str
    tokens: tuple[int, int] | None
    likeliest: Sequence[tuple[str, Mapping[str, float]]] | None
    cut: bool = False


class RefusedError(Exception):
    """The endpoint does not take a question (400, 413, 422), and would not the next time."""


class Client:
    """An endpoint, and the model that is asked there; a context in which it can be asked."""

    def __init__(self, model: str, *, base_url: str = "", timeout: float = 120.0):
        """Reads the key from the environment; nothing is asked yet.

        Args:
          model: as the endpoint names it.
          base_url: of the endpoint, as in "http://localhost:8000/v1"; empty for OpenAI's.
          timeout: seconds until a request counts as lost.

        Raises:
          UserError: the package `openai` is missing, or there is no key.
        """
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "a judge at an endpoint needs the package openai: pip install 'jaxpref[judge]'."
            ) from error
        if base_url and not base_url.startswith(("http://", "https://")):
            raise UserError(
                f"base_url is {base_url!r}; it should begin with http:// or https://, as in "
                "http://localhost:8000/v1."
            )
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key and not base_url and not os.environ.get("OPENAI_BASE_URL"):
            raise UserError(
                "OPENAI_API_KEY is not set: put the endpoint's key into this variable of the "
                "environment, or name a server that needs none (base_url)."
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that are in no key; set it anew.")
        self._openai, self._model, self._key = openai, model, key
        self._base_url, self._timeout = base_url, timeout

    def __enter__(self) -> "Client":
        self._client = self._openai.OpenAI(
            # A server that needs no key gets one that says so.
            api_key=self._key or "none",
            base_url=self._base_url or None,
            max_retries=_RETRIES,
            timeout=self._timeout,
        )
        self._url = str(self._client.base_url)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, question: str, parameters: Mapping[str, Any]) -> Answer:
        """One answer.

        Args:
          question: what the user of the model says.
          parameters: further fields of the request.

        Raises:
          RefusedError: the endpoint does not take this question.
          UserError: the endpoint is away, refuses the key, does not know the model, or does not
            answer as this protocol says.
        """
        openai = self._openai
        try:
            for _ in range(_UNUSABLE):
                raw = self._client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=[{"role": "user", "content": question}],
                    extra_body=dict(parameters),
                )
                text = raw.http_response.text
                if (answer := read_completion(text)) is not None:
                    return answer
        except openai.APITimeoutError as error:
            raise UserError(f"{self._url} has not answered in time, {_tried()}.") from error
        except openai.APIConnectionError as error:
            cause = self._without_key(str(error.__cause__ or error))
            raise UserError(f"{self._url} cannot be reached, {_tried()}: {cause}.") from error
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        raise UserError(
            f"{self._url} does not answer with a chat completion in JSON; {_UNUSABLE} times it "
            f"answered as in {self._without_key(text[:_SHOWN])!r}. Is this the endpoint's "
            "base_url, which often ends in /v1?"
        )

    def _refusal(self, error: Any) -> Exception:
        """The error that an answer with another status than 200 stands for."""
        status = error.status_code
        if status in (401, 403):
            # The endpoint's own words may have a part of the key in them.
            given = "the key in OPENAI_API_KEY" if self._key else "a request without a key"
            return UserError(f"{self._url} refuses {given} ({status}); set OPENAI_API_KEY.")
        said = self._without_key(error.message)[:_SHOWN]
        if status == 404:
            return UserError(
                f"{self._url} does not know the model {self._model!r}, or this is not its base_url "
                f"({said})."
            )
        if status in (400, 413, 422):
            return RefusedError(said)
        if status in (408, 409, 429) or status >= 500:
            return UserError(f"{self._url} answers with {status}, {_tried()}: {said}.")
        return UserError(f"{self._url} refuses the request ({said}).")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "...") if self._key else text


def _tried() -> str:
    return f"though it was tried {1 + _RETRIES} times"


def read_completion(text: str) -> Answer | None:
    """The answer in a chat completion; None if the text is none."""
    try:
        completion = json.loads(text)
        choice = completion["choices"][0]
        # A model that says nothing, or refuses, has null here.
        said = choice["message"].get("content") or ""
        usage, listed = completion.get("usage"), (choice.get("logprobs") or {}).get("content")
        tokens = usage and (int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        likeliest = listed and [
            (token["token"], {other["token"]: other["logprob"] for other in token["top_logprobs"]})
            for token in listed
        ]
        cut = choice.get("finish_reason") == "length"
        if not isinstance(said, str):
            return None
        return Answer(said, tokens or None, likeliest or None, cut)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def ask_all(
    ask: Callable[[Question], Said],
    questions: Iterable[Question],
    threads: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[Question, Said | Exception]]:
    """Asks many questions at once.

    A thread asks its next question when an answer has been dealt with: at no time are there more
    than `threads` answers that were paid for and are not yet kept.

    Args:
      ask: gives an answer, or raises.
      questions: to be asked in this order.
      threads: how many questions are under way at a time.
      stopped: whether no further question is to be asked. Those under way are still answered.

    Yields:
      Questions in the order in which they are answered, with their answers or errors.
    """
    waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
    for question in questions:
        waiting.put(question)
    threads = min(threads, waiting.qsize())
    done: queue.SimpleQueue[tuple[Question, Said | Exception] | None] = queue.SimpleQueue()
    dealt_with = threading.Semaphore(0)

    def work() -> None:
        while not stopped():
            try:
                question = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((question, ask(question)))
            except Exception as error:
                done.put((question, error))
            dealt_with.acquire()
        done.put(None)

    for _ in range(threads):
        # A command that is ended does not wait for an answer.
        threading.Thread(target=work, daemon=True).start()
    for _ in range(threads):
        while (answered := done.get()) is not None:
            yield answered
            dealt_with.release()
