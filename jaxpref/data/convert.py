"""Converts what a data set holds to what an algorithm needs; nothing is converted by guessing."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

from jaxpref.data.examples import Example, Response, last_turn
from jaxpref.errors import UserError

# What an algorithm may need an example to hold, with the columns that hold it.
KINDS: dict[str, str] = {
    "sft": "one response to a prompt (prompt, completion; messages; instruction, output; or the "
    "best of several)",
    "pairs": "two responses to a prompt, the better one known (prompt, chosen, rejected; or "
    "prompt, responses, scores)",
    "ranked": "two or more responses in order (prompt, responses, scores; or prompt, chosen, "
    "rejected)",
    "unpaired": "one response with a label (prompt, completion, label; or prompt, chosen, "
    "rejected)",
    "mismatched": "one response with a label (prompt, completion, label; or prompt, chosen, "
    "rejected)",
    "prompts": "a prompt (any format but text)",
    "text": "plain text (text)",
    "responses": "responses in no order (prompt, responses)",
}


def kind_of(example: Example) -> str:
    """What an example holds: one of `KINDS`."""
    if example.prompt is None:
        return "text"
    if not example.ordered and example.scores is None:
        return "responses"
    if len(example.responses) > 2:
        return "ranked"
    if len(example.responses) == 2:
        return "pairs"
    if example.label is not None:
        return "unpaired"
    return "sft" if example.responses else "prompts"


def select(example: Example, places: Sequence[int], **changes: Any) -> Example:
    """The example with some of its responses, and with what is known of each of these.

    Args:
      example: the example.
      places: of the responses, in the order that they shall have.
      changes: further fields that change.
    """
    responses, scores, rewards = example.responses, example.scores, example.true_rewards
    finished = example.finished
    return dataclasses.replace(
        example,
        responses=tuple(responses[k] for k in places),
        scores=None if scores is None else tuple(scores[k] for k in places),
        true_rewards=None if rewards is None else tuple(rewards[k] for k in places),
        finished=None if finished is None else tuple(finished[k] for k in places),
        **changes,
    )


def best_first(example: Example) -> Example:
    """The example with its responses in falling order of scores; equal ones keep their order."""
    if example.ordered or example.scores is None:
        return example
    scores = example.scores
    return select(example, sorted(range(len(scores)), key=lambda k: -scores[k]), ordered=True)


def without_ties(example: Example) -> Example:
    """The example with only the first response of each score."""
    scores = example.scores or ()
    return select(example, [k for k in range(len(scores)) if scores[k] not in scores[:k]])


def ranked_to_pairs(example: Example, which: str = "best_worst") -> list[Example]:
    """Pairs of a better and a worse response.

    Args:
      example: two or more responses, best first.
      which: "best_worst" (one pair), "adjacent" (neighbours in the ranking) or "all".
    """
    if len(example.responses) == 2:
        return [example]
    return [select(example, pair, margin=None) for pair in _PAIRS[which](len(example.responses))]


def pairs_to_unpaired(example: Example) -> list[Example]:
    """The better response of a pair with the label True, the worse one with False."""
    return [select(example, [k], label=k == 0, margin=None) for k in range(len(example.responses))]


def ranked_to_sft(example: Example) -> Example:
    """The best response alone."""
    return select(example, [0], label=None, margin=None)


def to_prompt(example: Example) -> Example:
    """The prompt alone; for a conversation, all that is before its last turn."""
    example = last_turn(example) if len(example.responses) == 1 else example
    return dataclasses.replace(
        example,
        responses=(),
        scores=None,
        true_rewards=None,
        finished=None,
        label=None,
        margin=None,
    )


def adapt(
    examples: Iterable[Example],
    kind: str,
    *,
    found: str = "",
    ranked_pairs: str = "best_worst",
    on_tie: str = "error",
    on_contradiction: str = "error",
    on_identical: str = "keep",
) -> tuple[list[Example], Counter[str]]:
    """Converts examples to what an algorithm needs.

    Args:
      examples: of any kind.
      kind: one of `KINDS`.
      found: the format that they were read as, for messages.
      ranked_pairs: which pairs to take of more than two responses; see `ranked_to_pairs`.
      on_tie: what becomes of responses with the same score. "error" refuses the data; "skip"
        drops the comparison or, in a ranking, all but the first response of each score.
      on_contradiction: what becomes of a record whose order the scores contradict, or whose
        margin is below 0. "error" refuses the data, "keep" takes the order as it is, "skip"
        drops the record.
      on_identical: what becomes of a comparison of two equal responses: "keep" or "skip".

    Returns:
      The examples, and counts: `identical_responses` and `contradictions` of those kept,
        `unused_responses` that the algorithm does not need, `dropped/<reason>`.

    Raises:
      UserError: an example does not hold what is needed, or its order is a tie, or contradicted.
    """
    counts: Counter[str] = Counter()
    kind = "unpaired" if kind == "mismatched" else kind

    def compared(candidates: Iterable[Example]) -> Iterator[Example]:
        for example in candidates:
            if _is_tied(example) and on_tie != "skip":
                raise UserError(
                    f"{example.where}: two responses have the same score "
                    f"({', '.join(f'{score:g}' for score in example.scores or ())}), so "
                    "neither is the better one. Skip such comparisons with "
                    "--config.data.on_tie=skip."
                )
            if _is_tied(example):
                untied = without_ties(example)
                if len(untied.responses) < 2:
                    counts["dropped/tie"] += 1
                    continue
                counts["dropped/tied_response"] += len(example.responses) - len(untied.responses)
                example = untied
            if _has_identical(example.responses):
                skip = on_identical == "skip"
                counts["dropped/identical_responses" if skip else "identical_responses"] += 1
                if skip:
                    continue
            yield example

    def converted(example: Example) -> Iterable[Example]:
        has = kind_of(example)
        rivals = has in ("pairs", "ranked")
        if kind == "prompts" and has != "text":
            return [to_prompt(example)]
        example = best_first(example)
        if rivals and (why := _contradiction(example)):
            if on_contradiction == "error":
                raise UserError(
                    f"{example.where}: {why}, so the record contradicts itself. Are the columns "
                    "swapped? Skip such rows with --config.data.on_contradiction=skip, or take "
                    "their order as it is with =keep."
                )
            skip = on_contradiction == "skip"
            counts["dropped/contradiction" if skip else "contradictions"] += 1
            if skip:
                return []
        if rivals and kind != "ranked":
            unused = len(example.responses) - used(len(example.responses))
            counts.update({"unused_responses": unused} if unused else {})
        if kind == "sft" and (rivals or has in ("sft", "text")):
            return [ranked_to_sft(example)]
        if kind == "sft" and has == "unpaired":
            counts["dropped/label_false"] += not example.label
            return [ranked_to_sft(example)] if example.label else []
        if kind == "ranked" and rivals:
            return compared([example])
        if kind == "pairs" and rivals:
            return compared(ranked_to_pairs(example, ranked_pairs))
        if kind == "unpaired" and rivals:
            # The best response is good and the worst one bad; others are neither.
            pairs = compared(ranked_to_pairs(example, "best_worst"))
            return (one for pair in pairs for one in pairs_to_unpaired(pair))
        if kind == "unpaired" and has == "unpaired":
            return [example]
        raise UserError(
            f"{example.where}: the data{f' (format {found!r})' if found else ''} holds "
            f"{KINDS[has].partition(' (')[0]}, but the algorithm needs {KINDS[kind]}. Give data "
            "with these columns, or set data.format if the file has them and was read as "
            "something else."
        )

    def used(responses: int) -> int:
        if kind == "sft":
            return 1
        return 2 if kind == "unpaired" or ranked_pairs == "best_worst" else responses

    return [one for example in examples for one in converted(example)], counts


def _contradiction(example: Example) -> str:
    """What a record says against its own order; empty if nothing."""
    if example.margin is not None and example.margin < 0:
        return f"the margin of the better response is {example.margin:g}"
    scores = example.scores or ()
    if any(better < worse for better, worse in pairwise(scores)):
        said = ", ".join(f"{score:g}" for score in scores)
        return f"the better response has the lower score ({said}, in the record's order)"
    return ""


def _is_tied(example: Example) -> bool:
    return example.scores is not None and len(set(example.scores)) < len(example.scores)


def _has_identical(responses: Sequence[Response]) -> bool:
    return any(a == b for a, b in combinations(responses, 2))


_PAIRS: dict[str, Callable[[int], Iterable[tuple[int, int]]]] = {
    "best_worst": lambda count: [(0, count - 1)],
    "adjacent": lambda count: zip(range(count - 1), range(1, count), strict=True),
    "all": lambda count: combinations(range(count), 2),
}
