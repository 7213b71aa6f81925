"""Streams: exact resume from any row, however often, ahead of it or behind the end of the source; no row twice."""

import itertools
import json
from collections import Counter

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from llmlab.data.sources import Tally, TextSource, load_text
from llmlab.data.splits import is_held_out
from llmlab.data.text import packing as streaming
from llmlab.data.text.encoder import TextEncoder
from llmlab.data.text.packing import Reader, RowStream
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

LENGTH = 32


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_CHARACTERS", 4000)


@pytest.fixture
def source(tmp_path):
    """Documents in three files, each of which says its number."""
    for shard in range(3):
        rows = [{"text": f"The {shard}{i:02d} th story is about {'a fox ' * (i % 7)}."} for i in range(80)]
        (tmp_path / f"part-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_text(DataSource(name=str(tmp_path)))


@pytest.fixture
def arrow_source():
    """The kind of iterable that a streamed hub dataset is: Arrow tables in several shards."""
    texts = [f"Row {i:03d} of the table has {'many ' * (i % 9)}words." for i in range(200)]
    rows = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)
    return TextSource(name="table", rows=rows, column="text", identity={})


@pytest.fixture
def make(tokenizer, source, arrow_source):
    def make(sources=None, weights=None, **options):
        encoder = TextEncoder.of(tokenizer)
        sources = sources or [source, arrow_source]
        options = {"length": LENGTH, "seed": 5, **options}
        readers = [Reader(each, encoder, tally=Tally(), **options) for each in sources]
        return RowStream(readers, weights or [2.0, 1.0][: len(readers)], seed=5)

    return make


def take(stream, count):
    return [row["input_ids"].tolist() for row in itertools.islice(stream, count)]


def texts_of(rows, tokenizer):
    return tokenizer.decode([number for row in rows for number in row])


def test_rows_are_what_a_causal_model_trains_on(make):
    row = next(iter(make()))
    assert row["input_ids"].shape == (LENGTH,)
    assert row["input_ids"].dtype == torch.int64
    assert torch.equal(row["input_ids"], row["labels"])


def test_a_stream_is_the_same_each_time_and_another_with_another_seed(make):
    assert take(make(), 300) == take(make(), 300)
    stream = make()
    assert take(stream, 20) == take(stream, 20)
    assert take(make(seed=6), 300) != take(make(), 300)


@pytest.mark.parametrize("stop", [0, 1, 7, 100, 299, 300, 761])
def test_resume_goes_on_with_the_next_row(make, stop):
    whole = take(make(), 1000)  # several passes over either source
    stream = make()
    take(stream, stop)
    state = json.loads(json.dumps(stream.state_at(stream.rows)))
    resumed = make()
    resumed.load_state_dict(state)
    assert take(resumed, 1000 - stop) == whole[stop:]


def test_resume_twice_and_across_the_end_of_the_source(make):
    whole = take(make(), 1500)
    stream, rows = make(), []
    for part in (700, 333, 467):
        rows += take(stream, part)
        assert stream.rows == len(rows)
        state = json.loads(json.dumps(stream.state_at(stream.rows)))
        stream = make()
        stream.load_state_dict(state)
    assert rows == whole


@pytest.mark.parametrize("ahead", [1, 16, 90])
def test_the_position_is_that_of_training_not_of_what_was_fetched(make, ahead):
    whole = take(make(), 600)
    stream = make()
    iterator = iter(stream)
    for _ in range(200 + ahead):
        next(iterator)
    state = stream.state_at(200)
    iterator.close()
    resumed = make()
    resumed.load_state_dict(state)
    assert take(resumed, 400) == whole[200:]
    assert resumed.state_at(300)["rows"] == 300  # counted from the beginning of training


def test_a_data_loader_that_fetches_ahead(make):
    whole = take(make(), 160)
    stream = make()
    batches = iter(DataLoader(stream, batch_size=8))
    seen = [row.tolist() for _ in range(10) for row in next(batches)["input_ids"]]
    next(batches)
    resumed = make()
    resumed.load_state_dict(stream.state_at(80))
    loader = iter(DataLoader(resumed, batch_size=8))
    seen += [row.tolist() for _ in range(10) for row in next(loader)["input_ids"]]
    assert seen == whole


