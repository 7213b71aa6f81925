"""The whole way from settings to rows, for map-style and streaming sources."""

import itertools
import json
import math
import re
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmlab.data.text import corpus as corpus_module
from llmlab.data.text import packing
from llmlab.data.text import store as store_module
from llmlab.data.text.corpus import build_corpus
from llmlab.settings.errors import UserError

LENGTH = 64


@pytest.fixture
def play(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("".join(f"First Citizen:\nThe number {i} is what we speak of.\n\n" for i in range(800)))
    return str(path)


@pytest.fixture
def pages(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": f"Page {i} of the web. " * (i % 5 + 1)}) + "\n" for i in range(400)))
    return str(path)


def test_two_sources_two_to_one(make_settings, tokenizer, play, pages, sample_id):
    settings = make_settings({"name": play, "weight": 2}, pages, validation_fraction=0.1)
    corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH, rows_needed=960)
    ids = [sample_id(corpus.train, i) for i in range(len(corpus.train))]
    assert Counter(name.rpartition(":")[0] for name in ids) == {play: 640, pages: 320}
    assert all(corpus.train[i]["input_ids"].shape == (LENGTH,) for i in range(0, 960, 97))
    first, second = corpus.sources
    assert (first.share, second.share) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert first.epochs == 640 / first.rows
    assert first.rows == first.tokens // LENGTH
    assert "documents by hash" in second.held_out
    assert "the last" in first.held_out  # a single play has an end, not documents
    record = json.loads(json.dumps(corpus.record()))
    assert record["sources"][1]["documents"] == 400
    assert "66.7%" in corpus.summary()


def test_validation_rows_are_not_training_rows(make_settings, tokenizer, pages):
    corpus = build_corpus(make_settings(pages, validation_fraction=0.2), tokenizer, max_seq_len=LENGTH)

    def numbers(rows):
        text = tokenizer.decode(torch.cat([rows[i]["input_ids"] for i in range(len(rows))]))
        return {page.split(" of the web")[0] for page in text.split("Page ")[1:] if " of the web" in page}

    train, validation = numbers(corpus.train), numbers(corpus.validation)
    assert len(validation) > 40
    assert len(train) > 200
    crossed = train & validation  # a number that a row's edge cuts can look like a shorter one
    assert len(crossed) <= 3


def test_unigram_entropy_is_that_of_the_validation_rows(make_settings, tokenizer):
    settings = make_settings({"name": "demo/stories", "subset": "300kB"})
    corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH)
    counts = Counter()
    for i in range(len(corpus.validation)):
        counts.update(corpus.validation[i]["input_ids"].tolist())
    total = sum(counts.values())
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert corpus.unigram_entropy == pytest.approx(expected)
    assert 3 < expected < math.log(512)
    assert corpus.sources[0].held_out == "its own validation split"
    assert corpus.record()["validation_rows"] == len(corpus.validation)


def test_the_same_settings_give_the_same_rows(make_settings, tokenizer, play, pages):
    def rows(seed):
        settings = make_settings(play, pages, seed=seed)
        corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH, rows_needed=200)
        return [corpus.train[i]["input_ids"].tolist() for i in range(200)]

    assert rows(1) == rows(1) != rows(2)


def test_named_validation_data_leaves_training_whole(make_settings, tokenizer, play, pages, sample_id):
    settings = make_settings(play, validation_datasets=[pages])
    corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH, validation_rows=5)
    assert len(corpus.validation) == 5
    assert sample_id(corpus.validation, 0).startswith(pages)
    assert corpus.sources[0].held_out == "nothing"
    whole = build_corpus(make_settings(play, validation_fraction=0), tokenizer, max_seq_len=LENGTH)
    assert whole.validation is None
    assert whole.unigram_entropy is None
    assert len(whole.train) == len(corpus.train)


def test_a_folder_brings_its_own_validation(make_settings, tokenizer, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text("Training is done with this sentence. " * 300)
    (folder / "valid.txt").write_text("Validation is done with that sentence. " * 100)
    for streaming in (False, True):
        settings = make_settings(str(folder), streaming=streaming)
        corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH)
        assert "Validation" in tokenizer.decode(corpus.validation[0]["input_ids"])
        assert "Training" in tokenizer.decode(next(iter(corpus.train))["input_ids"])
        assert corpus.sources[0].held_out == "its own validation split"


def test_streaming_gives_the_same_kind_of_corpus(make_settings, tokenizer, pages, sample_id):
    settings = make_settings({"name": "demo/stories", "weight": 3}, pages, streaming=True, validation_fraction=0.2)
    corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH, validation_rows=12)
    rows = list(itertools.islice(corpus.train, 64))
    assert sum("stories" in sample_id(corpus.train, i) for i in range(64)) == 48
    assert all(row["input_ids"].shape == (LENGTH,) for row in rows)
    assert len(corpus.validation) == 12
    assert corpus.sources[1].record()["documents"] > 100  # read so far
    held = tokenizer.decode(torch.cat([corpus.validation[i]["input_ids"] for i in range(12)]))
    trained = tokenizer.decode(torch.cat([row["input_ids"] for row in itertools.islice(corpus.train, 1200)]))
    pages_held = [page.split(" ")[0] for page in held.split("<|endoftext|>Page ")[1:] if " of the web" in page]
    assert pages_held
    assert not any(f"<|endoftext|>Page {page} of the web" in trained for page in pages_held)


