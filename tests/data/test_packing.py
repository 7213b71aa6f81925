"""Packing: rows are the documents and nothing else, caches are never stale, and held-out documents stay held out."""

import os
import pickle

import numpy as np
import pytest
import torch

from llmlab.data import store as store_module
from llmlab.data.encoding import TextEncoder
from llmlab.data.packing import PackedRows, all_of, hold_out
from llmlab.data.sources import load_text
from llmlab.data.store import open_store
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

STORIES = DataSource(name="demo/stories", subset="100kB")


@pytest.fixture
def encoder(tokenizer):
    return TextEncoder.of(tokenizer)


@pytest.fixture
def open_(tmp_path, encoder):
    def open_(source, encoder=encoder, **options):
        options = {"cache_dir": str(tmp_path / "cache"), "num_proc": 1, **options}
        return open_store(load_text(source), encoder, **options)

    return open_


def lines(path, texts):
    path.write_text("".join(f"{text}<|endoftext|>" for text in texts))
    return DataSource(name=str(path))


def test_rows_are_the_documents_each_ended_by_eos(open_, tokenizer):
    store = open_(STORIES)
    texts = [row["text"] for row in load_text(STORIES).rows]
    expected = [number for text in texts for number in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = PackedRows("stories", store, all_of(store), 128)
    assert len(rows) == len(expected) // 128
    assert np.concatenate([rows.row(i) for i in range(len(rows))]).tolist() == expected[: len(rows) * 128]
    example = rows[3]
    assert example["input_ids"].tolist() == expected[3 * 128 : 4 * 128]
    assert torch.equal(example["input_ids"], example["labels"])
    assert example["input_ids"].dtype == torch.int64
    assert rows.sample_id(3) == "stories:3"
    assert store.documents["tokens"].sum() == len(expected) == store.meta["tokens"]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_several_processes_write_what_one_writes(open_, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(store_module, "SERIAL_BATCHES", 2)
    alone = open_(STORIES, cache_dir=str(tmp_path / "alone"))
    together = open_(STORIES, cache_dir=str(tmp_path / "together"), num_proc=2)
    for name in ("tokens.bin", "documents.bin", "meta.json"):
        assert (alone.folder / name).read_bytes() == (together.folder / name).read_bytes()


def test_a_cache_is_used_again_until_anything_changes(open_, tmp_path, encoder):
    path = tmp_path / "rows.txt"
    source = lines(path, ["one", "two"])
    assert open_(source).fresh
    again = open_(source)
    assert not again.fresh
    assert again.tally.documents == 2
    other_eos = TextEncoder(encoder.serialized, encoder.eos_token_id + 1)
    assert open_(source, other_eos).fresh
    before = path.stat()
    lines(path, ["one", "six"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert open_(source).fresh
    csv = tmp_path / "rows.csv"
    csv.write_text("text,other\nfirst,second\n")
    assert open_(DataSource(name=str(csv))).fresh
    assert open_(DataSource(name=str(csv), column="other")).fresh
    assert not open_(DataSource(name=str(csv), column="text")).fresh


def test_another_tokenizer_never_gets_this_ones_cache(open_, tmp_path, encoder):
    from llmlab.data.tokenizer import train_tokenizer

    other = TextEncoder.of(train_tokenizer([STORIES], 300, tmp_path / "t", show_progress=False))
    source = lines(tmp_path / "rows.txt", ["Once upon a time there was a fox."])
    first, second = open_(source), open_(source, other)
    assert first.folder != second.folder
    assert first.tokens.tolist() == encoder.encode(["Once upon a time there was a fox."]).tokens.tolist()
    assert second.tokens.tolist() == other.encode(["Once upon a time there was a fox."]).tokens.tolist()


def test_a_cut_off_writing_leaves_nothing_and_is_repeated(open_, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            open_(STORIES)
    left = [path.name for path in (tmp_path / "cache" / "corpora").iterdir()]
    assert all(name.endswith(".lock") for name in left)
    (tmp_path / "cache" / "corpora" / left[0].replace(".lock", ".writing-killed")).mkdir()
    assert open_(STORIES).fresh
    assert not list((tmp_path / "cache" / "corpora").glob("*.writing-*"))


def test_a_cache_that_cannot_be_written_is_named(open_, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="demo/stories: cannot be tokenized into .*file/corpora: Not a directory"):
        open_(STORIES, cache_dir=str(tmp_path / "file"))


def test_what_was_dropped_is_remembered_and_checked_again(open_, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": ""}\n')
    source = DataSource(name=str(path))
    with pytest.raises(UserError, match="1 of 2 rows cannot be used"):
        open_(source)
    assert open_(source, allow_dropped=0.5).fresh
    again = open_(source, allow_dropped=0.5)
    assert not again.fresh
    assert again.tally.dropped == {"empty": 1}
    with pytest.raises(UserError, match="1 of 2 rows cannot be used"):
        open_(source)


def test_held_out_documents_are_whole_and_apart(open_, tokenizer):
    store = open_(STORIES)
    held = hold_out("stories", store, 0.1, seed=1, length=64)
    total = len(store.tokens)

    def texts(spans):
        ids = np.concatenate([store.tokens[begin:end] for begin, end in spans])
        return tokenizer.decode(ids).split("<|endoftext|>")[:-1]

    train, validation = texts(held.train), texts(held.validation)
    assert sorted(train + validation) == sorted(row["text"] for row in load_text(STORIES).rows)
    share = sum(end - begin for begin, end in held.validation) / total
    longest = store.documents["tokens"].max()
    assert 0.1 <= share <= 0.1 + longest / total
    again = hold_out("stories", store, 0.1, seed=1, length=64)
    assert np.array_equal(again.validation, held.validation)
    assert texts(hold_out("stories", store, 0.1, seed=2, length=64).validation) != validation


def test_rows_cross_the_gaps_of_held_out_documents(open_):
    store = open_(STORIES)
    held = hold_out("stories", store, 0.2, seed=3, length=64)
    assert len(held.train) > 5
    rows = PackedRows("train", store, held.train, 64)
    flat = np.concatenate([store.tokens[begin:end] for begin, end in held.train])
    assert np.array_equal(np.concatenate([rows.row(i) for i in range(len(rows))]), flat[: len(rows) * 64])


def test_equal_documents_stay_on_one_side(open_, tmp_path):
    texts = [f"The story of number {i % 25} is told here." for i in range(200)]
    store = open_(lines(tmp_path / "rows.txt", texts))
    held = hold_out("rows", store, 0.1, seed=0, length=8)
    ends = np.cumsum(store.documents["tokens"])
    inside = [any(begin < end <= stop for begin, stop in held.validation) for end in ends]
    sides = {}
    for text, side in zip(texts, inside, strict=True):
        sides.setdefault(text, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(inside) == 24  # three of the 25 stories are more than a tenth


def test_one_long_document_is_validated_at_its_end(open_, tmp_path):
    (tmp_path / "book.txt").write_text("It was a long book about a short day. " * 200)
    store = open_(DataSource(name=str(tmp_path / "book.txt")))
    total = len(store.tokens)
    held = hold_out("book", store, 0.1, seed=0, length=16)
    cut = total - -(-total // 10)
    assert held.train.tolist() == [[0, cut]]
    assert held.validation.tolist() == [[cut, total]]
    assert held.how == f"the last {total - cut:,} tokens"
    with pytest.raises(
        UserError, match=f"its {total:,} tokens are too few .*max_seq_len = {total}; expected at least"
    ):
        hold_out("book", store, 0.1, seed=0, length=total)


def test_workers_get_the_path_not_the_tokens(open_):
    store = open_(STORIES)
    rows = PackedRows("stories", store, all_of(store), 64)
    sent = pickle.dumps(rows)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).row(5), rows.row(5))
