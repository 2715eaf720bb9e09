"""Judges of which of two responses is better, and the win rates that they give.

A judge is a function of comparisons (`base`): a reward model (`reward`), a Python function
(`function`), a language model at an endpoint (`endpoint`, which asks what `templates` say through
`client`, and reads it by `verdicts`), or a person at the terminal (`person`). What the last two
answer is kept on disk (`answers`). `compare` reads what is compared, `report` says what it comes
to, and `judging` joins them.
"""

from jaxpref.evaluation.judges.base import Comparison, Judge, Verdicts
from jaxpref.evaluation.judges.compare import prompt_text, response_text
from jaxpref.evaluation.judges.endpoint import Asking
from jaxpref.evaluation.judges.judging import Reading, decide, judge_files, open_judge
from jaxpref.evaluation.judges.report import Judged, table

__all__ = [
    "Asking",
    "Comparison",
    "Judge",
    "Judged",
    "Reading",
    "Verdicts",
    "decide",
    "judge_files",
    "open_judge",
    "prompt_text",
    "response_text",
    "table",
]
