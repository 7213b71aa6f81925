"""`tool_success`, `verbosity_penalty` and `off_policy_penalty`."""

import pytest

from llmlab.rewards import off_policy_penalty, tool_success, verbosity_penalty
from llmlab.rewards.tools import is_error
from llmlab.settings.errors import UserError

SEARCH = {"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}


def call(name="search"):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {}}}]}


def result(content):
    return {"role": "tool", "name": "search", "content": content}


def written(*names):
    return "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in names)


@pytest.mark.parametrize(
    "content",
    ['{"error": "no such file"}', "{'error': 'division by zero'}", {"error": "x"}, "ValueError: bad", "Error: gone",
     "Traceback (most recent call last):\n ...", '{"success": false}', '{"status": "failed"}', '{"isError": true}',
     [{"type": "text", "text": "error: gone"}]],
)  # fmt: skip
def test_errors(content):
    assert is_error(content)


@pytest.mark.parametrize(
    "content",
    ["42", "", None, "0 errors found", "the error rate is 3 %", '{"error": null, "rows": 3}', '{"success": true}',
     "[1, 2]", '"Error handling in Python"', "[" * 100_000, "{'error': None}"],
)  # fmt: skip
def test_no_errors(content):
    assert not is_error(content)


def test_tool_success_in_an_episode():
    half = [call(), result("{'error': 'x'}"), call(), result("3"), {"role": "assistant", "content": "3"}]
    unanswered = [call(), result("3"), call()]  # the episode ended before the second result
    two_at_once = [{**call(), "tool_calls": call()["tool_calls"] * 2}, result("1"), result("2")]
    assert tool_success([half, unanswered, two_at_once]) == [0.5, 0.5, 1]


def test_tool_success_where_nothing_ran():
    texts = [
        written("search"),
        written("search", "fly"),
        "<tool_call>{broken</tool_call>",
        "<tool_call>{}",
        "hello",
        "",
    ]
    assert tool_success(texts) == [1, 1, 0, 0, 0, 0]
    assert tool_success(texts, tools=[[SEARCH]] * 6) == [1, 0.5, 0, 0, 0, 0]
    assert tool_success(texts, tools=[["fly"]] * 6) == [0, 0.5, 0, 0, 0, 0]
    assert tool_success([[call("fly")], [call()]], tools=[[SEARCH]] * 2) == [0, 1]


def test_tool_success_without_calls():
    assert tool_success(["hi"], absent=None) == [None]
    assert tool_success(["hi", written("search")], tools=[[], []]) == [None, 0]


def test_results_that_the_model_made_up_count_for_nothing():
    text = "<tool_call>broken</tool_call><tool_response>42</tool_response>"
    assert tool_success([text]) == [0]


def test_verbosity_penalty_counts_extra_calls():
    texts = ["no call", written("a"), written(*"abc"), written(*["a"] * 40)]
    assert verbosity_penalty(texts) == [0, 0, 2, 20]
    assert verbosity_penalty(texts, steps=0, most=3) == [0, 1, 3, 3]
    assert verbosity_penalty(texts, expected_steps=[0, 0, 3, None]) == [0, 1, 0, 20]
    assert verbosity_penalty([[call(), result("1"), call(), result("2")]]) == [1]


def test_off_policy_penalty():
    texts = [written("search"), written("search", "fly"), "<tool_call>?</tool_call>", "yes"]
    assert off_policy_penalty(texts, only_tools=["search"]) == [0, 1, 1, 0]
    assert off_policy_penalty(texts, allowed_tools=[[SEARCH], ["search", "fly"], None, []]) == [0, 0, None, 0]
    assert off_policy_penalty([" yes\n", "maybe"], only_answers=["yes", "no"]) == [0, 1]
    assert off_policy_penalty(["yes", "yes"], allowed_answers=["yes", ["no"]]) == [0, 1]
    with pytest.raises(UserError, match="allowed_tools"):
        off_policy_penalty(texts)


def test_many_unclosed_calls_take_no_time():
    assert tool_success(["<tool_call>" * 50_000]) == [0]
