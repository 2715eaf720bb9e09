"""Published data sets, read by their published rules.

Texts that a paper writes as dialogues have the marks of Anthropic's HH. One space stands before
each response, so that it is tokenised as it would be inside a text.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser

from jaxpref.data import columns
from jaxpref.data.examples import DivergentPromptError, Example, Excluded
from jaxpref.errors import UserError

ASSISTANT_TURN = "\n\nAssistant:"
_SUMMARY_TURN = "\n\nTL;DR:"
_PAIR = ("chosen", "rejected")
_IMDB_WORDS = (2, 8)
_HTML_BLOCKS = {"p", "pre", "blockquote", "ul", "ol", "h1", "h2", "h3", "hr", "table"}
_HTML_LINES = {"br", "li", "tr"}


def hh(record: Mapping, where: str) -> Example:
    """Anthropic/hh-rlhf (Bai et al. 2022, arXiv 2204.05862): pairs.

    Reads `chosen` and `rejected`, whole dialogues, and the columns of `columns.with_preference`.
    The prompt is everything through the last assistant mark, and must be the same in both.
    """
    chosen, rejected = (columns.text(record, name, where) for name in _PAIR)
    cut = chosen.rfind(ASSISTANT_TURN)
    if cut < 0:
        raise UserError(f"{where}: no {ASSISTANT_TURN!r} in the chosen dialogue.")
    cut += len(ASSISTANT_TURN)
    # A rejected dialogue may have more turns than the chosen one that it begins like; then the
    # last assistant mark of the two is not the same.
    if rejected[:cut] != chosen[:cut] or ASSISTANT_TURN in rejected[cut:]:
        raise DivergentPromptError(
            f"{where}: the chosen and the rejected dialogue part before the last assistant turn, "
            "so they have no common prompt. Skip such rows with --config.data.on_divergent=skip."
        )
    example = Example(chosen[:cut], (chosen[cut:], rejected[cut:]), where=where)
    return columns.with_preference(columns.not_empty(example, _PAIR), record)


def shp(record: Mapping, where: str, min_score_ratio: float = 2.0) -> Example:
    """stanfordnlp/SHP (Ethayarajh et al. 2022, arXiv 2110.08420): pairs.

    Reads `history`, `human_ref_A`, `human_ref_B`, `labels` (1 if A is preferred),
    `score_A` and `score_B`. Its card advises against pairs whose scores are close: those
    with a ratio below `min_score_ratio` are left out.
    """
    a_wins = columns.boolean(record, "labels", where)
    order = ("A", "B") if a_wins else ("B", "A")
    first, second = (columns.number(record, f"score_{side}", where) for side in order)
    low, high = sorted((first, second))
    if (high / low if low > 0 else math.inf) < min_score_ratio:
        raise Excluded("score_ratio")
    prompt = f"\n\nHuman: {columns.text(record, 'history', where)}{ASSISTANT_TURN}"
    responses = tuple(columns.text(record, f"human_ref_{side}", where) for side in order)
    return _spaced(Example(prompt, responses, (first, second), where), _PAIR)


def stack_exchange(record: Mapping, where: str) -> Example:
    """HuggingFaceH4/stack-exchange-preferences: answers ranked by score.

    Reads `question` and, of each of `answers`, `text` and `pm_score` (the score of Askell
    et al. 2021, arXiv 2112.00861: log2(1 + upvotes), rounded, and one more for the answer that
    was accepted; ties are many). HTML becomes text. A question with fewer than two answers is
    left out.
    """
    answers = columns.objects(record, "answers", where)
    if len(answers) < 2:
        raise Excluded("few_answers")
    places = [f"{where}: answer {i}" for i in range(len(answers))]
    scores = [columns.number(a, "pm_score", p) for a, p in zip(answers, places, strict=True)]
    texts = [html_to_text(columns.text(a, "text", p)) for a, p in zip(answers, places, strict=True)]
    prompt = f"\n\nHuman: {html_to_text(columns.text(record, 'question', where))}{ASSISTANT_TURN}"
    example = Example(prompt, tuple(texts), tuple(scores), where, ordered=False)
    return _spaced(example, tuple(f"answers[{k}]" for k in range(len(answers))))


def tldr(record: Mapping, where: str) -> Example:
    """openai/summarize_from_feedback, comparisons (Stiennon et al. 2020, arXiv 2009.01325): pairs.

    Reads `subreddit`, `title` and `post` of `info`, `text` of the two `summaries`, and
    `choice`, the place of the better one. The split `validation` also compares summaries of
    news, which have no `post` but an `article`; they are left out.
    """
    info = columns.column(record, "info", where)
    if not isinstance(info, Mapping):
        raise UserError(f"{where}: column 'info' should be an object; got {type(info).__name__}.")
    if info.get("post") is None and info.get("article") is not None:
        raise Excluded("not_a_post")
    summaries = columns.objects(record, "summaries", where)
    if len(summaries) != 2:
        raise UserError(f"{where}: there should be two summaries; got {len(summaries)}.")
    best = int(columns.boolean(record, "choice", where))
    responses = tuple(
        columns.text(summaries[k], "text", f"{where}: summary {k}") for k in (best, 1 - best)
    )
    return _spaced(Example(_reddit_post(info, where), responses, where=where), _PAIR)


def tldr_sft(record: Mapping, where: str) -> Example:
    """The posts and summaries that Stiennon et al. (arXiv 2009.01325) fine-tune on: sft.

    Reads `subreddit`, `title`, `post` and `summary`.
    """
    summary = columns.text(record, "summary", where)
    return _spaced(Example(_reddit_post(record, where), (summary,), where=where), ("summary",))


def ultrafeedback(record: Mapping, where: str) -> Example:
    """HuggingFaceH4/ultrafeedback_binarized (Tunstall et al. 2023, arXiv 2310.16944): pairs.

    Reads `chosen` and `rejected`, conversations, and `score_chosen` and `score_rejected`;
    equal scores are a tie.
    """
    dialogues = [columns.messages(record, name, where) for name in _PAIR]
    chosen, rejected = (columns.number(record, f"score_{name}", where) for name in _PAIR)
    return dataclasses.replace(
        columns.conversations(record, dialogues, _PAIR, where),
        scores=(chosen, rejected),
    )


def reward_bench(record: Mapping, where: str) -> Example:
    """allenai/reward-bench (arXiv 2403.13787) and reward-bench-2 (arXiv 2506.01937), to be scored.

    Reads `prompt`, what a user asks (or messages); `chosen` and `rejected`, what an assistant
    answers: a text, or in version 2 a list of texts; and `subset`. A model said the answers, and
    may have said nothing. In the example the chosen ones come first.
    """
    columns.text(record, "subset", where)
    if isinstance(record.get("prompt"), list):
        before = columns.messages(record, "prompt", where)
    else:
        before = [{"role": "user", "content": columns.text(record, "prompt", where)}]
    given = {name: columns.column(record, name, where) for name in _PAIR}
    said = [
        columns.as_text(text, f"{where}: column {name!r}")
        for name, value in given.items()
        for text in (value if isinstance(value, list) else [value])
    ]
    if not said:
        raise UserError(f"{where}: columns 'chosen' and 'rejected' are empty lists.")
    dialogues = [[*before, {"role": "assistant", "content": text}] for text in said]
    example = columns.conversations(record, dialogues, _PAIR, where, sampled=True)
    # Of several good or bad answers none is known to be better than another.
    return dataclasses.replace(example, ordered=len(said) == 2)


def imdb(record: Mapping, where: str) -> Example:
    """stanfordnlp/imdb (Maas et al. 2011), begun reviews as in Rafailov et al. 2023: unpaired.

    Reads `text`, and `label` if it is there: whether the review is positive, or -1 where nobody
    knows. The prompt is the review's first 2 to 8 words (arXiv 2305.18290, appendix C.1, has 2 to
    8 tokens, which depend on the tokenizer); how many follows from the text's hash. The response
    is the rest, which is empty if there is none.
    """
    review = columns.text(record, "text", where)
    low, high = _IMDB_WORDS
    digest = int.from_bytes(hashlib.sha256(review.encode()).digest()[:8], "big")
    count = low + digest % (high - low + 1)
    ends = [word.end() for word in re.finditer(r"\S+", review)][:count]
    end = ends[-1] if ends else 0
    known = record.get("label") not in (None, -1)
    label = columns.boolean(record, "label", where) if known else None
    return Example(review[:end], (review[end:],), where=where, label=label)


def cnn_dailymail(record: Mapping, where: str) -> Example:
    """abisee/cnn_dailymail (See et al. 2017, arXiv 1704.04368), articles to summarise: sft.

    Reads `article`, and `highlights` if they are there: the summary, which the authors of the
    articles have written.
    """
    prompt = columns.text(record, "article", where) + _SUMMARY_TURN
    if not record.get("highlights"):
        return Example(prompt, (), where=where)
    summary = columns.text(record, "highlights", where)
    return _spaced(Example(prompt, (summary,), where=where), ("highlights",))


def html_to_text(html: str) -> str:
    """The text of a piece of HTML, with a line for each item and an empty one between blocks.

    >>> html_to_text("<p>Is 1 &lt; 2?</p><ul><li>yes</li><li>no</li></ul>")
    'Is 1 < 2?\\n\\nyes\\nno'
    """
    parser = _TextOfHTML()
    parser.feed(html)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)).strip()


class _TextOfHTML(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break_lines(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _HTML_BLOCKS:
            self._break_lines(tag)

    def _break_lines(self, tag: str) -> None:
        lines = 2 if tag in _HTML_BLOCKS else 1 if tag in _HTML_LINES else 0
        before = "".join(self.parts[-2:])
        self.parts.append("\n" * max(lines - (len(before) - len(before.rstrip("\n"))), 0))


def _reddit_post(post: Mapping, where: str) -> str:
    subreddit, title, body = (columns.text(post, c, where) for c in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}{_SUMMARY_TURN}"


def _spaced(example: Example, names: tuple[str, ...]) -> Example:
    """The example with one space before each response, none of which may be empty."""
    responses = tuple(str(response).lstrip() for response in example.responses)
    columns.not_empty(dataclasses.replace(example, responses=responses), names)
    return dataclasses.replace(example, responses=tuple(f" {text}" for text in responses))
