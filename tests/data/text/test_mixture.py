"""Mixtures: proportions hold on counts, every row has its turn, and the order does not depend on the length."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.text.packing import Mixture, Schedule

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)


class Numbered:
    """Rows that say which they are."""

    def __init__(self, name, count, length=4):
        self.name, self.count, self.length = name, count, length

    def __len__(self):
        return self.count

    def row(self, index, offset=0):
        return np.full(self.length, index)


@given(WEIGHTS, st.integers(0, 5), st.integers(0, 3000))
def test_every_source_gets_its_share_at_every_point(weights, seed, rows):
    schedule = Schedule(weights, seed)
    counts = schedule.counts(rows)
    assert counts.sum() == rows
    exact = rows * np.array(weights) / sum(weights)
    assert np.abs(counts - exact).max() <= schedule.block
    whole = rows // schedule.block * schedule.block
    off = np.abs(schedule.counts(whole) - whole * np.array(weights) / sum(weights))
    assert off.max() < len(weights)


@given(WEIGHTS, st.integers(0, 5), st.integers(0, 2000))
def test_rows_of_a_source_are_counted_up_without_gaps(weights, seed, start):
    schedule = Schedule(weights, seed)
    counts = schedule.counts(start)
    for row in range(start, start + 200):
        source, number = schedule.locate(row)
        assert number == counts[source]
        counts[source] += 1
    assert np.array_equal(counts, schedule.counts(start + 200))


def test_two_to_one_is_two_thirds_and_one_third(sample_id):
    counts = Schedule([2.0, 1.0], seed=42).counts(64 * 300)
    assert counts.tolist() == [12_800, 6_400]
    assert Schedule([3.0, 1.0], seed=42).counts(1024).tolist() == [768, 256]
    mixture = Mixture([Numbered("a", 50), Numbered("b", 50)], [2.0, 1.0], seed=42, length=1920)
    tokens = Counter()
    for index in range(len(mixture)):
        tokens[sample_id(mixture, index)[0]] += mixture[index]["input_ids"].numel()
    assert tokens == {"a": 1280 * 4, "b": 640 * 4}


def test_every_pass_over_a_source_is_whole_and_shuffled_anew():
    mixture = Mixture([Numbered("a", 100)], [1.0], seed=0, length=300)
    passes = [[mixture[i]["input_ids"][0].item() for i in range(start, start + 100)] for start in (0, 100, 200)]
    assert all(sorted(order) == list(range(100)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    assert mixture.epochs() == [3.0]


def test_an_epoch_shows_every_row_of_every_source(sample_id):
    mixture = Mixture([Numbered("large", 900), Numbered("small", 70)], [1.0, 2.0], seed=7)
    ids = Counter(sample_id(mixture, i) for i in range(len(mixture)))
    assert len(ids) == 970
    assert len(mixture) % mixture.schedule.block == 0
    large, small = mixture.epochs()
    assert 1.0 <= large < 1.1
    assert small == pytest.approx(2 * 900 / 70, rel=0.1)
    repeats = [count for name, count in ids.items() if name.startswith("small")]
    assert max(repeats) - min(repeats) <= 1
    assert len(Mixture([Numbered("only", 17)], [1.0], seed=7)) == 17


def test_a_longer_run_begins_like_a_shorter_one(sample_id):
    def ids(length, start=0):
        mixture = Mixture([Numbered("a", 30), Numbered("b", 200)], [1.0, 1.5], seed=3, length=length)
        return [sample_id(mixture, i) for i in range(start, length)]

    assert ids(1000)[:400] == ids(400)
    assert ids(1000, start=700) == ids(1000)[700:]  # without having been at what is before


def test_seeds_differ_and_mixtures_travel(sample_id):
    def ids(mixture):
        return [sample_id(mixture, i) for i in range(len(mixture))]

    sources = [Numbered("a", 30), Numbered("b", 30)]
    first = Mixture(sources, [1, 1], seed=1)
    assert ids(first) == ids(Mixture(sources, [1, 1], seed=1)) != ids(Mixture(sources, [1, 1], seed=2))
    assert ids(pickle.loads(pickle.dumps(first))) == ids(first)
    with pytest.raises(IndexError):
        first[len(first)]
