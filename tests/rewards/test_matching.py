"""`exact_match`, `regex_match` and `numeric_match`."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.rewards import exact_match, numeric_match, regex_match
from llmlab.rewards.matching import number_in
from llmlab.settings.errors import UserError

SOLUTION = "She sells 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 altogether.\n#### 1,072"


def test_exact_match():
    texts = [" Paris\n", "paris", "", "Par is", "a  b\nc", "2"]
    answers = ["Paris", "Paris", "", "Paris", "a b c", 2]
    assert exact_match(texts, answer=answers) == [1, 0, 1, 0, 1, 1]
    assert exact_match(["PARIS", "x", "y"], answer=["paris", ["y", "X"], None], ignore_case=True) == [1, 1, None]
    assert exact_match([[{"role": "assistant", "content": "é"}]], gold=["é"], column="gold") == [1]
    with pytest.raises(UserError, match="column = answer: there is no such column.*did you mean 'answers'"):
        exact_match(["a"], answers=["a"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        (SOLUTION, "1072"),
        ("first #### 1 then #### 2", "2"),
        ("#### 5 apples for 3 people", "5"),
        ("I count 3, then 4.", "4"),
        ("It costs $1,234.50.", "1234.50"),
        ("-3", "-3"),
        ("−3", "-3"),  # a typographic minus
        ("- 3", "-3"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        ("+7", "7"),
        ("10-3", "3"),  # a minus between numbers is no sign
        ("x = -.5", "-0.5"),
        ("1/2", "0.5"),
        ("-3 / 4", "-0.75"),
        (r"so \boxed{\frac{3}{8}}", "0.375"),
        ("50%", "50"),
        ("2e3", "2000"),
        ("1.5E-2", "0.015"),
        ("1,2", "2"),
        ("007", "7"),
        ("", None),
        ("none", None),
        ("#### unknown, though 5 was said", "5"),
        ("5 #### ", None),
        ("1/0", None),
        ("٣", None),  # digits of other scripts are not read
        ("9" * 5000, "9" * 5000),  # past Python's limit for int()
    ],
)
def test_number_in(text, number):
    assert number_in(text) == (None if number is None else Decimal(number))


def test_numeric_match():
    texts = ["the answer is 1072", "#### 1,072.0", "1073", "", "about 0.3333333", "1000001", "9" * 5000]
    answers = [SOLUTION, "1072", 1072, 1, "1/3", 1000002, "9" * 4999 + "8"]
    assert numeric_match(texts, answer=answers) == [1, 1, 0, 0, 1, 0, 0]  # whole numbers are never merely near
    assert numeric_match(["3.1"], answer=[3.14], tolerance=0.02) == [1]  # 0.04 / 3.14 = 0.0127
    assert numeric_match(["3.1"], answer=[3.14], tolerance=0.01) == [0]
    assert numeric_match(["0.0", "1e-9"], answer=[0, 0]) == [1, 0]
    assert numeric_match(["1"], answer=[None]) == [None]
    with pytest.raises(UserError, match="row 1: answer = 'seven': there is no number"):
        numeric_match(["1", "7"], answer=[1, "seven"])


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc ,:\n", max_size=20))
def test_every_integer_is_found_however_it_is_written(number, prose):
    for text in (f"{prose}#### {number}", f"{prose}#### {number:,}", f"it is {number}.0 {prose}"):
        assert number_in(text) == number


@given(st.text(max_size=200))
def test_no_text_breaks_the_reading_of_numbers(text):
    assert numeric_match([text], answer=[1]) in ([0], [1])


def test_numbers_meant_to_be_slow():
    for text in (
        "1," * 50_000,
        "1/" * 50_000,
        "1e" * 50_000,
        "9" * 100_000,
        "\\frac{" * 20_000,
        "#" * 100_000,
        "-" * 100_000,
    ):
        numeric_match([text], answer=[1])


def test_regex_match():
    texts = ["<think>a\nb</think>4", "4", ""]
    assert regex_match(texts, pattern="<think>.*</think>") == [1, 0, 0]
    assert regex_match(texts, pattern=r"\d", full=True) == [0, 1, 0]
    assert regex_match(texts, regex=["b", None, "^$"]) == [1, None, 1]
    assert regex_match(texts, form=["x", "4", "."], column="form") == [0, 1, 0]
    assert regex_match(["漢字"], pattern=r"^\p{Han}+$") == [1]
    with pytest.raises(UserError, match=r"pattern = \(: this is not a regular expression"):
        regex_match(texts, pattern="(")
    with pytest.raises(UserError, match=r"row 0: regex = \(:"):
        regex_match(["a"], regex=["("])
    with pytest.raises(UserError, match="column = regex: there is no such column"):
        regex_match(texts)


def test_a_pattern_without_end_stops_with_the_row(monkeypatch):
    monkeypatch.setattr("llmlab.simulator.guardrails.TIMEOUT", 0.2)
    with pytest.raises(UserError, match="row 1: pattern = .*catastrophic backtracking"):
        regex_match(["b", "a" * 5000], pattern="(?:a|a)+(?:a|a)+b$")
