"""Every format of preference data becomes a prompt and two answers; what cannot is refused with its reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.chat.conversations import FORMATS, load_conversations, read_row, recognize
from llmlab.data.chat.messages import ROLES, UnusableRow
from llmlab.data.sources import Tally
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

PAIR_FORMATS = FORMATS["preferences"]
ASKED = {"role": "user", "content": "Who?"}
GOOD, BAD = {"role": "assistant", "content": "Me."}, {"role": "assistant", "content": "You."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PAIR = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "tools": None}

ROWS = {  # for each format rows that say PAIR
    "ShareGPT preference": [
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Me."},
            "rejected": {"from": "gpt", "value": "You."},
        }
    ],
    "preference": [
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "Me.", "rejected": "You."},
        {"prompt": "Who?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Who?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 8.0},  # UltraFeedback
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
    "instruction preference": [  # argilla/ultrafeedback-binarized-preferences
        {"instruction": "Who?", "chosen_response": "Me.", "rejected_response": "You.", "chosen_avg_rating": 5.0},
    ],
    "hh-rlhf transcript": [
        {"chosen": "\n\nHuman: Who?\n\nAssistant: Me.", "rejected": "\n\nHuman: Who?\n\nAssistant: You."},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
}


def read(row):
    return read_row(row, recognize(row, "toy", "preferences"), "preferences")


def said(messages):
    return [(message["role"], message["content"]) for message in messages]


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[k % 2]}: {turn}" for k, turn in enumerate(turns))


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_every_format_says_the_same(name, row):
    assert recognize(row, "toy", "preferences").name == name
    assert read(row) == PAIR


def test_every_format_is_here():
    assert set(ROWS) == {form.name for form in PAIR_FORMATS}


def test_the_common_beginning_of_transcripts_is_the_prompt():
    pair = read({"chosen": transcript("a", "b", "c", "good"), "rejected": transcript("a", "b", "c", "bad")})
    assert said(pair["prompt"]) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert said(pair["chosen"]) == [("assistant", "good")] and said(pair["rejected"]) == [("assistant", "bad")]


def test_conversations_that_part_in_the_middle_keep_their_rest():
    pair = read({"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "B", "C", "D")})
    assert said(pair["prompt"]) == [("user", "a")]
    assert said(pair["chosen"]) == [("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert said(pair["rejected"]) == [("assistant", "B"), ("user", "C"), ("assistant", "D")]


@pytest.mark.parametrize("row", [ROWS["preference"][0], ROWS["preference"][4], ROWS["ShareGPT preference"][0]])
def test_a_system_column_comes_first(row):
    assert read({**row, "system": "Be brief."})["prompt"] == [SYSTEM, ASKED]
    assert read({**row, "system": " "})["prompt"] == [ASKED]


@pytest.mark.parametrize("sides", [[], [ASKED], [SYSTEM, ASKED]])
def test_a_system_prompt_stands_once_whether_or_not_the_sides_repeat_it(sides):
    row = {"prompt": [SYSTEM, ASKED], "chosen": [*sides, GOOD], "rejected": [*sides, BAD]}
    assert read(row) == {**PAIR, "prompt": [SYSTEM, ASKED]}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_calls(tools):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]}
    pair = read({"prompt": "1 + 1?", "chosen": [call], "rejected": [GOOD], "tools": tools})
    assert pair["tools"] == [TOOL]
    assert pair["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    row = {"conversations": [{"from": "human", "value": "1?"}], "tools": tools}
    text = {"from": "function_call", "value": json.dumps(CALL["function"])}
    assert read({**row, "chosen": text, "rejected": {"from": "gpt", "value": "2"}})["chosen"] == pair["chosen"]


SAME, EMPTY, NOT_HIS = (
    "chosen and rejected are the same",
    "an empty completion",
    "the completion is not an assistant message",
)
SHAREGPT = ROWS["ShareGPT preference"][0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Who?", "chosen": "Me.", "rejected": None}, "without 'rejected'"),
        ({"prompt": None, "chosen": "Me.", "rejected": "You."}, "without 'prompt'"),
        ({**SHAREGPT, "chosen": None}, "without 'chosen'"),
        ({"prompt": "Who?", "chosen": "Me.", "rejected": "Me."}, SAME),
        ({"prompt": "Who?", "chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, SAME),
        ({"chosen": transcript("a", "b"), "rejected": transcript("a", "b") + "\n"}, SAME),
        ({**SHAREGPT, "rejected": SHAREGPT["chosen"]}, SAME),
        ({"prompt": "Who?", "chosen": "Me.", "rejected": " "}, EMPTY),
        ({"prompt": "Who?", "chosen": [ASKED, GOOD], "rejected": [ASKED]}, EMPTY),
        ({"chosen": transcript("a", "b"), "rejected": transcript("a", "b", "c", "d")}, EMPTY),
        ({"chosen": transcript("a", ""), "rejected": transcript("a", "b")}, EMPTY),
        ({**SHAREGPT, "chosen": {"from": "gpt", "value": ""}}, EMPTY),
        ({**SHAREGPT, "chosen": {"from": "human", "value": "Me."}}, NOT_HIS),
        ({"prompt": [ASKED], "chosen": [GOOD, ASKED], "rejected": [BAD]}, NOT_HIS),
        ({"prompt": [ASKED], "chosen": [{"role": "tool", "content": "2"}], "rejected": [BAD]}, NOT_HIS),
        ({"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "b", "x", "d")}, NOT_HIS),
        ({"prompt": [ASKED], "chosen": [SYSTEM, ASKED, GOOD], "rejected": [ASKED, BAD]}, NOT_HIS),
        ({"prompt": "", "chosen": "Me.", "rejected": "You."}, "an empty prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "an empty prompt"),
        ({"chosen": "Me.", "rejected": "You."}, "no 'Human:' turn in the transcript"),
        ({"prompt": 5, "chosen": "Me.", "rejected": "You."}, "expected text, found int"),
        ({"prompt": "Who?", "chosen": 5, "rejected": "You."}, "expected text, found int"),
        ({**SHAREGPT, "chosen": 5}, "expected text, found int"),
    ],
)
def test_a_row_that_is_no_pair_says_why(row, reason):
    with pytest.raises(UnusableRow) as caught:
        read(row)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("columns", "messages"),
    [
        (["prompt", "chosen", "reject"], ["closest is preference", "lacks rejected", "did you mean 'reject'?"]),
        (["messages"], ["no format of preference data has the columns messages", "hh-rlhf transcript (chosen, reje"]),
        (["conversations", "chosen"], ["closest is ShareGPT preference, which lacks rejected"]),
        (["question", "answer"], ["expected one of: ShareGPT preference (conversations, chosen, rejected)"]),
    ],
)
def test_unknown_columns_name_the_nearest_format(columns, messages):
    with pytest.raises(UserError) as caught:
        recognize(columns, "toy.jsonl", "preferences")
    assert str(caught.value).startswith("toy.jsonl: ")
    for message in messages:
        assert message in str(caught.value)
    assert "Alpaca" not in str(caught.value)


def test_a_source_counts_what_is_no_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Who?", "chosen": chosen, "rejected": "You."} for chosen in ("Me.", "You.", "", None, "I.")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, tally = load_conversations(DataSource(name=str(path)), "preferences"), Tally()
    assert [pair["chosen"][0]["content"] for pair in source.conversations(tally)] == ["Me.", "I."]
    assert tally.dropped == {SAME: 1, EMPTY: 1, "without 'chosen'": 1}
    path.write_text('{"prompt": "Who?", "completion": "Me."}\n')
    with pytest.raises(UserError, match="no format of preference data has the columns completion, prompt"):
        load_conversations(DataSource(name=str(path)), "preferences")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("\n\nHuman: a\n\nAssistant: b"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "value"]), inner),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from([*ROLES]), "content": st.text(max_size=2)})


@given(st.data(), st.sampled_from(PAIR_FORMATS))
def test_any_values_are_a_pair_or_a_reason(data, form):
    value = st.lists(TURN, max_size=4) | TURN | JSON
    row = {name: data.draw(value, name) for name in (*form.columns, "tools", "system")}
    try:
        pair = read_row(row, form, "preferences")
    except UnusableRow as reason:
        assert str(reason)
        return
    assert pair["prompt"] and pair["chosen"] != pair["rejected"]
    for side in (pair["chosen"], pair["rejected"]):
        assert side[0]["role"] == side[-1]["role"] == "assistant"
        assert side[0]["content"].strip() or side[0]["tool_calls"]


def test_unpaired_preferences_say_how_to_pair_them():
    for columns in (["prompt", "completion", "label"], ["messages", "label"], ["instruction", "output", "kto_tag"]):
        with pytest.raises(UserError, match="not supported: its column '.*' marks unpaired preferences .*rejected"):
            recognize(columns, "kto.jsonl", "preferences")
    with pytest.raises(UserError, match="no format of preference data"):
        recognize(["text", "label"], "imdb", "preferences")


@pytest.mark.parametrize("name", ROWS)
def test_tools_and_parts_are_understood_in_every_format(name):
    row = json.loads(json.dumps(ROWS[name][-1]).replace('"Who?"', '[{"type": "text", "text": "Who?"}]'))
    assert read({**row, "tools": json.dumps([TOOL])}) == {**PAIR, "tools": [TOOL]}
