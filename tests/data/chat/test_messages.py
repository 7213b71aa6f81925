"""Content in parts, calls and results of every usual API become one form; what is not understood is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.chat.messages import UnusableRow, is_empty, join_turns, parse_tools, read_turns

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


def text(value, kind="text"):
    return {"type": kind, "text": value}


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_text_parts_are_the_text(role, kind):
    turns = [{"role": role, "content": [text("1 + ", kind), text("1?", kind)]}]
    assert read_turns(turns) == [{"role": role, "content": "1 + 1?"}]


def test_parts_as_arrow_stores_them_have_keys_of_other_types():
    part = {"type": "text", "text": "Hi.", "image_url": None, "name": None, "input": None}
    assert read_turns([{"role": "user", "content": [part], "tool_calls": None}]) == [
        {"role": "user", "content": "Hi."}
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}},
        {"type": "tool_call", "name": "add", "arguments": '{"a": 1}'},
        {"type": "tool_call", "name": "add", "args": {"a": 1}},
        {"type": "tool_call", "tool_call": CALL["function"]},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 1}'},
    ],
)
def test_calls_among_the_parts(part):
    assert read_turns([{"role": "assistant", "content": [text("I add."), part]}]) == [
        assistant("I add.", tool_calls=[CALL])
    ]


def test_openais_older_calls():
    turn = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    assert read_turns([turn]) == [assistant(tool_calls=[CALL])]


def test_results_among_the_parts_of_a_user_are_turns_of_the_tool():
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": "2"},
        {"type": "tool_result", "tool_use_id": "2", "content": [text("3")]},
    ]
    tools = [{"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}]
    assert read_turns([{"role": "user", "content": results}]) == tools
    asked = {"role": "user", "content": "And?"}
    assert read_turns([{"role": "user", "content": [*results, text("And?")]}]) == [*tools, asked]


def test_a_result_that_is_an_error_says_so():
    (message,) = read_turns(
        [{"role": "user", "content": [{"type": "tool_result", "content": "boom", "is_error": True}]}]
    )
    assert message == {"role": "tool", "content": '{"error": "boom"}'}


@pytest.mark.parametrize("content", [{"sum": 2}, [1, {"b": 2}], 5])
def test_what_a_tool_returned_that_is_no_text_is_json(content):
    (message,) = read_turns([{"role": "tool", "content": content}])
    assert json.loads(message["content"]) == content


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "reasoning_content": "One, two.", "content": "2"},
        {"role": "assistant", "thinking": "One, two.", "content": "2"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "One, two."}, text("2")]},
        {"role": "assistant", "content": [{"type": "reasoning", "text": "One, two."}, text("2")]},
    ],
)
def test_reasoning_stands_beside_the_answer(turn):
    assert read_turns([turn]) == [assistant("2", reasoning_content="One, two.")]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content part 'image_url' in a turn"),
        ({"role": "assistant", "content": [{"type": "audio"}]}, "content part 'audio' in a turn of the assistant"),
        ({"role": "tool", "content": [text("x"), {"type": "image"}]}, "content part 'image' in a turn of the tool"),
        ({"role": "user", "content": [{"type": "tool_use", "name": "f"}]}, "content part 'tool_use' in a turn of the"),
        ({"role": "user", "content": [{"content": "x"}]}, "content part 'None'"),
        ({"role": "user", "content": ["x"]}, "expected a content part with a type, found str"),
        ({"role": "user", "content": [{"type": "text"}]}, "expected text, found NoneType"),
        ({"role": "assistant", "content": None}, "expected text, found NoneType"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool calls in a turn of the user"),
        (assistant(tool_calls=[{"name": "f", "arguments": [1]}]), "whose arguments are list, not an object"),
        (assistant(tool_calls=[{"name": "f", "arguments": "[" * 100_000}]), "whose arguments are not JSON"),
    ],
)
def test_what_is_not_understood_is_named(turn, reason):
    with pytest.raises(UnusableRow, match=reason):
        read_turns([turn])


def test_tools_may_be_json_text():
    assert parse_tools('[{"name": "add"}]') == parse_tools([{"name": "add"}]) == parse_tools({"name": "add"})
    assert parse_tools(None) == parse_tools(" ") == parse_tools("[]") == []


def test_turns_of_the_assistant_in_a_row_are_joined():
    turns = [assistant("I add."), assistant(tool_calls=[CALL]), assistant("", reasoning_content="So."), assistant("2")]
    asked, answered = {"role": "user", "content": "?"}, assistant("!")
    joined = assistant("I add.\n\n2", reasoning_content="So.", tool_calls=[CALL])
    assert join_turns([asked, *turns, asked, answered]) == [asked, joined, asked, answered]


PART = st.dictionaries(
    st.sampled_from(["type", "text", "input", "name", "content", "thinking", "arguments", "output"]),
    st.sampled_from(["text", "tool_use", "tool_result", "thinking", "function_call_output", {"a": 1}, [], None, 5]),
)


@given(st.lists(PART, max_size=3), st.sampled_from(["user", "assistant", "tool", "system"]))
def test_any_parts_are_messages_or_a_reason(parts, role):
    try:
        messages = read_turns([{"role": role, "content": parts}])
    except UnusableRow as reason:
        assert str(reason)
        return
    assert all(isinstance(message["content"], str) for message in messages)
    if any(part.get("type") == "text" and part["text"] for part in parts if role != "tool"):
        assert not all(map(is_empty, messages))  # nothing that was said is read as nothing
