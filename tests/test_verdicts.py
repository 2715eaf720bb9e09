"""What a judge is asked, and the verdict in what it answers."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from jaxpref.errors import UserError
from jaxpref.evaluation.judges.templates import TEMPLATES, Template, find_template
from jaxpref.evaluation.judges.verdicts import find_verdict, letter_score

SCORES = {"A": 1.0, "B": 0.0, "C": 0.5, "tie": 0.5}
GRADES = {"A>>B": 1.0, "A>B": 0.75, "A=B": 0.5, "B>A": 0.25, "B>>A": 0.0}


def score(text):
    verdict = find_verdict(text)
    return verdict and verdict.score


@pytest.mark.parametrize("verdict", SCORES)
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        " {}.\n",
        "({})",
        "**{}**",
        "Preferred: {}",
        'Comparison: A is short, and B is not.\nMore helpful: "{}"\n\n',
        "Comparison: both say it: A first.\n**Preferred:** Summary {}",
        "preferred: [{}]",
        "Answer {}",
        "[[{}]]",
        "B repeats itself: [[ {} ]] is my verdict.",
        "I say [[{}]].\nAgain: [[{}]]",
    ],
)
def test_a_verdict_is_read_in_each_of_its_forms(form, verdict):
    assert score(form.replace("{}", verdict)) == SCORES[verdict]
    assert score(form.replace("{}", verdict).lower()) == SCORES[verdict]


@pytest.mark.parametrize("grade", GRADES)
def test_grades_are_read_and_their_mirror_is_1_less(grade):
    mirrored = grade.translate(str.maketrans("AB>", "BA<"))[::-1].replace("<", ">")
    mirrored = {"A=B": "A=B"}.get(grade, grade[-1] + grade[1:-1] + grade[0])
    for form in ("My answer is short.\n[[{}]]", "Verdict: {}", "{}"):
        assert score(form.format(grade)) == GRADES[grade]
        assert score(form.format(mirrored)) == 1 - GRADES[grade]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "Preferred:",
        "Preferred: A or B",
        "Preferred: A/B",
        "Preferred: neither",
        "A and B",
        "[[A]] or rather [[B]]",
        "[[A>B]] and [[A>>B]]",
        "[[D]]",
        "Response A:",
        "A is better.",
        "A better answer would be short",
        "Preferred: A\nBut this depends on the reader.",
        "Preferred: A<B",
    ],
)
def test_what_is_ambiguous_or_absent_is_no_verdict(text):
    assert score(text) is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ABCtie[]>= :\n*\"'.x", max_size=40))
def test_any_text_has_one_verdict_or_none_and_says_where(text):
    verdict = find_verdict(text)
    if verdict is not None:
        assert verdict.score in GRADES.values()
        assert text[verdict.place].upper() in "ABCT"


def spelled(text, letter, chances):
    """A text in tokens of one character; its letter with the chances of others in its place."""
    place = text.rindex(letter)
    logps = {name: math.log(chance) for name, chance in chances.items()}
    return [(c, logps if i == place else {c: 0.0}) for i, c in enumerate(text)]


def test_a_letters_probability_is_that_of_a_among_the_two():
    for text in ("A", "Comparison: B or A?\nPreferred: A", "Well: [[A]]"):
        tokens = spelled(text, "A", {"A": 0.5, " A": 0.1, "B": 0.2, "the": 0.1, "C": 0.1})
        assert letter_score(text, tokens) == pytest.approx(0.6 / 0.8)
        # A server may give blanks in the tokens that it cuts from the text.
        assert letter_score(text, [(" ", {}), *tokens]) == pytest.approx(0.6 / 0.8)
    assert letter_score("B", spelled("B", "B", {"B": 1.0})) == 0.0
    assert letter_score("Preferred: C", spelled("Preferred: C", "C", {"C": 1.0})) == 0.5
    assert letter_score("neither", spelled("neither", "t", {"A": 1.0})) is None


def test_a_letters_probability_of_a_word_that_is_one_token():
    tokens = [
        ("Preferred", {}),
        (": ", {}),
        ('"B"', {'"B"': math.log(0.75), '"A"': math.log(0.25)}),
    ]
    assert letter_score('Preferred: "B"', tokens) == pytest.approx(0.25)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_all_three_texts_as_they_are(name):
    texts = ("{first} of\n{ {{second}}", "{prompt}{0}", "%s {")
    question = find_template(name).fill(*texts)
    assert all(text in question for text in texts)
    # Nothing but these is left of the places.
    for text in texts:
        question = question.replace(text, "")
    assert "{" not in question
    assert TEMPLATES[name].letters == ("[[A>>B]]" not in question)


def test_the_command_names_every_template():
    command = (Path(__file__).parent.parent / "jaxpref" / "judge.py").read_text()
    assert all(f"{name}, " in command for name in TEMPLATES)


def test_texts_that_change_places_change_nothing_else():
    template = Template("x", "{prompt}|{second}|{first}")
    assert template.fill("p", "a", "b") == "p|b|a"


def test_a_template_is_read_from_a_file_or_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{prompt}: {first} or {second}?")
    assert find_template(str(path)).fill("Soup", "leek", "{pea}") == "Soup: leek or {pea}?"
    path.write_text("{prompt}: {first}?")
    with pytest.raises(UserError, match=r"mine.txt: .* \{second\} is not in it"):
        find_template(str(path))
    with pytest.raises(UserError, match=r"Did you mean 'dialogue'.* Or name a file"):
        find_template("dialog")
