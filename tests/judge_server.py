"""A local endpoint of chat completions, with a rule in place of a model."""

import json
import re
import threading
import zlib
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What a server may do in place of an answer.
FAULTS = ("429", "500", "drop", "half", "html", "cut")


def score_of(a, b):
    """The score of a response by a rule that knows nothing of lengths."""
    ranks = [zlib.crc32(text.encode()) for text in (a, b)]
    return 0.5 if ranks[0] == ranks[1] else float(ranks[0] > ranks[1])


def ruled(question):
    """The verdict by `score_of`, in the form of the template `chat`."""
    return f"One is better. [[{'BCA'[int(2 * score_of(*responses_in(question)))]}]]"


def responses_in(question):
    """The two responses that a question shows, first and second."""
    return re.findall(r"<(?:answer|response|summary)_[AB]>\n(.*?)\n</", question, re.DOTALL)


class Server:
    """What the endpoint says, and what it was asked.

    Attributes:
      url: its base URL.
      say: the answer's text, or its text and its log-probs, to a question.
      fault: what happens in place of an answer, given a question and how often it was asked before.
      asked: how often each question was asked.
      answered: how often each question was answered.
      requests: bodies and headers, in the order in which they came.
      most: how many requests were under way at a time, at most.
    """

    def __init__(self, say, fault):
        self.say, self.fault = say, fault
        self.asked, self.answered, self.requests = Counter(), Counter(), []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        self.http = _Http(("127.0.0.1", 0), _Handler)
        self.http.endpoint = self
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(say=ruled, fault=lambda question, before: None):
    """A server in a thread of its own."""
    server = Server(say, fault)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave in one packet.
    wbufsize = -1

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            before = server.asked[question]
            server.asked[question] += 1
            server.requests.append((body, dict(self.headers)))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            self.reply(server, question, body, server.fault(question, before))
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, server, question, body, fault):
        said = server.say(question)
        text, logprobs = said if isinstance(said, tuple) else (said, None)
        completion = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                    "logprobs": logprobs and {"content": logprobs},
                }
            ],
            "usage": {"prompt_tokens": len(question), "completion_tokens": 7, "total_tokens": 0},
        }
        whole = json.dumps(completion).encode()
        if fault is None:
            with server.lock:
                server.answered[question] += 1
            self.send(200, whole)
        elif fault == "drop":
            self.close_connection = True
        elif fault == "half":
            self.send(200, whole[: len(whole) // 2], length=len(whole))
            self.close_connection = True
        elif fault == "html":
            self.send(200, b"<html>Please wait.</html>", kind="text/html")
        elif fault == "cut":
            self.send(200, whole[: len(whole) // 2])
        else:
            # A status, perhaps with what is said beside it.
            status, _, message = fault.partition(" ")
            self.send(int(status), json.dumps({"error": {"message": message}}).encode())

    def send(self, status, body, *, kind="application/json", length=None):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body) if length is None else length))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)
