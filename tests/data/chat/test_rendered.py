"""Rendered rows on disk: damaged ones are made anew, and what is cached never decides what is read."""

import json
import os

import pyarrow
import pytest

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.rows import open_rows
from llmlab.settings.data import DataSource


@pytest.fixture
def open_(tmp_path):
    """Returns a function that opens numbered rows of three files, and which tells whether it had to render."""
    files = tmp_path / "files"
    files.mkdir()
    for name in "abc":
        rows = [{"question": f"{name}{number}?", "answer": "Yes."} for number in range(20)]
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def open_(at_most=None, name="files"):
        rendered = []

        def render(texts):
            rendered.append(len(texts))
            return pyarrow.table({"text": [json.loads(text)["question"] for text in texts]})

        render.schema = pyarrow.schema({"text": pyarrow.string()})
        source = load_conversations(DataSource(name=str(tmp_path / name)))
        rows, whole = open_rows(source, tmp_path / "cache" / "rows-1", at_most, render)
        return rows["text"][:], whole, sum(rendered)

    return open_


def test_a_part_is_of_all_files_and_the_same_whatever_is_cached(open_):
    first, whole, rendered = open_(12)
    assert (len(first), whole, rendered) == (12, False, 12)
    assert {text[0] for text in first} == set("abc")
    assert open_(12) == (first, False, 0)
    assert open_(6) == (first[:6], False, 0)
    longer, whole, rendered = open_(30)
    assert (longer[:12], whole, rendered) == (first, False, 30)
    every, whole, rendered = open_()
    assert (len(set(every)), whole, rendered) == (60, True, 60)
    assert every[:30] == longer
    assert open_(12) == (first, False, 0)
    assert open_(60) == (every, True, 0)
    assert open_(1000) == (every, True, 0)


def test_of_a_single_file_a_part_is_its_beginning(open_):
    assert open_(5, "files/a.jsonl")[:2] == ([f"a{number}?" for number in range(5)], False)
    assert open_(20, "files/a.jsonl")[1] is True


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rows.arrow", lambda path: os.truncate(path, 100)),
        ("rows.arrow", flip),
        ("rows.arrow", os.remove),
        ("llmlab.json", os.remove),
        ("llmlab.json", lambda path: path.write_text('{"rows": 1}')),
    ],
    ids=["cut", "altered", "gone", "no record", "record"],
)
@pytest.mark.parametrize("at_most", [None, 12])
def test_damaged_rows_are_made_anew_with_a_notice(open_, tmp_path, capsys, file, damage, at_most):
    expected = open_(at_most)
    damage(tmp_path / "cache" / "rows-1" / file)
    assert open_(at_most) == expected
    assert "files: its cache is damaged and will be rebuilt (" in capsys.readouterr().err
    assert open_(at_most)[2] == 0
    assert not capsys.readouterr().err


def test_rows_are_rendered_in_batches_and_read_no_further_than_asked(open_, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.data.chat.rows.BATCH", 7)
    monkeypatch.setattr("llmlab.data.sources.LOOK_AT", 5)
    with (tmp_path / "files" / "a.jsonl").open("a") as file:
        file.write("no JSON\n")
    assert open_(19, "files/a.jsonl") == ([f"a{number}?" for number in range(19)], False, 19)
