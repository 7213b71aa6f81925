"""Tool calls in text of every usual family; what is malformed stays a call, and nothing is slow or runs."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmlab.rewards import tool_success
from llmlab.rewards.completions import ToolCall, calls_in_text, tool_calls

ADD, NOW = ToolCall("add", {"a": 1, "b": [2]}), ToolCall("now", {})
JSON = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": [2]}}'
SEP, BEGIN, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
DEEPSEEK = f"<｜tool▁calls▁begin｜>{BEGIN}%s{END}<｜tool▁calls▁end｜>"

WELL_FORMED = {
    "Hermes": f"I add.\n<tool_call>\n{JSON}\n</tool_call>",
    "Hermes, arguments as text": '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}</tool_call>',
    "Hermes, OpenAI's form": f'<tool_call>{{"type": "function", "function": {JSON}}}</tool_call>',
    "Llama 3": f"<|python_tag|>{LLAMA}<|eom_id|>",
    "Llama 3, bare": f"{LLAMA}<|im_end|>\n<|eot_id|>\n",
    "Llama 3, bare, with a type": f'{{"type": "function", {LLAMA[1:]}',
    "Llama 3, function tag": '<function=add>{"a": 1, "b": [2]}</function>',
    "Llama 3, built in": "<|python_tag|>add.call(a=1, b=[2])",
    "pythonic": "[add(a=1, b=[2])]",
    "pythonic, marked": "<|tool_call_start|>[add(a=1, b=[2])]<|tool_call_end|>",
    "Mistral 7B": f"[TOOL_CALLS] [{JSON}]</s>",
    "Mistral 7B without its special token": f"[{JSON}]",
    "Mistral Small 3.2": '[TOOL_CALLS]add[CALL_ID]x1Y2z3A4b[ARGS]{"a": 1, "b": [2]}',
    "Magistral": '[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2]}',
    "DeepSeek V3": DEEPSEEK % f'function{SEP}add\n```json\n{{"a": 1, "b": [2]}}\n```',
    "DeepSeek V3.1": DEEPSEEK % f'add{SEP}{{"a": 1, "b": [2]}}',
}
SEVERAL = {
    "Hermes": f'<tool_call>{JSON}</tool_call>\n<tool_call>{{"name": "now"}}</tool_call>',
    "Llama 3": f'<|python_tag|>{LLAMA}; {{"name": "now", "parameters": {{}}}}',
    "Llama 3, bare": f'{LLAMA}; {{"name": "now", "parameters": {{}}}}',
    "pythonic": "[add(a=1, b=[2]), now()]",
    "Mistral 7B": f'[TOOL_CALLS][{JSON}, {{"name": "now", "arguments": {{}}}}]',
    "Magistral": '[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2]}[TOOL_CALLS]now[ARGS]{}',
    "DeepSeek V3.1": DEEPSEEK % f'add{SEP}{{"a": 1, "b": [2]}}{END}\n{BEGIN}now{SEP}{{}}',
}
MALFORMED = [
    "<tool_call>",
    f"<tool_call>{JSON}",
    "<tool_call>{broken</tool_call>",
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "{"}</tool_call>',
    "<tool_call>" + "[" * 5000 + "]" * 5000 + "</tool_call>",
    "<function=add><parameter=a>1</parameter>",
    "<function=add><parameter=a>1</function>",
    "<function=add>prose</function>",
    "<function=add>{1}</function>",
    "<|python_tag|>",
    "<|python_tag|>print(1)",
    "<|python_tag|>add(a=__import__('os').getpid())",
    "<|python_tag|>add(**{'a': 1})",
    '<|python_tag|>{"name": "add"',
    "[add(a=1]",
    "[add(a=open('x'))]",
    "[add(a=1), add(**{})][0]",
    "[add(a=" + "(" * 5000,
    '{"name": "add", "parameters": {"a": 1',
    '[{"name": "add", "arguments": {"a": 1',
    "[TOOL_CALLS]",
    "[TOOL_CALLS]add[ARGS]{",
    "[TOOL_CALLS]add[ARGS]5",
    "<｜tool▁calls▁begin｜>",
    BEGIN + "add",
    f'{BEGIN}add{SEP}{{"a": 1}}',
    "<|tool_call_start|>[add(a=1)]",
]
NO_CALL = [
    "",
    "hello",
    '{"name": "Ann", "age": 3}',
    "[1, 2]",
    "[see (this) page](https://example.org)",
    "[link(s)](https://example.org)",
    "add(a=1)",
    '{"a": 1} and more',
    "```python\nadd(a=1)\n```",
]


@pytest.mark.parametrize("text", WELL_FORMED.values(), ids=WELL_FORMED)
def test_every_family_says_the_same(text):
    assert calls_in_text(text) == [ADD]
    assert tool_success([text, [{"role": "assistant", "content": text}]], tools=['["add"]'] * 2) == [1, 1]


@pytest.mark.parametrize("text", SEVERAL.values(), ids=SEVERAL)
def test_several_calls_in_one_turn(text):
    assert calls_in_text(text) == [ADD, NOW]


def test_xml_values_stay_text_with_their_line_breaks():
    text = (
        "<tool_call>\n<function=write>\n<parameter=path>\na.py\n</parameter>\n"
        "<parameter=text>\nif a < b:\n\n    <tool_call>\n</parameter>\n</function>\n</tool_call>"
    )
    assert calls_in_text(text) == [ToolCall("write", {"path": "a.py", "text": "if a < b:\n\n    <tool_call>"})]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40])
def test_malformed_calls_stay_calls(text):
    assert [call.name for call in calls_in_text(text)] == [None]
    assert tool_success([text], absent=None) == [0]


@pytest.mark.parametrize("text", NO_CALL)
def test_answers_are_no_calls(text):
    assert calls_in_text(text) == []
    assert tool_success([text], absent=None) == [None]


@pytest.mark.parametrize("call", WELL_FORMED.values(), ids=WELL_FORMED)
def test_calls_quoted_while_thinking_are_none(call):
    quoted = call + " or so?"
    assert calls_in_text(f"<think>{quoted}</think>The answer is 3.") == []
    assert calls_in_text(f"{quoted}</think>The answer is 3.") == []  # where the template opened the thinking
    assert calls_in_text(f"<think>{quoted}") == []
    assert calls_in_text(f"<think>{quoted}</think>\n\n{call}") == [ADD]


def test_tags_inside_arguments_are_arguments():
    arguments = {"text": "</tool_call><think>[TOOL_CALLS]"}
    assert calls_in_text(f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>") == [
        ToolCall("f", arguments)
    ]


def test_messages_have_calls_of_their_own():
    call = {"function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    parts = [{"type": "text", "text": "x"}, {"type": "tool_use", "id": "1", "name": "now", "input": {}}]
    thinking = {"role": "assistant", "reasoning_content": WELL_FORMED["Hermes"], "content": "3"}
    assert tool_calls([{"role": "assistant", "content": None, "tool_calls": [call]}]) == [ADD]
    assert tool_calls([{"role": "assistant", "content": parts}, thinking]) == [NOW]
    (broken,) = tool_calls([{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}])
    assert broken.name is None


MARKS = ["<tool_call>", "<function=", "<|python_tag|>", "[TOOL_CALLS]", "<|tool_call_start|>", BEGIN]
MARKS += ["<｜tool▁calls▁begin｜>"]
PIECES = [
    "<think>",
    "</think>",
    "</tool_call>",
    "<|eot_id|>",
    "</function>",
    "<parameter=",
    END,
    JSON,
    "[",
    "{",
    '"',
    "\\",
]
TEXT = st.lists(st.sampled_from([*MARKS, *PIECES, *WELL_FORMED.values(), *MALFORMED]) | st.text(max_size=5))


@given(TEXT.map("".join))
@settings(max_examples=500, deadline=None)
@example("\ud800<tool_call>\x00")
def test_any_text_has_a_clear_result(text):
    for call in calls_in_text(text):
        assert (isinstance(call.name, str) and isinstance(call.arguments, dict)) or call.name is None
    (score,) = tool_success([text], absent=None)
    assert score is None or 0 <= score <= 1


@pytest.mark.parametrize(
    "piece", [*MARKS, *PIECES, *MALFORMED, *WELL_FORMED.values(), '<tool_call>{"', " ", "\n", "a", "<tool_call>["]
)
def test_a_long_text_takes_no_time(piece):
    assert len(calls_in_text(piece * (1_000_000 // len(piece)))) <= 150_000  # quadratic time would be minutes


def test_what_trl_parses_by_a_response_template_is_read_the_same(tmp_path):
    """Where it fails, TRL hands over the text, in which the malformed call is still one."""
    from trl.chat_template_utils import parse_response, qwen3_template

    from llmlab.data.tokenizer import learn_bpe, load_tokenizer
    from llmlab.settings.data import DataSource

    learn_bpe([DataSource(name="demo/stories", subset="20kB")], 300, tmp_path / "t", show_progress=False)
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    tokenizer.response_template = qwen3_template

    def reply(text):
        prefix = tokenizer("<|im_start|>assistant\n")["input_ids"]
        return [parse_response(tokenizer, tokenizer(text + "<|im_end|>")["input_ids"], prefix=prefix)]

    called = reply(f"<think>{WELL_FORMED['Hermes']}</think>{WELL_FORMED['Hermes']}")
    assert "tool_calls" in called[0] and tool_calls(called) == [ADD]
    assert [call.name for call in tool_calls(reply("<tool_call>{broken</tool_call>"))] == [None]


@pytest.mark.parametrize(
    "text",
    [
        '<think>a</think>\n<think>b</think>\n{"name": "f", "arguments": {}}',
        'Sure. <think>a</think>{"name": "f", "arguments": {}}',
        '{"type": "function", "function": {"name": "f", "arguments": {}}}',
    ],
)
def test_bare_calls_after_thinking_and_of_openai_are_calls(text):
    assert [call.name for call in calls_in_text(text)] == ["f"]
