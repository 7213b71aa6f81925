"""Sources: every local format reads the same, nothing is dropped unseen, and mistakes are answered with a way out."""

import csv
import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import files
from llmlab.data.sources import Tally, load_text
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

TEXTS = ["First, with a comma.", 'Second "quoted"\nover two lines.', "Drittens: äöü 🙂", "NA", "4"]


def read(name, *, allow_dropped=0.05, **options):
    source = load_text(DataSource(name=str(name), **options))
    tally = Tally()
    texts = list(source.texts(tally, allow_dropped))
    tally.check(source.name, allow_dropped)
    return texts, tally


def write(path, texts=TEXTS):
    kind = files.format_of(path)
    plain = path.with_name(path.name.removesuffix(".gz"))
    if kind == "txt":
        plain.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    elif kind == "json":
        plain.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1))
    elif kind == "jsonl":
        plain.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    elif kind == "csv":
        with plain.open("w", newline="", encoding="utf-8") as handle:
            rows = csv.writer(handle)
            rows.writerows([("id", "text"), *enumerate(texts)])
    else:
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, plain, row_group_size=2)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("ending", [kind + packed for kind in files.FORMATS for packed in ("", ".gz")])
def test_every_format_reads_the_same(tmp_path, ending):
    texts, tally = read(write(tmp_path / f"corpus.{ending}"))
    assert texts == TEXTS
    assert (tally.documents, tally.dropped.total()) == (len(TEXTS), 0)


def test_a_text_file_without_separators_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "play.txt").write_text("All:\nSpeak, speak.\n\nFirst Citizen:\n  You\n")
    assert read(tmp_path / "play.txt")[0] == ["All:\nSpeak, speak.\n\nFirst Citizen:\n  You\n"]


POEM = "One line.\nTwo line.\n\n  \n\nRed line.\nBlue line.<|endoftext|>A new one.\n\n"


def test_a_text_file_is_read_by_document_paragraph_or_line(tmp_path):
    (tmp_path / "poem.txt").write_text(POEM)
    (tmp_path / "poem.txt.gz").write_bytes(gzip.compress(POEM.encode()))
    for name in ("poem.txt", "poem.txt.gz"):
        lines = read(tmp_path / name, text_unit="line")[0]
        assert lines == ["One line.", "Two line.", "Red line.", "Blue line.", "A new one."]
        paragraphs = read(tmp_path / name, text_unit="paragraph")[0]
        assert paragraphs == ["One line.\nTwo line.", "Red line.\nBlue line.", "A new one."]
        assert len(read(tmp_path / name)[0]) == 2
    sources = [
        load_text(DataSource(name=str(tmp_path / "poem.txt"), text_unit=unit))
        for unit in ("document", "paragraph", "line")
    ]
    assert len({str(source.identity) for source in sources}) == 3  # of the caches
    write(tmp_path / "rows.csv")
    with pytest.raises(UserError, match="rows.csv: text_unit = line is for text files; these have rows"):
        read(tmp_path / "rows.csv", text_unit="line")
    with pytest.raises(UserError, match="demo/stories: text_unit = line is for local text files"):
        read("demo/stories", text_unit="line")


def test_a_very_long_text_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_DOCUMENT", 50)
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "long.txt").write_text(text)
    texts, _ = read(tmp_path / "long.txt")
    assert len(texts) > 5
    assert "".join(texts) == text
    assert all(part.endswith("\n") for part in texts)


def test_json_lines_may_be_called_json_and_have_a_byte_order_mark(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.json").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS))
    assert read(tmp_path / "a.json")[0] == TEXTS
    assert read(tmp_path / "b.jsonl")[0] == TEXTS


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8),
    size=st.integers(1, 60),
)
def test_the_shards_of_a_file_are_the_file(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("shards") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    end = max(path.stat().st_size, 1)
    shards = [files.Shard(str(path), "jsonl", start, start + size) for start in range(0, end, size)]
    rows = [row["text"] for shard in shards for row in files.read_shard(shard)]
    assert rows == texts


def test_row_groups_of_parquet_are_shards(tmp_path):
    shards = files.shards_of([write(tmp_path / "corpus.parquet")])
    assert [shard.start for shard in shards] == [0, 1, 2]
    rows = [[row["text"] for row in files.read_shard(shard, "text")] for shard in shards]
    assert rows == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]


def test_a_folder_is_its_files_by_split(tmp_path):
    write(tmp_path / "train-00.jsonl", ["a"])
    write(tmp_path / "train-01.csv", ["b"])
    (tmp_path / "validation").mkdir()
    write(tmp_path / "validation" / "part.txt", ["c"])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert read(tmp_path)[0] == ["a", "b"]
    assert read(tmp_path, split="validation")[0] == ["c"]
    assert load_text(DataSource(name=str(tmp_path))).splits == ("train", "validation")
    with pytest.raises(UserError, match=r"no split 'test' here \(found train, validation\)"):
        read(tmp_path, split="test")


