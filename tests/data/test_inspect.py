"""What a report says about rows, against toys whose numbers are known."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.data.chat.conversations import ConversationSource, recognize
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.inspect import BINS, Finding, Lengths, NearDuplicates, inspect_rows, scripts_of, turn_problems


def messages(*roles):
    """Returns messages of these roles: `call` is the assistant's with a call, a capital letter starts an empty one."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    return [
        {"role": "assistant", "content": "", "tool_calls": calls}
        if role == "call"
        else {"role": role.lower(), "content": "" if role[0].isupper() else "some words"}
        for role in roles
    ]


def report_of(rows, **options):
    form = recognize(rows[0], "toy")
    source = ConversationSource(name="toy", rows=rows, identity={}, form=form, use="instructions")
    return inspect_rows(source, rows, **options)


def qa(question, answer="Yes."):
    return {"question": question, "answer": answer}


def test_rows_duplicates_and_drops_are_counted_by_number():
    rows = [qa("One?"), qa("Two?"), qa("One?"), {"question": "Three?", "answer": None}, qa(4), qa("One?", "No.")]
    report = report_of(rows)
    assert (report.rows, report.usable, report.format) == (6, 4, "question/answer")
    assert report.columns == ["question", "answer"]
    assert report.exact_duplicates == Finding(1, [3])
    assert report.near_duplicates.rows == 0
    assert report.dropped == {"without 'answer'": Finding(1, [4]), "expected text, found int": Finding(1, [5])}


def test_only_the_first_row_numbers_are_kept():
    report = report_of([qa("Again?")] * 40)
    assert report.exact_duplicates == Finding(39, [2, 3, 4, 5, 6])


WORDS = [f"word{number}" for number in range(200)]


@pytest.mark.parametrize(
    ("changed", "similar"),
    [
        (0, True),
        # of 196 runs of five words, one word changes five: (196 - 5) / (196 + 5) = 0.95 of all runs are shared
        (1, True),
        # 20 words, each 10 apart, change 100 runs: 96 / 296 = 0.32 are shared
        (20, False),
    ],
)
def test_near_duplicates_share_most_runs_of_words(changed, similar):
    words = list(WORDS)
    for number in range(changed):
        words[10 * number + 5] = "other"
    index = NearDuplicates()
    assert index.add(1, " ".join(WORDS)) is None
    assert index.add(2, " ".join(words).upper() + "!") == (1 if similar else None)


def test_near_duplicates_are_not_the_exact_ones():
    first, second = " ".join(WORDS), " ".join([*WORDS, "more"])
    report = report_of([qa(first), qa(second), qa(first), qa("Short?"), qa("Other?")])
    assert report.exact_duplicates == Finding(1, [3])
    assert report.near_duplicates == Finding(1, [2])


@pytest.mark.parametrize(
    ("roles", "problems"),
    [
        (["user", "assistant"], []),
        (["system", "user", "assistant", "user", "assistant"], []),
        (["user", "call", "tool", "tool", "call", "tool", "assistant"], []),
        (["user", "call"], []),
        (["assistant", "user", "assistant"], ["starts with the assistant"]),
        (["system", "call", "tool", "assistant"], ["tool call after system"]),
        (["user", "system", "assistant"], ["system after user"]),
        (["system", "system", "user", "assistant"], ["system after system"]),
        (["user", "user", "user", "assistant"], ["user after user"]),
        (["user", "assistant", "assistant"], ["assistant after assistant"]),
        (["user", "tool", "assistant"], ["tool result after user"]),
        (["user", "call", "user", "assistant"], ["user after tool call"]),
        (["user", "call", "tool", "user", "assistant"], ["user after tool result"]),
        (["user", "assistant", "user"], ["ends with the user"]),
        (["User", "Assistant"], ["empty turn of the user", "empty turn of the assistant"]),
        ([], []),
    ],
)
def test_turns_out_of_order(roles, problems):
    assert turn_problems(messages(*roles)) == problems


def test_problems_are_counted_by_row():
    rows = [{"messages": messages("user", "assistant")}, {"messages": messages("assistant", "user")}]
    report = report_of([*rows, {"messages": messages("user", "user", "user", "assistant")}])
    expected = {"starts with the assistant": [2], "ends with the user": [2], "user after user": [3]}
    assert report.problems == {what: Finding(1, first) for what, first in expected.items()}