def test_positions_that_are_not_known_are_refused(make, monkeypatch):
    monkeypatch.setattr(streaming, "REMEMBERED", 2)
    stream = make()
    take(stream, 900)
    with pytest.raises(ValueError, match="901 rows were not yielded yet; 900 were"):
        stream.state_at(901)
    with pytest.raises(ValueError, match="after 10 rows is forgotten"):
        stream.state_at(10)
    with pytest.raises(UserError, match="the position to resume from is of 2 sources; there are 1 now"):
        make([stream.readers[0].source]).load_state_dict(stream.state_at(stream.rows))


def test_data_loader_workers_are_refused(make, monkeypatch):
    monkeypatch.setattr(streaming, "get_worker_info", object)  # as in a worker, without forking one
    with pytest.raises(UserError, match="dataloader_num_workers: expected 0 with streaming"):
        next(iter(make()))


def test_every_pass_has_every_document_once_in_another_order(make, source, tokenizer):
    documents = [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in source.rows]
    length = sum(map(len, documents))
    rows = take(make([source]), 2 * length // LENGTH)
    twice = Counter(number for ids in documents for number in [*ids, *ids])
    seen = Counter(number for row in rows for number in row)
    assert seen <= twice
    assert (twice - seen).total() == 2 * length % LENGTH  # the row that the third pass will fill
    half = len(rows) // 2
    assert rows[:half] != rows[half : 2 * half]


def test_the_next_pass_takes_the_shards_in_another_order(make, source):
    orders = []
    for epoch in range(4):
        reader = make([source]).readers[0]
        texts, ended = reader._take(epoch, None)
        while not ended:
            more, ended = reader._take(epoch, None)
            texts += more
        orders.append(tuple(texts))
    assert len({tuple(sorted(texts)) for texts in orders}) == 1
    assert len(set(orders)) > 1
    stream = make([source])
    take(stream, 900)
    assert stream.state_at(stream.rows)["sources"][0]["epoch"] >= 2


def test_proportions_hold_on_counts(make, tokenizer, sample_id):
    rows = take(make(weights=[2.0, 1.0]), 640)
    from_table = sum(
        "of the table" in texts_of([row], tokenizer) or "many" in texts_of([row], tokenizer) for row in rows
    )
    assert from_table == pytest.approx(640 / 3, abs=15)
    stream = make(weights=[3.0, 1.0])
    names = [sample_id(stream, i) for i in range(640)]
    assert sum(name.startswith("table") for name in names) == 160
    assert len(set(names)) == 640


def documents_of_a_pass(stream):
    """Returns the documents that a stream of one source reads in its first pass."""
    reader, documents, ended = stream.readers[0], [], False
    while not ended:
        more, ended = reader._take(0, None)
        documents += more
    return documents


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_the_documents(make, arrow_source, world_size):
    shares = [
        documents_of_a_pass(make([arrow_source], rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert min(map(len, shares)) > 0.7 * 200 / world_size
    assert sorted(itertools.chain(*shares)) == sorted(row["text"] for row in arrow_source.rows)


def test_each_process_resumes_its_own_share(make, sample_id):
    for rank in range(2):
        whole = take(make(rank=rank, world_size=2), 300)
        stream = make(rank=rank, world_size=2)
        take(stream, 130)
        resumed = make(rank=rank, world_size=2)
        resumed.load_state_dict(stream.state_at(stream.rows))
        assert take(resumed, 170) == whole[130:]
        assert sample_id(stream, 0).partition(":")[0].endswith(f"@{rank}")


def test_held_out_documents_are_never_trained_on(make, arrow_source):
    texts = [row["text"] for row in arrow_source.rows]
    held = {text for text in texts if is_held_out(text, 0.2, 5)}
    assert len(held) == pytest.approx(40, abs=20)
    assert sorted(documents_of_a_pass(make([arrow_source], held_out=0.2))) == sorted(set(texts) - held)


def test_dropped_rows_are_counted_and_stop_the_stream(make, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "A good row of text."}\n{"text": ""}\n')
    source = load_text(DataSource(name=str(path)))
    with pytest.raises(UserError, match="1 of 2 rows cannot be used .1 empty."):
        take(make([source]), 5)
    stream = make([source], allow_dropped=0.5)
    take(stream, 5)
    tally = stream.readers[0].tally
    assert tally.dropped["empty"] == tally.documents > 5


def test_a_process_without_documents_is_told_so(make, arrow_source, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("The only document.")
    source = load_text(DataSource(name=str(path)))
    with pytest.raises(UserError, match="one.txt@1: no document in it is left for training"):
        take(make([source], rank=1, world_size=2), 1)
    with pytest.raises(UserError, match="table: no document in it is left for training"):
        take(make([arrow_source], held_out=1.0), 1)
