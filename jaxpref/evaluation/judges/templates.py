"""What a language model is asked, to tell which of two responses is better."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxpref.errors import UserError
from jaxpref.knobs import one_of

_PLACES = ("prompt", "first", "second")
_PLACE = re.compile("{(" + "|".join(_PLACES) + ")}")
# Room for some sentences before the verdict.
_MAX_TOKENS = 1024


class Template(NamedTuple):
    """A question with places for a prompt and two responses.

    Attributes:
      name: of the template, or the file that it is from.
      text: with `{prompt}`, `{first}` and `{second}`.
      max_tokens: how long an answer may be.
      letters: whether the verdict is a letter, whose probability can be read.
    """

    name: str
    text: str
    max_tokens: int = _MAX_TOKENS
    letters: bool = True

    def fill(self, prompt: str, first: str, second: str) -> str:
        """The question about a prompt and two responses, whatever braces there are in them."""
        texts = {"prompt": prompt, "first": first, "second": second}
        return _PLACE.sub(lambda place: texts[place[1]], self.text)


_SUMMARIES = """\
Here is a text, with two summaries of it. {question}

<text>
{prompt}
</text>

<summary_A>
{first}
</summary_A>

<summary_B>
{second}
</summary_B>

Write one sentence in which you compare the summaries, and say which one you prefer and why. Then \
write your choice alone on a last line. Keep to this form:
Comparison: <your sentence>
Preferred: <A or B>
"""

_SUMMARY = "Which of the two is better at telling the reader the main points of the text?"

_CONCISE = """\
Which of the two is better at telling the reader the main points of the text, and nothing that is \
minor or beside the point? The best summary is exact and short.\
"""

_DIALOGUE = """\
Here is what was said to a chat assistant, with two ways in which the assistant could go on. Which \
of the two helps the user more?

<conversation>
{prompt}
</conversation>

<response_A>
{first}
</response_A>

<response_B>
{second}
</response_B>

Write one sentence in which you compare the responses, and say which one is more helpful and why. \
Then write your choice alone on a last line. Keep to this form:
Comparison: <your sentence>
More helpful: <A or B>
"""

_RESPONSES = """\
Two assistants have answered the same user. Say whose answer serves the user better.

Look at whether an answer is correct, does what was asked, is useful, and is clear. Neither the \
length of an answer nor its place here should count for it or against it.

<user>
{prompt}
</user>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

"""

_CHAT = """\
Compare the two answers in a few sentences. Then write on a last line nothing but [[A]] if answer \
A is better, [[B]] if answer B is better, or [[C]] if neither is better than the other.
"""

_CHAT_GRADED = """\
First answer the user yourself, in short. Then compare the two answers with yours and with each \
other, and name their mistakes. Then write on a last line nothing but one of these verdicts:
[[A>>B]] if answer A is much better,
[[A>B]] if answer A is a little better,
[[A=B]] if they are about equally good,
[[B>A]] if answer B is a little better,
[[B>>A]] if answer B is much better.
"""

_CHAT_LETTER = """\
Reply with one letter and nothing else: A if answer A is better, B if answer B is better.
"""


def _named(*templates: Template) -> Mapping[str, Template]:
    return {template.name: template for template in templates}


TEMPLATES = _named(
    # The two questions of the DPO paper (Rafailov et al. 2023, arXiv 2305.18290, appendix C.2) on
    # summaries, and the one on dialogues, in other words.
    Template("summary", _SUMMARIES.replace("{question}", _SUMMARY), 256),
    Template("summary_concise", _SUMMARIES.replace("{question}", _CONCISE), 256),
    Template("dialogue", _DIALOGUE, 256),
    Template("chat", _RESPONSES + _CHAT),
    # The five verdicts of Arena-Hard (Li et al. 2024, arXiv 2406.11939).
    Template("chat_graded", _RESPONSES + _CHAT_GRADED, 4096, letters=False),
    # One letter, whose probability says more (as in AlpacaEval 2).
    Template("chat_letter", _RESPONSES + _CHAT_LETTER, 8),
)


def find_template(name: str) -> Template:
    """A template by its name, or from a file.

    Raises:
      UserError: there is neither, or the file lacks one of the three places.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{one_of('the template', name, tuple(TEMPLATES))} Or name a file.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the template cannot be read ({error}).") from error
    missing = [f"{{{place}}}" for place in _PLACES if f"{{{place}}}" not in text]
    if missing:
        raise UserError(
            f"{path}: a template should have the places {{prompt}}, {{first}} and {{second}}; "
            f"{', '.join(missing)} is not in it."
        )
    return Template(name, text)
