"""Conversions between kinds of data, and what tokenised examples carry beside their tokens."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st
from test_formats import CHAT, LEEK, ONION, STONE

from jaxpref.data import convert
from jaxpref.data.convert import KINDS, adapt, kind_of
from jaxpref.data.dataset import deduplicate, mismatch
from jaxpref.data.examples import Example, hold_out
from jaxpref.data.tokenize import Limits, tokenize
from jaxpref.errors import UserError
from jaxpref.tokenizer import load_tokenizer


def test_scores_are_as_wide_as_the_responses_that_are_taken():
    data = tokenized(Example("p", ("a", "b"), (4.0, 3.0)), BY_KIND["ranked"])
    assert data.take(np.asarray([0])).extras["scores"].tolist() == [[4, 3]]


CONTRADICTED = {
    "scores": Example("p", ("a", "b"), (1.0, 2.0), where="x:4"),
    "margin": Example("p", ("a", "b"), margin=-0.5, where="x:4"),
    "one of a ranking": Example("p", ("a", "b", "c"), (3.0, 1.0, 2.0), where="x:4"),
}


@pytest.mark.parametrize("case", CONTRADICTED)
@pytest.mark.parametrize("kind", ["pairs", "ranked", "unpaired", "mismatched", "sft"])
def test_what_contradicts_its_own_order_is_refused_or_counted(case, kind):
    example, good = CONTRADICTED[case], Example("p", ("a", "b"), (2.0, 1.0), margin=0.0)
    message = r"x:4: the .*(-0.5|lower score).*--config.data.on_contradiction=skip"
    with pytest.raises(UserError, match=message):
        adapt([good, example], kind)
    alone = adapt([good], kind)[0]
    kept, counts = adapt([good, example], kind, on_contradiction="skip")
    assert kept == alone
    assert counts["dropped/contradiction"] == 1
    kept, counts = adapt([good, example], kind, on_contradiction="keep")
    assert len(kept) == 2 * len(alone)
    assert counts["contradictions"] == 1
    # A true reward may be drawn against, and nothing is compared for a prompt.
    drawn = dataclasses.replace(
        CONTRADICTED["scores"], scores=None, true_rewards=CONTRADICTED["scores"].scores
    )
    assert not {*adapt([drawn], kind)[1]} - {"unused_responses"}
    assert not adapt([example], "prompts")[1]


BY_KIND = {
    "sft": Example("p", ("a",)),
    "pairs": Example("p", ("a", "b"), margin=1.0),
    "ranked": Example("p", ("a", "b", "c", "d"), (4.0, 3.0, 2.0, 1.0)),
    "unpaired": Example("p", ("a",), label=True),
    "prompts": Example("p", ()),
    "responses": Example("p", ("a", "b"), ordered=False),
    "text": Example(None, ("a",)),
}


# To each kind, what can be converted, and the responses that come of it.
CONVERTED = {
    "sft": {"sft": ["a"], "pairs": ["a"], "ranked": ["a"], "unpaired": ["a"], "text": ["a"]},
    "pairs": {"pairs": ["ab"], "ranked": ["ad"]},
    "ranked": {"pairs": ["ab"], "ranked": ["abcd"]},
    "unpaired": {"unpaired": ["a"], "pairs": ["a", "b"], "ranked": ["a", "d"]},
    "prompts": {kind: [""] for kind in BY_KIND if kind != "text"},
}


@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("has", BY_KIND)
def test_every_kind_is_converted_or_refused(kind, has):
    assert kind_of(BY_KIND[has]) == has
    example = dataclasses.replace(BY_KIND[has], where="x:1")
    if has not in CONVERTED[kind]:
        message = rf"x:1: the data .format 'f'. holds .*but the algorithm needs {KINDS[kind][:9]}"
        with pytest.raises(UserError, match=message):
            adapt([example], kind, found="f")
        return
    examples, counts = adapt([example], kind)
    assert ["".join(e.responses) for e in examples] == CONVERTED[kind][has]
    used = sum(len(e.responses) for e in examples) if kind != "prompts" else 0
    compared = has in ("pairs", "ranked") and kind != "prompts"
    unused = len(example.responses) - used if compared else 0
    assert +counts == +Counter(unused_responses=unused)
    assert all(e.scores is None or len(e.scores) == len(e.responses) for e in examples)
    if kind == "unpaired":
        assert [e.label for e in examples] == [True, False][: len(examples)]
    if kind in ("sft", "prompts"):
        assert all(e.label is None and e.margin is None for e in examples)


@pytest.mark.parametrize(
    ("which", "pairs"),
    [
        ("best_worst", ["ad"]),
        ("adjacent", ["ab", "bc", "cd"]),
        ("all", ["ab", "ac", "ad", "bc", "bd", "cd"]),
    ],
)
def test_pairs_of_a_ranking(which, pairs):
    found = convert.ranked_to_pairs(BY_KIND["ranked"], which)
    assert ["".join(pair.responses) for pair in found] == pairs
    assert all(pair.scores[0] > pair.scores[1] for pair in found)
    assert convert.ranked_to_pairs(BY_KIND["pairs"], which) == [BY_KIND["pairs"]]


def test_conversations_pass_through_every_conversion():
    example = Example(CHAT, (ONION, LEEK, STONE), (3.0, 2.0, 1.0))
    assert adapt([example], "pairs")[0] == [Example(CHAT, (ONION, STONE), (3.0, 1.0))]
    assert adapt([example], "sft")[0] == [Example(CHAT, (ONION,), (3.0,))]
    assert [(e.responses, e.label) for e in adapt([example], "unpaired")[0]] == [
        ((ONION,), True),
        ((STONE,), False),
    ]
    assert adapt([example], "prompts")[0] == [Example(CHAT, ())]


def test_only_good_completions_are_fine_tuned_on_and_the_others_counted():
    good = BY_KIND["unpaired"]
    examples, counts = adapt([good, dataclasses.replace(good, label=False)], "sft")
    assert [e.responses for e in examples] == [("a",)]
    assert counts == {"dropped/label_false": 1}


def test_ties_matter_only_where_they_are_compared():
    tied = Example("p", ("a", "b", "c"), (2.0, 1.0, 1.0), where="x:4")
    assert len(adapt([tied], "pairs")[0]) == 1
    assert len(adapt([tied], "sft")[0]) == 1
    for kind, which in (("pairs", "adjacent"), ("pairs", "all"), ("ranked", "all")):
        with pytest.raises(UserError, match=r"x:4: two .* same score .*--config.data.on_tie=skip"):
            adapt([tied], kind, ranked_pairs=which)
    examples, counts = adapt([tied], "pairs", ranked_pairs="all", on_tie="skip")
    assert [e.responses for e in examples] == [("a", "b"), ("a", "c")]
    assert counts == {"dropped/tie": 1}
    # Of a ranking the others stay.
    examples, counts = adapt([tied], "ranked", on_tie="skip")
    assert [(e.responses, e.scores) for e in examples] == [(("a", "b"), (2.0, 1.0))]
    assert counts == {"dropped/tied_response": 1}
    # A true reward is not what these labels were read off.
    known = dataclasses.replace(tied, responses=("a", "b"), scores=None, true_rewards=(1.0, 1.0))
    assert adapt([known], "pairs")[0] == [known]


def test_a_response_that_equals_its_rival_is_counted_and_dropped_if_asked():
    examples = [Example("p", ("a", "a")), Example("p", ("a", "b")), Example(CHAT, (LEEK, {**LEEK}))]
    kept, counts = adapt(examples, "pairs")
    assert kept == examples
    assert counts == {"identical_responses": 2}
    kept, counts = adapt(examples, "pairs", on_identical="skip")
    assert kept == examples[1:2]
    assert counts == {"dropped/identical_responses": 2}


def test_scores_order_the_responses_where_an_order_is_needed():
    given = Example("p", ("a", "b", "c"), (1.0, 3.0, 2.0), ordered=False)
    (ranked,), _ = adapt([given], "ranked")
    assert (ranked.responses, ranked.scores) == (("b", "c", "a"), (3.0, 2.0, 1.0))
    (pair,), counts = adapt([given], "pairs")
    assert pair.responses == ("b", "a")
    assert counts == {"unused_responses": 1}


def tokenized(*examples, **options):
    return tokenize(examples, load_tokenizer("bytes"), Limits(64, 32, 1), **options)


def everything(data):
    """What each example is, as lists."""
    return [
        [data.group(i).prompt.tolist(), *(r.tolist() for r in data.group(i).responses)]
        for i in range(len(data))
    ]


def test_duplicates_have_the_same_tokens_and_label():
    one = Example("p", ("a",), label=True, source="x")
    examples = [
        one,
        dataclasses.replace(one, label=False),
        dataclasses.replace(one, where="x:3"),
        dataclasses.replace(one, prompt="q", source="y"),
        dataclasses.replace(one, prompt="pa", responses=("",)),
        # What is cut away does not tell them apart.
        dataclasses.replace(one, responses=("b" * 100,)),
        dataclasses.replace(one, responses=("b" * 200,)),
    ]
    data = tokenized(*examples)
    kept = deduplicate(data)
    assert everything(kept) == [everything(data)[i] for i in (0, 1, 3, 4, 5)]
    assert kept.extras["labels"].tolist() == [1, 0, 1, 1, 1]
    assert {name: rows.tolist() for name, rows in kept.sources.items()} == {
        "x": [0, 1, 3, 4],
        "y": [2],
    }
    assert kept.counts["dropped/duplicate"] == 2


@given(st.data())
def test_taking_examples_is_taking_from_lists(data):
    lengths = st.integers(0, 5)
    examples = [
        Example("p" * (1 + data.draw(lengths)), tuple("r" * data.draw(lengths) for _ in range(k)))
        for k in data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    ]
    whole = tokenized(*examples)
    chosen = data.draw(st.lists(st.integers(0, len(examples) - 1), unique=True, min_size=1))
    part = whole.take(np.asarray(chosen))
    assert everything(part) == [everything(whole)[i] for i in chosen]
    assert part.responses == max(len(examples[i].responses) for i in chosen)
    assert [part.uncut_lengths(i) for i in range(len(part))] == [
        whole.uncut_lengths(i) for i in chosen
    ]


def test_borrowed_responses_answer_another_prompt_and_take_nothing_away():
    labelled = [
        Example(prompt, (response,), label=True)
        for prompt, response in (("a" * 40, "1"), ("b", "2"), ("a" * 40, "3" * 60), ("c", "4" * 50))
    ]
    plain = tokenized(*labelled)
    data = mismatch(plain, 64)
    assert [group[:2] for group in everything(data)] == everything(plain)
    # Two further, or the next with another prompt; cut to the room beside the prompt.
    partners = [3, 3, 1, 1]
    assert [group[2] for group in everything(data)] == [
        everything(plain)[partner][1][: 64 - len(everything(plain)[i][0])]
        for i, partner in enumerate(partners)
    ]
    assert data.extras["labels"].tolist() == [1] * 4
    with pytest.raises(UserError, match=r"all 2 examples .* have the same prompt"):
        mismatch(tokenized(*labelled[::2]), 64)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda x: len(set(x)) > 1))
def test_every_example_borrows_from_another_prompt(prompts):
    data = mismatch(tokenized(*(Example(f"{p}", (f"{p}",), label=True) for p in prompts)), 64)
    assert all(prompt[0] != other[0] for prompt, _, other in everything(data))


def test_what_is_borrowed_has_the_labels_of_the_data():
    pairs = [Example(f"{i}", ("good", "bad")) for i in range(20)]
    examples, _ = adapt(pairs, "mismatched")
    borrowed = [bytes(other) for *_, other in everything(mismatch(tokenized(*examples), 64))]
    own = [bytes(response) for _, response in everything(tokenized(*examples))]
    assert Counter(borrowed) == Counter(own)


def test_labels_margins_and_scores_are_extras():
    data = tokenized(Example("p", ("a",), label=True), Example("p", ("b",), label=False))
    assert data.extras["labels"].tolist() == [1.0, 0.0]
    assert data.extras.keys() == {"labels"}
    data = tokenized(Example("p", ("a", "b"), margin=0.5), Example("p", ("a", "c"), margin=2.0))
    assert data.extras["margins"].tolist() == [0.5, 2.0]
    data = tokenized(Example("p", ("a", "b"), (4.0, 3.0)), BY_KIND["ranked"])
    assert data.extras["scores"].tolist() == [[4, 3, 0, 0], [4, 3, 2, 1]]
    assert all(values.dtype == np.float32 for values in data.extras.values())
    # Ratings are no true reward to evaluate against, nor is a true reward a rating.
    assert data.true_rewards is None
    data = tokenized(Example("p", ("a", "b"), true_rewards=(1.0, 2.0)))
    assert data.true_rewards.tolist() == [[1, 2]]
    assert not data.extras


def test_every_token_of_a_text_is_scored():
    """But the first one where there is no BOS to predict it from."""
    texts = [Example(None, (text,)) for text in ("ab", "cd", "ab")]
    data = tokenized(*texts)
    assert everything(data) == [[[100], [101, 1]], [[102], [103, 1]], [[100], [101, 1]]]
    limits = Limits(64, 32, 1, 2)
    with_bos = tokenize(texts, load_tokenizer("bytes"), limits)
    assert everything(with_bos)[0] == [[2], [100, 101, 1]]
    # A long one is in parts that begin with the last token before them: none of it is lost.
    long = tokenized(Example(None, ("a" * 62 + "b" * 63 + "cd",)), *texts[:1])
    assert [len(prompt) + len(response) for prompt, response in everything(long)] == [64, 64, 2, 3]
    scored = [token for _, response in everything(long)[:3] for token in response]
    assert scored == [100] * 61 + [101] * 63 + [102, 103, 1]
    assert [prompt for prompt, _ in everything(long)[:3]] == [[100], [101], [103]]
    assert long.counts["further_parts_of_texts"] == 2
    assert long.counts["responses_cut"] == 0
    # A text is held out, and told from others, by what it says.
    for there in (data, with_bos):
        assert there.prompts[0] == there.prompts[2] != there.prompts[1]
    many = [Example(None, (str(i),)) for i in range(200)]
    assert 20 < len(hold_out(many, 0.2)[1]) < 60


def test_a_margin_that_only_some_have_is_an_error():
    with pytest.raises(UserError, match="x:2: has no margin, but other examples do"):
        tokenized(Example("p", ("a", "b"), margin=1.0), Example("p", ("a", "b"), where="x:2"))


def test_a_source_without_margins_asks_for_none():
    one, other = Example("p", ("a", "b"), margin=1.0, source="x"), Example("p", ("a", "b"))
    data = tokenized(one, dataclasses.replace(other, source="y"))
    assert data.extras["margins"].tolist() == [1.0, 0.0]
    assert {name: rows.tolist() for name, rows in data.sources.items()} == {"x": [0], "y": [1]}


def test_the_fingerprint_sees_extras_and_sources():
    good = Example("p", ("a",), label=True)
    prints = {
        tokenized(good, other).fingerprint()
        for other in (
            good,
            dataclasses.replace(good, label=False),
            dataclasses.replace(good, label=None),
            dataclasses.replace(good, source="b"),
        )
    }
    assert len(prints) == 4


def test_prompts_alone_keep_their_end():
    data = tokenized(Example("p" * 40, ()), Example("q", ()))
    assert data.prompt_lengths.tolist() == [32, 1]
    assert data.response_lengths.tolist() == [[0], [0]]
    assert data.group(1).responses == []
    assert data.counts["prompts_cut"] == 1


def test_long_prompts_are_skipped_and_counted():
    examples = [Example("p" * n, ("a", "b"), margin=float(n)) for n in (1, 80, 3)]
    limits = Limits(64, 32, 1, on_long_prompt="skip")
    data = tokenize(examples, load_tokenizer("bytes"), limits)
    assert data.prompt_lengths.tolist() == [1, 3]
    assert data.extras["margins"].tolist() == [1.0, 3.0]
    assert data.counts["dropped/long_prompt"] == 1
    assert data.counts["prompts_cut"] == 0