def test_what_cannot_be_built_is_answered(make_settings, tokenizer, play, tmp_path):
    with pytest.raises(UserError, match="play.txt: validation_fraction = 0.01 holds out none of its 1 documents"):
        build_corpus(make_settings(play, streaming=True), tokenizer, max_seq_len=LENGTH)
    (tmp_path / "short.txt").write_text("Too short.")
    short = str(tmp_path / "short.txt")
    with pytest.raises(UserError, match="short.txt: its [0-9]+ tokens are too few"):
        build_corpus(make_settings(short), tokenizer, max_seq_len=LENGTH)
    with pytest.raises(UserError, match="do not fill one row of max_seq_len = 64"):
        build_corpus(make_settings(short, validation_fraction=0), tokenizer, max_seq_len=LENGTH)
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no eos token"):
        build_corpus(make_settings(play), without_eos, max_seq_len=LENGTH)


@pytest.fixture
def small_windows(monkeypatch):
    """Sources of more than 4,096 tokens are large ones."""
    for module in (corpus_module, packing):
        monkeypatch.setattr(module, "WINDOW", 4096)
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(store_module, "SMALL", 0)


def rows_of(rows):
    return [rows[i]["input_ids"].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_a_source_is_read_only_as_far_as_the_run_needs(make_settings, tokenizer, web, small_windows, fraction):
    settings = make_settings(web, validation_fraction=fraction)
    corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH, rows_needed=100, validation_rows=3)
    report = corpus.sources[0]
    documents = report.tally.documents
    assert not report.whole
    assert 100 * LENGTH <= report.tokens <= 100 * LENGTH + 4096  # whole windows
    assert documents < 0.3 * 4000
    assert report.count == pytest.approx(4000, rel=0.7)  # known from its bytes: about
    assert f"reads {documents:,} of about {report.count:,} documents" in corpus.summary()
    assert corpus.record()["sources"][0]["whole"] is False
    assert corpus.train.epochs()[0] < 1
    whole = build_corpus(settings, tokenizer, max_seq_len=LENGTH, rows_needed=10**6, validation_rows=3)
    assert whole.sources[0].whole
    assert whole.sources[0].tally.documents == 4000
    assert "reads" not in whole.summary()


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_a_longer_run_sees_the_same_rows_first(
    make_settings, tokenizer, web, tmp_path, small_windows, fraction, sample_id
):
    (tmp_path / "shop.jsonl").write_text(
        "".join(json.dumps({"text": f"Side {i} of it. " * 9}) + "\n" for i in range(90))
    )
    settings = make_settings({"name": web, "weight": 3}, str(tmp_path / "shop.jsonl"), validation_fraction=fraction)

    def build(rows):
        return build_corpus(settings, tokenizer, max_seq_len=LENGTH, rows_needed=rows, validation_rows=3)

    first, second, third = (build(rows) for rows in (90, 400, 4000))
    again = build(90)  # after more was read
    assert [corpus.sources[0].whole for corpus in (first, second, third)] == [False, False, True]
    assert rows_of(first.train) == rows_of(again.train) == rows_of(second.train)[:90]
    assert rows_of(second.train) == rows_of(third.train)[:400]
    ids = [name for name in (sample_id(second.train, row) for row in range(400)) if name.startswith(web)]
    assert len(set(ids)) == len(ids) == pytest.approx(300, abs=2)  # not one window again and again
    if fraction:
        held = [sorted(rows_of(corpus.validation)) for corpus in (first, second, third)]
        assert held[0] == held[1] == held[2] and len(held[0]) == 3
        trained = {number for row in rows_of(third.train) for number in numbers_in(tokenizer.decode(row))}
        validated = {number for row in held[0] for number in numbers_in(tokenizer.decode(row))}
        assert len(validated) > 3
        assert not trained & validated


def test_the_beginning_of_a_source_is_of_all_its_files(make_settings, tokenizer, tmp_path, small_windows):
    folder = tmp_path / "files"
    folder.mkdir()
    for each in "ABC":
        text = "".join(json.dumps({"text": f"Of {each} number {i} speaks the page."}) + "\n" for i in range(2000))
        (folder / f"{each}.jsonl").write_text(text)
    settings = make_settings(str(folder), validation_fraction=0)
    corpus = build_corpus(settings, tokenizer, max_seq_len=LENGTH, rows_needed=30)
    text = tokenizer.decode([number for row in rows_of(corpus.train) for number in row])
    counts = [text.count(f"Of {each} number") for each in "ABC"]
    assert sum(counts) > 80
    assert min(counts) > 0.8 * max(counts)


def numbers_in(text):
    return set(re.findall(r"<\|endoftext\|>Page (\d+) of the web", text))


@pytest.fixture
def web(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": f"Page {i} of the web. " * (i % 5 + 1)}) + "\n" for i in range(4000)))
    return str(path)