def test_the_text_column_is_recognized_or_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"title": "T", "content": "C", "n": 1}\n')
    assert read(path)[0] == ["C"]
    assert read(path, column="title")[0] == ["T"]
    path.write_text('{"n": 1, "words": "only text"}\n')
    assert read(path)[0] == ["only text"]
    path.write_text('{"question": "Q", "answer": "A"}\n')
    with pytest.raises(UserError, match=r"several could be \(question, answer\).*columns found: question, answer"):
        read(path)
    with pytest.raises(UserError, match="no column 'anser'; did you mean 'answer'"):
        read(path, column="anser")
    path.write_text('{"n": 1}\n')
    with pytest.raises(UserError, match="none holds text"):
        read(path)


def test_what_is_dropped_is_counted_by_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    odd = [{"text": ""}, {"text": " \n"}, {"text": None}, {"text": 3}, {"other": "x"}, {"text": "\ud800"}, ["list"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "good"}, *odd]))
    texts, tally = read(path, allow_dropped=1)
    assert texts == ["good"]
    assert tally.dropped == {"empty": 3, "not text": 2, "without 'text'": 1, "not valid Unicode": 1}
    with pytest.raises(UserError, match="7 of 8 rows cannot be used .3 empty, 2 not text.*allow_dropped = 0.05"):
        read(path)


def test_many_bad_rows_stop_the_reading_early(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + '{"text": ""}\n' * 5000)
    source, tally = load_text(DataSource(name=str(path))), Tally()
    with pytest.raises(UserError, match="of 1,000 rows cannot be used"):
        list(source.texts(tally, 0.05))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.txt", b"", "the file is empty"),
        ("corpus.txt", b" \n\n ", "no usable text in 1 rows .1 empty"),
        ("corpus.jsonl", b"\n\n", "it has no rows"),
        ("corpus.txt", bytes(range(256)) * 40, "this is a binary file"),
        ("corpus.txt", "Text".encode("utf-16"), "this text is UTF-16; expected UTF-8"),
        ("corpus.txt", b"caf\xe9", r"not UTF-8 text \(byte 0xe9"),
        ("corpus.jsonl", b'{"text": "a"}\n{"text": \n', r"corpus.jsonl:2: this line is not valid JSON"),
        ("corpus.json", b'[{"text": "a"},\n\n oops]', r"corpus.json:3: this is not valid JSON"),
        ("corpus.json", b'"text"', "expected a list of objects, or one object a line; found str"),
        ("corpus.csv", b"", "the file is empty"),
        ("corpus.parquet", b"PAR1 not really", "cannot be read as parquet: "),
        ("corpus.txt.gz", b"plain text", "cannot be read as txt: Not a gzipped file"),
        (
            "corpus.txt.gz",
            gzip.compress(b"text " * 1000, mtime=0)[:-20],
            "cannot be read as txt: Compressed file ended",
        ),
        ("corpus.docx", b"text", "expected a file that ends in .txt, .json"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_the_line_of_an_error_is_right_behind_the_first_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 100)
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "good"}\n' * 40 + "bad\n" + '{"text": "good"}\n' * 40)
    with pytest.raises(UserError, match="corpus.jsonl:41:"):
        read(path)


def test_missing_files_are_answered_with_the_nearest(tmp_path):
    write(tmp_path / "shakespeare.txt")
    with pytest.raises(UserError, match="there is no such file or folder; did you mean 'shakespeare.txt'"):
        read(tmp_path / "shakespear.txt")
    with pytest.raises(UserError, match="there is no such file or folder$"):
        read(tmp_path / "no" / "such" / "folder" / "rows.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file in this folder ends in .*found nothing"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="a local path has no subsets"):
        read(tmp_path / "shakespeare.txt", subset="en")


def test_an_unreachable_hub_is_said_to_be_so():
    with pytest.raises(UserError, match="nobody/nothing: .*hub cannot be reached.*demo/stories"):
        read("nobody/nothing")


def test_rows_resume_where_they_stood(tmp_path):
    path = write(tmp_path / "corpus.parquet")
    source = load_text(DataSource(name=str(path)))
    rows = source.rows
    first = [row["text"] for row in itertools.islice(rows, 3)]
    state = json.loads(json.dumps(rows.state_dict()))
    rows.load_state_dict(state)
    assert first + [row["text"] for row in rows] == TEXTS


def test_the_answers_beside_conversations_are_not_the_text(tmp_path):
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "answer": "4"}
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="these are conversations, for llmlab sft"):
        load_text(DataSource(name=str(path)))
    assert list(load_text(DataSource(name=str(path), column="answer")).texts(Tally())) == ["4"]