@pytest.mark.parametrize(
    ("letter", "script"),
    [
        ("a", "Latin"),
        ("é", "Latin"),
        ("Ａ", "Latin"),  # noqa: RUF001 - full width
        ("𝔸", "Latin"),
        ("µ", "Greek"),
        ("ж", "Cyrillic"),
        ("字", "Han"),
        ("あ", "Hiragana"),
        ("ｱ", "Katakana"),
        ("한", "Hangul"),
        ("ع", "Arabic"),
        ("א", "Hebrew"),
        ("ก", "Thai"),
        ("अ", "Devanagari"),
    ],
)
def test_scripts_are_of_letters(letter, script):
    assert scripts_of(Counter(f"{letter}1 ,.\n")) == {script: 1.0}


def test_shares_of_scripts():
    assert scripts_of(Counter("abc д 12 !")) == {"Latin": 0.75, "Cyrillic": 0.25}
    assert scripts_of(Counter("12")) == {}


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_lengths_hold_what_they_say(values):
    lengths = Lengths.of(values)
    for mark, value in lengths.percentiles.items():
        assert value in values
        assert sum(each <= value for each in values) >= int(mark) / 100 * len(values)
        assert sum(each < value for each in values) < int(mark) / 100 * len(values)
    assert lengths.longest == max(values) and lengths.total == sum(values)
    assert sum(lengths.counts) == len(values) and len(lengths.counts) <= BINS
    first = sum(value < lengths.bin_width for value in values)
    assert lengths.counts[0] == first


def test_one_long_row_does_not_flatten_the_histogram():
    lengths = Lengths.of([*range(1, 201), 1_000_000])
    # the range is that of 99 % of the rows, a quarter more: 1.25 * 199 = 248, in 50 bins of 5
    assert lengths.bin_width == 5
    assert lengths.counts[:3] == [4, 5, 5] and lengths.counts[-1] == 1


def test_tokens_cut_and_lost():
    def render(conversation):
        question, answer = (message["content"].replace("-", "").split() for message in conversation["messages"])
        if "refuse" in question:
            raise UnusableRow("the template refuses it")
        return SimpleNamespace(
            input_ids=[0] * (len(question) + len(answer)), trained=[False] * len(question) + [True] * len(answer)
        )

    rows = [qa("a b", "c d"), qa("a b c", "d e f"), qa("a b c d e", "f"), qa("refuse", "x"), qa("a", "-")]
    renderer = SimpleNamespace(render=render, find_problem=lambda row: "odd" if len(row.trained) % 2 else "")
    report = report_of(rows, renderer=renderer, max_seq_len=4)
    tokens = report.tokens
    assert report.dropped == {"the template refuses it": Finding(1, [4])}
    assert (tokens.lengths.total, tokens.trained) == (4 + 6 + 6 + 1, 2 + 3 + 1 + 0)
    assert tokens.truncated == Finding(2, [2, 3])
    assert tokens.lost == Finding(2, [3, 5])
    assert report.problems["odd"] == Finding(1, [5])


def test_calls_are_text_and_content():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [{**call}], "content": ""},
            ]
        }
        for _ in range(2)
    ]
    rows[1]["messages"][1]["tool_calls"][0] = {"type": "function", "function": {"name": "f", "arguments": {"x": 2}}}
    report = report_of(rows)
    assert report.exact_duplicates.rows == 0
    assert report.characters.longest == len('hi\nf {"x": 1}')


def test_no_rows():
    report = inspect_rows(SimpleNamespace(name="nothing", form=SimpleNamespace(name="messages"), label=None), [], dict)
    assert (report.rows, report.characters, report.tokens, report.scripts) == (0, None, None, {})


@settings(max_examples=20)  # each makes an index, which takes time
@given(st.lists(st.lists(st.sampled_from(["system", "user", "assistant", "call", "tool", "User"]), max_size=5)))
def test_any_order_of_turns_is_reported(conversations):
    def read(row):
        return {"messages": row["messages"], "tools": None}

    source = SimpleNamespace(name="toy", form=SimpleNamespace(name="messages"), label=None, read=read)
    report = inspect_rows(source, [{"messages": messages(*roles)} for roles in conversations])
    assert report.usable == len(conversations)
    assert all(0 < finding.rows <= len(conversations) for finding in report.problems.values())
