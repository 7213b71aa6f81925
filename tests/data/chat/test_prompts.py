"""Prompts of every format, what of a row reaches rewards, and what is left out and counted."""

import json

import pytest

from llmlab.data.chat.conversations import recognize
from llmlab.data.chat.makers import PromptEncoder, decode_prompts
from llmlab.data.chat.rows import build_rows
from llmlab.settings.data import DataSettings, DataSource
from llmlab.settings.errors import UserError

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "Sure?"}


@pytest.fixture
def tokenizer(tmp_path):
    from llmlab.data.chat.rendering import add_chat_template
    from llmlab.data.tokenizer import learn_bpe, load_tokenizer

    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "What is 2 + 2? Be brief. Sure?"}\n' * 20)
    learn_bpe([DataSource(name=str(path))], 275, tmp_path / "tokenizer", show_progress=False)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    add_chat_template(tokenizer, None)
    return tokenizer


def read(tokenizer, folder, *files, max_prompt_length=None, **settings):
    sources = []
    for number, rows in enumerate(files):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"name": str(path)})
    values = {"datasets": sources, "cache_dir": str(folder / "cache"), "num_proc": 1, "validation_fraction": 0}
    maker = PromptEncoder(tokenizer, max_prompt_length=max_prompt_length)
    return build_rows(DataSettings(**{**values, **settings}), maker, seed=0)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "What is 2 + 2?"}, [USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "What is 2 + 2?", "system": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}, [USER]),
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER, AGAIN, ANSWER]}, [USER, ANSWER, AGAIN]),
        ({"messages": [USER, ANSWER, AGAIN]}, [USER, ANSWER, AGAIN]),
        ({"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]}, [USER]),
        ({"question": "What is 2 + 2?", "answer": "#### 4"}, [USER]),
        ({"question": "What is 2 + 2?"}, [USER]),
        ({"instruction": "What is 2 + 2?", "output": "4"}, [USER]),
        (
            {"instruction": "Sure?", "input": "", "output": "4", "history": [["What is 2 + 2?", "4"]]},
            [USER, ANSWER, AGAIN],
        ),
        (
            {
                "chosen": "\n\nHuman: What is 2 + 2?\n\nAssistant: 4\n\nHuman: Sure?\n\nAssistant: Yes",
                "rejected": "\n\nHuman: What is 2 + 2?\n\nAssistant: 4\n\nHuman: Sure?\n\nAssistant: No",
            },
            [USER, ANSWER, AGAIN],
        ),
    ],
)
def test_prompts_of_every_format(row, prompt, tokenizer, tmp_path):
    rows = decode_prompts(read(tokenizer, tmp_path, [{**row, "id": 7}]).train)
    kept = {name: value for name, value in row.items() if name != "prompt"}
    assert rows[0] == {"prompt": prompt, **kept, "id": 7}


def test_columns_of_mixed_sources_and_of_any_type(tokenizer, tmp_path):
    first = [{"question": "What is 2 + 2?", "answer": 4, "completions": ["x"]}]
    second = [{"prompt": "Sure?", "tags": ["a", {"b": 1}]}]
    rows = decode_prompts(read(tokenizer, tmp_path, first, second).train)
    seen = {row["prompt"][0]["content"]: row for row in rows}
    # a column that the trainer has a value of its own for is not passed on
    assert set(rows[0]) == {"prompt", "question", "answer", "tags"}
    assert seen["What is 2 + 2?"]["answer"] == 4 and seen["What is 2 + 2?"]["tags"] is None
    assert seen["Sure?"]["tags"] == ["a", {"b": 1}] and seen["Sure?"]["answer"] is None


def test_what_cannot_be_used_is_counted(tokenizer, tmp_path):
    long = {"prompt": "What is 2 + 2? " * 50}
    rows = [
        *({"prompt": f"What is {number}?"} for number in range(4)),
        long,
        {"prompt": "  "},
        {"prompt": None},
        {"prompt": [USER, ANSWER]},
        {"prompt": "Sure?", "tools": "add"},
    ]
    report = read(tokenizer, tmp_path, rows, max_prompt_length=40, allow_dropped=0.9).reports[0]
    assert report.trained_rows == 4
    assert dict(report.dropped) == {
        "longer than max_prompt_length = 40 tokens": 1,
        "an empty prompt": 1,
        "without 'prompt'": 1,
        "a prompt that does not end with the user's turn": 1,
        "tools that are not JSON": 1,
    }
    with pytest.raises(UserError, match="5 of 9 rows cannot be used"):
        read(tokenizer, tmp_path, rows, max_prompt_length=40)


def test_a_named_column_is_the_users_text(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "Sure?", "target": "yes"}\n')
    settings = DataSettings(
        datasets=[{"name": str(path), "column": "query"}], cache_dir=str(tmp_path / "c"), validation_fraction=0
    )
    rows = decode_prompts(build_rows(settings, PromptEncoder(tokenizer, max_prompt_length=None), seed=0).train)
    assert rows[0] == {"prompt": [AGAIN], "query": "Sure?", "target": "yes"}


def test_unknown_columns_are_explained():
    with pytest.raises(UserError, match="no format of prompts has the columns promt; .*The closest is prompt"):
        recognize(["promt"], "x.jsonl", "prompts")


def test_prompts_in_parts_and_with_two_turns_in_a_row(tokenizer, tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}
    image = {"role": "user", "content": [{"type": "image_url"}]}
    rows = read(tokenizer, tmp_path, [{"prompt": [parts, ANSWER, ANSWER, AGAIN]}])
    assert decode_prompts(rows.train)[0]["prompt"] == [USER, ANSWER, ANSWER, AGAIN]
    with pytest.raises(UserError, match="1 x content part 'image_url' in a turn of the user"):
        read(tokenizer, tmp_path, [{"prompt": [image]}])
    refuses = "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}"
    tokenizer.chat_template = refuses + "{{ raise_exception('twice') }}{% endif %}{{ m.content }}{% endfor %}"
    rows = read(tokenizer, tmp_path, [{"prompt": [USER, ANSWER, ANSWER, AGAIN]}])
    assert decode_prompts(rows.train)[0]["prompt"] == [USER, {"role": "assistant", "content": "4\n\n4"}, AGAIN]


@pytest.mark.parametrize("name", ["prompt", "question", "instruction"])
def test_tools_of_a_prompt_are_shown_or_the_row_is_unusable(tokenizer, tmp_path, name):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = {name: "What is 2 + 2?", "output": "4", "tools": json.dumps([tool])}
    seen = read(tokenizer, tmp_path, [row, {**row, "tools": None}])
    assert [each["tools"] for each in decode_prompts(seen.train)] == [[tool], None]
    assert seen.reports[0].counts["tokens"] > 2 * len(tokenizer("What is 2 + 2?")["input_ids"]) + 50
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="1 x the chat template does not show its tools"):
        read(tokenizer, tmp_path, [row, {**row, "tools": None}])
