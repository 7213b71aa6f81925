"""Which tokens of a conversation are trained, under templates with and without marks, and what is found wrong."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from llmlab.data.chat.messages import UnusableRow
from llmlab.data.chat.rendering import RenderedRow, Renderer, add_chat_template
from llmlab.data.tokenizer import TEMPLATE, load_tokenizer
from llmlab.settings.errors import UserError

MARKED = TEMPLATE.read_text()
# the same text from a template that marks nothing, and knows no tools
UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITES = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Go"},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL_CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sun": true}'},
    {"role": "assistant", "content": "Sunny."},
]

WORDS = st.text(st.characters(codec="utf-8"), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    """One of our own: its template is changed here."""
    return load_tokenizer(str(tokenizer_folder))


def conversation(messages, tools=None):
    return {"messages": messages, "tools": tools}


def trained_text(row, tokenizer):
    """Returns the runs of trained tokens as text."""
    runs, run = [], []
    for token, on in zip([*row.input_ids, 0], [*row.trained, False], strict=True):
        if on:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.fixture
def renderer(tokenizer):
    def make(template=MARKED, loss_on="assistant"):
        tokenizer.chat_template = template
        return Renderer(tokenizer, loss_on)

    return make


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", ["Hello you<|im_end|>", "Go<|im_end|>"]), ("completion", ["Go<|im_end|>"])],
)
def test_the_assistants_words_and_the_end_of_its_turn_are_trained(renderer, tokenizer, template, loss_on, expected):
    row = renderer(template, loss_on).render(conversation(CHAT))
    assert trained_text(row, tokenizer) == expected
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert row.labels == [token if on else -100 for token, on in zip(row.input_ids, row.trained, strict=True)]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_everything_may_be_trained(renderer, template):
    row = renderer(template, "all").render(conversation(CHAT))
    assert all(row.trained) and row.labels == row.input_ids


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), max_size=12), st.text(st.characters(codec="utf-8"), max_size=12)
        ),
        min_size=1,
        max_size=3,
    )
)
def test_marks_and_turns_agree_whatever_is_said(tokenizer, turns):
    """The template's own marks are the standard that asking turn by turn is held to."""
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    rows = []
    for template in (MARKED, UNMARKED):
        tokenizer.chat_template = template
        rows.append(Renderer(tokenizer).render(conversation(messages)))
    assert rows[0] == rows[1]
    assert sum(rows[0].trained) >= len(turns)  # at least the end of each turn
    assert Renderer(tokenizer).find_problem(rows[0]) == ""


def test_calls_are_trained_and_results_are_not(renderer, tokenizer):
    row = renderer().render(conversation(TOOL_CHAT, [TOOL]))
    call, answer = trained_text(row, tokenizer)
    assert re.sub(r"\s", "", call) == '<tool_call>{"name":"weather","arguments":{"city":"Rome"}}</tool_call><|im_end|>'
    assert answer == "Sunny.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (UNMARKED, conversation(TOOL_CHAT[:1] + TOOL_CHAT[-1:], [TOOL]), "does not show its tools"),
        (UNMARKED, conversation(TOOL_CHAT), "does not show its tools"),
        (REWRITES, conversation(CHAT), "changes earlier turns"),
        (
            "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}",
            conversation(CHAT),
            "refuses",
        ),
        (
            "{{ 'a' + 1 }}{% generation %}{% endgeneration %}",
            conversation(CHAT),
            "error in the chat template: can",
        ),
    ],
)
def test_rows_that_a_template_cannot_show_are_counted_not_guessed(renderer, template, row, reason):
    with pytest.raises(UnusableRow, match=reason):
        renderer(template).render(row)


def test_plain_text_is_trained_whole_and_ends(renderer, tokenizer):
    row = renderer(None).render({"text": "Once upon a time"})
    assert all(row.trained) and row.input_ids[-1] == tokenizer.eos_token_id
    again = renderer(None).render({"text": "Once upon a time" + tokenizer.eos_token})
    assert again == row
    with pytest.raises(UserError, match="no chat template"):
        renderer(None).render(conversation(CHAT))


