"""Packing: rows are the documents and nothing else, caches are never stale, and held-out documents stay held out."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from llmlab.data import cache
from llmlab.data import workers as workers_module
from llmlab.data.sources import load_text
from llmlab.data.text import store as store_module
from llmlab.data.text.encoder import TextEncoder
from llmlab.data.text.packing import Mixture, PackedRows, as_example, hold_out
from llmlab.data.text.store import open_store
from llmlab.settings.data import DataSettings, DataSource
from llmlab.settings.errors import UserError

STORIES = DataSource(name="demo/stories", subset="100kB")


@pytest.fixture
def encoder(tokenizer):
    return TextEncoder.of(tokenizer)


@pytest.fixture
def open_(tmp_path, encoder):
    def open_(source, encoder=encoder, tokens=None, **options):
        settings = DataSettings(**{"cache_dir": str(tmp_path / "cache"), "num_proc": 1, **options})
        return open_store(load_text(source), encoder, settings, tokens)

    return open_


def lines(path, texts):
    path.write_text("".join(f"{text}<|endoftext|>" for text in texts))
    return DataSource(name=str(path))


def test_rows_are_the_documents_each_ended_by_eos(open_, tokenizer):
    store = open_(STORIES)
    texts = [row["text"] for row in load_text(STORIES).rows]
    expected = [number for text in texts for number in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = PackedRows("stories", store, 128)
    assert len(rows) == len(expected) // 128
    assert np.concatenate([rows.row(i) for i in range(len(rows))]).tolist() == expected[: len(rows) * 128]
    example = as_example(rows.row(3))
    assert example["input_ids"].tolist() == expected[3 * 128 : 4 * 128]
    assert torch.equal(example["input_ids"], example["labels"])
    assert example["input_ids"].dtype == torch.int64
    assert store.documents["tokens"].sum() == len(expected) == len(store)
    with pytest.raises(IndexError):
        rows.row(len(rows))


def test_epochs_after_the_first_begin_their_rows_at_another_token(open_):
    store = open_(STORIES)
    spans = np.array([[0, 1000], [1500, 2600]])
    rows = PackedRows("stories", store, 64, spans)
    tokens = np.concatenate([store.tokens[:1000], store.tokens[1500:2600]])
    for offset in (0, 1, 63):
        shifted = np.concatenate([rows.row(i, offset) for i in range(len(rows))])
        assert shifted.tolist() == np.roll(tokens, -offset)[: len(rows) * 64].tolist()
    mixture = Mixture([rows], [1.0], seed=0, length=3 * len(rows))
    epochs = [[tuple(mixture[i]["input_ids"].tolist()) for i in range(n, n + len(rows))] for n in (0, 32, 64)]
    assert len(rows) == 32 and set(epochs[0]) == {tuple(rows.row(i).tolist()) for i in range(32)}
    assert all(len(set(epoch)) == 32 for epoch in epochs) and len(set().union(*epochs)) == 96
    for epoch in epochs[1:]:
        counts = np.bincount(np.concatenate(epoch), minlength=1024) - np.bincount(tokens, minlength=1024)
        assert counts.max() <= 0 and counts.sum() == len(rows) * 64 - len(tokens)  # each token is seen at most once


def test_several_processes_write_what_one_writes(open_, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(workers_module, "SERIAL_BATCHES", 2)
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
    other_eos = TextEncoder(encoder.identity[0], encoder.eos_token_id + 1)
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
    from llmlab.data.tokenizer import learn_bpe

    other = TextEncoder.of(learn_bpe([STORIES], 300, tmp_path / "t", show_progress=False))
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
    killed = tmp_path / "cache" / "corpora" / left[0].removesuffix(".lock")
    killed.mkdir()
    (killed / "tokens.bin").write_bytes(b"half a corpus")
    again = open_(STORIES)
    assert again.fresh
    assert again.tokens.tolist() == open_(STORIES, cache_dir=str(tmp_path / "other")).tokens.tolist()


def test_a_cache_that_cannot_be_written_is_named(open_, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="demo/stories: cannot be cached in .*file/corpora: Not a directory"):
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
    rows = PackedRows("train", store, 64, held.train)
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
    assert held.train.tolist() == [[0, cut], [total, total]]
    assert held.validation.tolist() == [[cut, total]]
    assert held.rule == f"the last {total - cut:,} tokens"
    with pytest.raises(
        UserError, match=f"its {total:,} tokens are too few .*max_seq_len = {total}; expected at least"
    ):
        hold_out("book", store, 0.1, seed=0, length=total)


def test_workers_get_the_path_not_the_tokens(open_):
    store = open_(STORIES)
    rows = PackedRows("stories", store, 64)
    sent = pickle.dumps(rows)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).row(5), rows.row(5))


DAMAGES = {
    "tokens.bin cut": lambda folder: os.truncate(folder / "tokens.bin", 1000),
    "tokens.bin altered": lambda folder: alter(folder / "tokens.bin", 5001),
    "documents.bin altered": lambda folder: alter(folder / "documents.bin", 7),
    "documents.bin gone": lambda folder: (folder / "documents.bin").unlink(),
    "meta.json cut": lambda folder: os.truncate(folder / "meta.json", 20),
    "meta.json of another shape": lambda folder: (folder / "meta.json").write_text('{"documents": [], "files": 3}'),
    "meta.json gone": lambda folder: (folder / "meta.json").unlink(),
}


def alter(path, place):
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_made_anew_with_a_notice(open_, tmp_path, capsys, damage):
    store = open_(STORIES)
    expected = store.tokens.tolist()
    del store
    damage(next(path.parent for path in tmp_path.rglob("tokens.bin")))
    capsys.readouterr()
    again = open_(STORIES)
    assert again.fresh
    assert again.tokens.tolist() == expected
    assert "demo/stories: its cache is damaged and will be rebuilt (" in capsys.readouterr().err
    assert not open_(STORIES).fresh
    assert "damaged" not in capsys.readouterr().err


def test_of_a_large_cache_no_altered_block_is_ever_read(open_, monkeypatch):
    """What is too large to verify on opening is verified where it is read."""
    monkeypatch.setattr(cache, "BLOCK", 4096)
    monkeypatch.setattr(store_module, "VERIFIED_AT_ONCE", 0)
    store = open_(STORIES)
    expected = store.tokens.tolist()
    alter(store.folder / "tokens.bin", 3 * 4096 + 17)
    again = open_(STORIES)
    assert not again.fresh
    inside = 4096 // store.dtype.itemsize  # tokens of a block
    assert again.read(0, 3 * inside).tolist() == expected[: 3 * inside]
    assert again.read(4 * inside, 5 * inside).tolist() == expected[4 * inside : 5 * inside]
    with pytest.raises(UserError, match="tokens.bin: byte 12,288 to 16,384 are not what was written; run it again"):
        PackedRows("stories", again, 64).row(3 * inside // 64)
    mended = open_(STORIES)
    assert mended.fresh
    assert mended.read(0, len(expected)).tolist() == expected


def test_a_corpus_is_extended_to_what_it_would_have_been(open_, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(store_module, "SMALL", 0)
    (tmp_path / "files").mkdir()
    for each in range(3):
        lines(
            tmp_path / "files" / f"part-{each}.txt", [f"Story {each}{i} of a fox." * (i % 5 + 1) for i in range(120)]
        )
    source = DataSource(name=str(tmp_path / "files"))
    whole = open_(source, cache_dir=str(tmp_path / "other"))
    assert whole.whole
    first = open_(source, tokens=500)
    assert not first.whole
    assert 500 <= len(first.tokens) < 0.5 * len(whole.tokens)
    assert first.tokens.tolist() == whole.tokens[: len(first.tokens)].tolist()
    assert open_(source, tokens=400).meta == first.meta  # it has enough
    read = tokenizer.decode(first.tokens)
    assert all(f"Story {each}0 of" in read for each in range(3))  # of every file from the start

    with monkeypatch.context() as patch:  # an extension is killed while it writes
        patch.setattr(store_module, "write_atomically", lambda *args: raise_(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_(source, tokens=len(first.tokens) + 1)
    assert (first.folder / "tokens.bin").stat().st_size > first.sums["tokens.bin"].size
    kept = open_(source, tokens=400)
    assert not kept.fresh
    assert kept.tokens.tolist() == first.tokens.tolist()

    more = open_(source, tokens=len(first.tokens) + 1)
    assert more.fresh and not more.whole
    assert more.tokens.tolist() == whole.tokens[: len(more.tokens)].tolist()
    end = open_(source)
    assert end.whole
    for name in ("tokens.bin", "documents.bin"):
        assert (end.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert end.tally == whole.tally
    assert open_(source, tokens=10**9).fresh is False  # there is no more


def test_what_does_not_fit_the_disk_is_refused(open_, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**5, 10**5, 10**4))
    with pytest.raises(UserError, match=r"demo/stories: its tokens take about 0.0 GB in .*streaming=true"):
        open_(STORIES)
    assert open_(STORIES, tokens=500).fresh


def raise_(error):
    raise error
