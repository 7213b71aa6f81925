"""Interleaving: every row once, in proportion from the start, and the next row after any stop."""

import itertools
import json
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from llmlab.data.sources import Interleaved, spread


def rows_of(shards):
    for name, count in shards:
        yield from ({"text": f"{name}{number}"} for number in range(count))


def make_parts():
    """A part that is generated, one of tables in two shards, and one that is empty."""
    table = Dataset.from_dict({"text": [f"b{number}" for number in range(60)]})
    return [
        IterableDataset.from_generator(rows_of, gen_kwargs={"shards": [("a", 15), ("c", 15)]}),
        table.to_iterable_dataset(num_shards=2),
        IterableDataset.from_generator(rows_of, gen_kwargs={"shards": [("d", 0)]}),
    ]


def texts(rows, count=None):
    return [row["text"] for row in itertools.islice(rows, count)]


def test_every_row_comes_once_and_in_proportion():
    every = texts(Interleaved(make_parts(), [30, 60, 1]))
    assert len(every) == len(set(every)) == 90
    for count in range(9, 90, 9):
        found = Counter(name.strip("0123456789") for name in every[:count])
        assert found["a"] + found["c"] == pytest.approx(count / 3, abs=1)
    again = Interleaved(make_parts(), [30, 60, 1])
    assert texts(again) == texts(again) == every


@pytest.mark.parametrize("weights", [None, [30, 60, 1]])
@pytest.mark.parametrize("stop", [0, 1, 2, 17, 60, 89, 90])
def test_reading_goes_on_where_it_stood(weights, stop):
    every = texts(Interleaved(make_parts(), weights))
    first = Interleaved(make_parts(), weights)
    begun = iter(first)
    read = texts(begun, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert read + texts(begun) == every
    second = Interleaved(make_parts(), weights)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert read + texts(second) == every


def test_a_source_is_spread_over_its_shards():
    rows = IterableDataset.from_generator(rows_of, gen_kwargs={"shards": [(name, 10) for name in "abc"]})
    every = texts(spread(rows))
    assert sorted(every) == sorted(texts(rows))
    assert {name[0] for name in every[:3]} == set("abc")
    alone = IterableDataset.from_generator(rows_of, gen_kwargs={"shards": [("a", 10)]})
    assert spread(alone) is alone