def test_what_is_wrong_with_a_mask_is_named(tokenizer):
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    word = tokenizer.encode("w")[0]
    problem = lambda ids, trained: Renderer(tokenizer).find_problem(RenderedRow(ids, trained))  # noqa: E731
    assert problem([bos, word, eos], [False, True, True]) == ""
    assert "nothing in it is trained" in problem([bos, word, eos], [False] * 3)
    assert "would never stop: it ends with 'w', expected" in problem([bos, word, eos], [False, True, False])
    assert f"begins with {tokenizer.bos_token} twice" in problem([bos, bos, word, eos], [False, False, True, True])
    assert f"padding token {tokenizer.pad_token} is trained" in problem(
        [bos, word, pad, eos], [False, True, True, True]
    )
    newline = tokenizer.encode("\n")
    assert problem([bos, word, eos, *newline], [True] * (3 + len(newline))) == ""  # loss_on all


def test_chatml_is_given_where_there_is_no_template(tokenizer, tmp_path):
    assert add_chat_template(tokenizer, None) == []  # it has one
    tokenizer.chat_template = None
    assert add_chat_template(tokenizer, None) == []  # our vocabularies have the tokens
    assert tokenizer.chat_template == MARKED
    other = tmp_path / "mine.jinja"
    other.write_text(UNMARKED)
    assert add_chat_template(tokenizer, str(other)) == [] and tokenizer.chat_template == UNMARKED
    with pytest.raises(
        UserError, match=r"chat_template = nowhere.jinja: No such file.*expected chatml, chatml_compact or"
    ):
        add_chat_template(tokenizer, "nowhere.jinja")


def test_the_compact_template_shows_signatures_and_differs_in_nothing_else(tokenizer, renderer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}}}}]
    tools += [{"type": "function", "function": {"name": "now"}}]
    texts = {}
    for name in ("chatml", "chatml_compact"):
        tokenizer.chat_template = None
        add_chat_template(tokenizer, name)
        texts[name] = tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False)
    head, _, listing = texts["chatml"].partition("<tools>\n")
    listing, _, rest = listing.partition("</tools>")
    assert [json.loads(line) for line in listing.splitlines()] == tools
    head = head.replace(", given as JSON schemas:", ":")
    assert texts["chatml_compact"] == f"{head}<tools>\nadd(a, b)\nnow()\n</tools>{rest}"


STRICT = (  # as Gemma's and older Mistral's
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWICE = [CHAT[1], CHAT[2], {"role": "assistant", "content": "Anything else?"}]


def test_two_turns_in_a_row_are_rendered_as_they_are_or_joined(renderer, tokenizer):
    for template in (MARKED, UNMARKED):
        row = renderer(template).render(conversation(TWICE))
        assert trained_text(row, tokenizer) == ["Hello you<|im_end|>", "Anything else?<|im_end|>"]
    row = renderer(STRICT).render(conversation(TWICE))
    assert trained_text(row, tokenizer) == ["Hello you\n\nAnything else?<|im_end|>"]


def test_two_turns_in_a_row_of_a_prompt_are_joined_too(renderer, tokenizer):
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = {"prompt": [*TWICE, CHAT[3]], **answers, "tools": None}
    ids, chosen, rejected = renderer(STRICT, "all").render_pair(pair)
    assert "Hello you\n\nAnything else?<|im_end|>" in tokenizer.decode(ids)
    assert [tokenizer.decode(side) for side in (chosen, rejected)] == ["chosen<|im_end|>\n", "rejected<|im_end|>\n"]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_reasoning_is_trained_whether_or_not_the_template_knows_it(renderer, tokenizer, template):
    turns = [CHAT[1], {**CHAT[2], "reasoning_content": "A greeting."}]
    row = renderer(template).render(conversation(turns))
    assert trained_text(row, tokenizer) == ["<think>\nA greeting.\n</think>\n\nHello you<|im_end|>"]


def test_our_template_reads_content_parts_and_names_what_it_cannot(tokenizer):
    tokenizer.chat_template = MARKED

    def parts(message):
        half = len(message["content"]) // 2
        texts = message["content"][:half], message["content"][half:]
        return {**message, "content": [{"type": "text", "text": text} for text in texts]}

    for messages, tools in ((CHAT, None), (CHAT, [TOOL]), (TOOL_CHAT, [TOOL])):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert tokenizer.apply_chat_template(list(map(parts, messages)), tools=tools, tokenize=False) == text
    result = [CHAT[1], {"role": "tool", "content": {"sun": True}}]
    assert '{"sun": true}' in tokenizer.apply_chat_template(result, tokenize=False)
    for content, reason in ([{"type": "image_url"}], "content part 'image_url' is not"), (None, "without content"):
        with pytest.raises(TemplateError, match=reason):
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
