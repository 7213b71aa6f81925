"""Every format of instruction data becomes the same messages; what cannot is refused with its reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.chat.conversations import (
    FORMATS,
    PLAIN_TEXT,
    label_column,
    read_row,
    recognize,
    transcript_messages,
)
from llmlab.data.chat.messages import ROLES, UnusableRow
from llmlab.settings.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
PAIR = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}

ROWS = {  # for each format a row that says PAIR
    "messages": [
        {"messages": PAIR},
        {"messages": [{"role": "human", "content": "Who?"}, {"role": "bot", "content": "Me."}], "id": 7},
    ],
    "ShareGPT preference": [
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Me."},
            "rejected": {"from": "gpt", "value": "You."},
        }
    ],
    "preference": [
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED]},
        {"prompt": "Who?", "chosen": PAIR, "rejected": PAIR},
    ],
    "ShareGPT conversations": [
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
        {"conversations": [{"speaker": "Human", "text": "Who?"}, {"role": "ASSISTANT", "content": "Me."}]},
    ],
    "Alpaca": [
        {"instruction": "Who?", "output": "Me."},
        {"instruction": "Who?", "input": "", "output": "Me.", "history": None, "system": " "},
    ],
    "instruction/response": [{"instruction": "Who?", "response": "Me."}],
    "instruction preference": [
        {"instruction": "Who?", "chosen_response": "Me.", "rejected_response": "You.", "source": "truthful_qa"},
    ],
    "prompt/completion": [
        {"prompt": "Who?", "completion": "Me."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ],
    "prompt/response": [{"prompt": "Who?", "response": "Me."}],
    "question/answer": [{"question": "Who?", "answer": "Me."}],
    "hh-rlhf transcript": [
        {"chosen": "\n\nHuman: Who?\n\nAssistant: Me.", "rejected": "\n\nHuman: Who?\n\nAssistant: You."},
        {"chosen": PAIR, "rejected": PAIR},
    ],
}


def read(row):
    return read_row(row, recognize(row, "toy"), "instructions")


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_every_format_says_the_same(name, row):
    assert recognize(row, "toy").name == name
    assert read(row) == {"messages": PAIR, "tools": None}


def test_every_format_is_here():
    assert [*ROWS, "plain text"] == [form.name for form in FORMATS["instructions"]]


def test_plain_text_stays_text():
    assert read({"text": " Once. ", "url": "x"}) == {"text": " Once. "}
    with pytest.raises(UnusableRow, match="^empty$"):
        read({"text": " \n"})


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_roles_have_many_names(role):
    for spelling in ROLES[role]:
        row = {"messages": [{"role": spelling, "content": "x"}, ANSWERED]}
        assert read(row)["messages"][0] == {"role": role, "content": "x"}


def test_alpaca_has_an_input_and_a_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi.", "Hello."], ["A", "B"]]}
    contents = [message["content"] for message in read({**row, "system": "Be brief."})["messages"]]
    assert contents == ["Be brief.", "Hi.", "Hello.", "A", "B", "Add.\n\n1 2", "3"]


@pytest.mark.parametrize("row", [ROWS["messages"][0], ROWS["Alpaca"][0], ROWS["question/answer"][0]])
def test_a_system_column_comes_first(row):
    assert read({**row, "system": "Be brief."})["messages"] == [SYSTEM, *PAIR]
    assert read({**row, "system": None})["messages"] == PAIR


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_sharegpt_with_calls(tools):
    turns = [("human", "1 + 1?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "2")]
    row = {"conversations": [{"from": who, "value": what} for who, what in [*turns, ("gpt", "2.")]], "tools": tools}
    assert read(row) == {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2."},
        ],
        "tools": [TOOL],
    }


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools_are_none(tools):
    assert read({"messages": PAIR, "tools": tools})["tools"] is None


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_calls_become_openai_calls_with_parsed_arguments(call):
    row = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert read(row)["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_several_calls_in_one_turn():
    text = json.dumps([CALL["function"], {"name": "sub"}])
    (_, turn) = read({"conversations": [{"from": "human", "value": "x"}, {"from": "tool_call", "value": text}]})[
        "messages"
    ]
    assert [call["function"]["name"] for call in turn["tool_calls"]] == ["add", "sub"]
    assert turn["tool_calls"][1]["function"]["arguments"] == {}


def turns(*contents):
    return {"messages": [*contents, ANSWERED]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Who?", "answer": None}, "without 'answer'"),
        ({"question": 5, "answer": "x"}, "expected text, found int"),
        ({"messages": []}, "no turns"),
        ({"messages": "Who?"}, "no turns"),
        ({"messages": ["Who?"]}, "expected a turn with a role, found str"),
        ({"messages": [ASKED]}, "no turn of the assistant"),
        (turns({"role": "narrator", "content": "x"}), "unknown role 'narrator'"),
        (turns({"content": "x"}), "unknown role 'None'"),
        (
            turns({"role": "user", "content": [{"type": "image"}]}),
            "content part 'image' in a turn of the user, which is not supported",
        ),
        (turns({"role": "user"}), "expected text, found NoneType"),
        (turns({"role": "function_call", "content": "add(1)"}), "a function call that is not JSON"),
        (turns({"role": "function_call", "content": '{"a": 1}'}), "a function call without a name"),
        (turns({"role": "function_call", "content": "[5]"}), "a function call without a name"),
        (
            turns({"role": "function_call", "content": '{"name": "f", "arguments": "{"}'}),
            "a function call whose arguments are not JSON",
        ),
        ({"messages": PAIR, "tools": "add"}, "tools that are not JSON"),
        ({"chosen": "Who? Me.", "rejected": "x"}, "no 'Human:' turn in the transcript"),
        ({"prompt": [ASKED], "completion": "Me."}, "expected completion as a list, found str"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row, reason):
    with pytest.raises(UnusableRow) as caught:
        read(row)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("columns", "messages"),
    [
        (["instrction", "output"], ["columns instrction, output", "closest is Alpaca, which lacks instruction"]),
        (["instrction", "output"], ["did you mean 'instrction'?", "question/answer (question, answer)"]),
        (["conversation", "id"], ["closest is ShareGPT", "lacks conversations", "did you mean 'conversation'?"]),
        (["question", "reply"], ["closest is question/answer, which lacks answer"]),
    ],
)
def test_unknown_columns_name_the_nearest_format(columns, messages):
    with pytest.raises(UserError) as caught:
        recognize(columns, "toy.jsonl")
    assert str(caught.value).startswith("toy.jsonl: ")
    for message in messages:
        assert message in str(caught.value)


CONTENT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
def test_transcripts_come_apart_where_they_were_joined(pairs):
    text = "".join(f"\n\nHuman: {question}\n\nAssistant: {answer}" for question, answer in pairs)
    found = [(message["role"], message["content"]) for message in transcript_messages(text)]
    assert found == [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question", "solution"], "closest is question/answer"),  # not Alpaca, whose names are only near
        (["conversation", "id"], "closest is ShareGPT conversations"),  # not the preference form, which lacks more
    ],
)
def test_the_nearest_format_has_the_most_and_lacks_the_least(columns, message):
    with pytest.raises(UserError, match=message):
        recognize(columns, "toy.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Who?", "output": "Me.", "history": 5},
        {"instruction": "Who?", "output": "Me.", "history": [["Hi."]]},
        {"messages": [ASKED, {**ANSWERED, "tool_calls": 5}]},
        {"messages": [ASKED, {"role": "assistant", "content": ["Me."], "tool_calls": [CALL]}]},
        {"messages": PAIR, "tools": 5},
        {"messages": PAIR, "tools": "5"},
        {"prompt": [ASKED], "completion": 5},
        {"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]},
    ],
    ids=str,
)
def test_values_of_the_wrong_shape_are_unusable_rows(row):
    with pytest.raises(UnusableRow):
        read(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "call", "[]", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "function", "name", "arguments"]), inner)
    ),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([spelling for names in ROLES.values() for spelling in names]) | JSON,
        "from": JSON,
        "content": st.text(max_size=5) | JSON,
        "value": JSON,
        "tool_calls": st.lists(JSON, max_size=2),
    },
)


@given(st.lists(TURN | JSON, max_size=4), st.sampled_from(["messages", "conversations"]))
def test_any_turns_are_messages_or_a_reason(turns, column):
    try:
        conversation = read({column: turns})
    except UnusableRow as reason:
        assert str(reason)
        return
    found = conversation["messages"]
    assert len(found) == len(turns)
    assert {message["role"] for message in found} <= {"system", "user", "assistant", "tool"}
    assert all(isinstance(message["content"], str) for message in found if "tool_calls" not in message)
    assert any(message["role"] == "assistant" for message in found)


@given(st.data(), st.sampled_from(FORMATS["instructions"]))
def test_any_values_are_messages_or_a_reason(data, form):
    row = {name: data.draw(JSON, name) for name in form.columns}
    try:
        conversation = read_row(row, form, "instructions")
    except UnusableRow as reason:
        assert str(reason)
        return
    assert conversation.get("text") or any(message["role"] == "assistant" for message in conversation["messages"])


def test_a_system_prompt_beside_a_whole_conversation_is_kept():
    system = {"role": "system", "content": "Be short."}
    row = {"prompt": [system, ASKED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}
    assert [message["role"] for message in read(row)["messages"]] == ["system", "user", "assistant"]


PARTS = {"role": "user", "content": [{"type": "text", "text": "Who?"}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [PARTS, ANSWERED]},
        {"conversations": [PARTS, ANSWERED]},
        {"prompt": [PARTS], "completion": [ANSWERED]},
        {"prompt": [PARTS], "chosen": [ANSWERED], "rejected": [ANSWERED]},
        {"chosen": [PARTS, ANSWERED], "rejected": ["never read"]},
    ],
    ids=lambda row: " ".join(row),
)
def test_content_parts_are_understood_in_every_format_or_named(row):
    assert read(row)["messages"] == PAIR
    with pytest.raises(UnusableRow, match="content part 'image_url'"):
        read(json.loads(json.dumps(row).replace(json.dumps(PARTS), json.dumps(IMAGE))))


@pytest.mark.parametrize("name", [form.name for form in FORMATS["instructions"] if form is not PLAIN_TEXT])
def test_tools_of_every_format_may_be_json_text(name):
    (row, *_) = ROWS[name]
    assert read({**row, "tools": json.dumps([TOOL])})["tools"] == [TOOL]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who?", "answer": ""},
        {"messages": [ASKED, {"role": "assistant", "content": " \n"}]},
        {"messages": [ASKED, {"role": "assistant", "content": []}, ASKED, {"role": "assistant", "content": ""}]},
    ],
    ids=str,
)
def test_a_conversation_in_which_the_assistant_says_nothing_is_unusable(row):
    with pytest.raises(UnusableRow, match="every assistant turn is empty"):
        read(row)
    silent = {"role": "assistant", "content": ""}
    assert read({"messages": [ASKED, silent, ASKED, ANSWERED]})["messages"][1] == silent


@pytest.mark.parametrize(
    ("columns", "labels", "found"),
    [
        (["prompt", "completion", "label"], [True, None, False], "label"),
        (["prompt", "completion", "label"], ["true", "False"], "label"),
        (["messages", "label"], [1, 0], "label"),
        (["instruction", "output", "kto_tag"], [True], "kto_tag"),
        (["prompt", "completion", "label"], ["sports", "news"], None),
        (["prompt", "completion", "label"], [None], None),
        (["question", "answer", "label"], [0, 1, 2], None),
        (["text", "label"], [0, 1], None),  # a classification dataset
        (["prompt", "chosen", "rejected", "label"], [True], None),
    ],
)
def test_unpaired_preferences_have_a_label_that_is_true_or_false(columns, labels, found):
    rows = [{**dict.fromkeys(columns, "x"), columns[-1]: label} for label in labels]
    assert label_column(recognize(columns, "toy"), rows) == found
