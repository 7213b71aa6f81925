"""Several sources in fixed proportions: a schedule of sources, and a map-style dataset in its order. Shares are shares
of rows, and rows are equally long, so they are shares of tokens. The order depends on seed and weights alone, not on
the length: row i stays row i when a run is extended, and random access reads no other rows."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llmlab.data.text.packing import PackedRows, as_example, window_rows

BLOCK = 64  # rows within which proportions hold, but for rounding: also short runs get the requested proportions too


class Schedule:
    """The source of every row of a mixture, and its index there: shuffled blocks, each in the weights' proportion."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.shares = np.array(weights, float) / np.sum(weights)
        self.seed = seed
        self.block = max(BLOCK, len(weights) ** 2)  # the largest source absorbs the rounding
        self.heaviest = int(np.argmax(self.shares))
        self._last: tuple[int, Any] = (-1, None)  # block whose order was asked for, and its order

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and its index within that source."""
        block, offset = divmod(row, self.block)
        sources, numbers = self._order(block)
        return int(sources[offset]), int(numbers[offset])

    def counts(self, rows: int) -> np.ndarray:
        """Returns how many of the first rows each source gives, (sources,)."""
        block, offset = divmod(rows, self.block)
        return self._before(block) + np.bincount(self._order(block)[0][:offset], minlength=len(self.shares))

    def _before(self, block: int) -> np.ndarray:
        """Rows of each source before a block, (sources,)."""
        counts = np.floor(block * self.block * self.shares + 1e-9).astype(np.int64)
        counts[self.heaviest] += block * self.block - counts.sum()
        return counts

    def _order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row of a block, and its index within that source, (block,) each."""
        if self._last[0] == block:
            return self._last[1]
        before = self._before(block)
        counts = self._before(block + 1) - before
        sources = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng([self.seed, block]).shuffle(sources)
        numbers = np.empty(self.block, np.int64)
        for source, count in enumerate(counts):
            numbers[sources == source] = before[source] + np.arange(count)
        self._last = block, (sources, numbers)
        return sources, numbers


class Mixture(Dataset):
    """Map-style rows of several packed sources, one epoch by default; each is reshuffled, window by window."""

    def __init__(
        self, sources: Sequence[PackedRows], weights: Sequence[float], *, seed: int, length: int | None = None
    ):
        self.sources = list(sources)
        self.schedule = Schedule(weights, seed)
        self.seed = seed
        self.length = self._epoch() if length is None else length
        self._order: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # source -> pass, stretch and its rows' order

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, row = self.locate(index)
        return as_example(self.sources[source].row(row))

    def sample_id(self, index: int) -> str:
        """Returns the stable name of a row, without reading it."""
        source, row = self.locate(index)
        return self.sources[source].sample_id(row)

    def origins(self) -> Iterator[tuple[np.ndarray, str, int]]:
        """Yields the tokens of each row, the name of its source and its number there, from 1."""
        for index in range(self.length):
            source, row = self.locate(index)
            yield self.sources[source].row(row), self.sources[source].name.removesuffix("/held-out"), row + 1

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the source of a row, and its index within that source."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        source, number = self.schedule.locate(index)
        rows = len(self.sources[source])
        epoch, place = divmod(number, rows)
        size = window_rows(self.sources[source].length)
        stretch, offset = divmod(place, size)
        if self._order.get(source, (None,))[0] != (epoch, stretch):
            shuffled = np.random.default_rng([self.seed, source, epoch, stretch])
            order = shuffled.permutation(min(size, rows - stretch * size))
            self._order[source] = (epoch, stretch), order
        return source, stretch * size + int(self._order[source][1][offset])

    def _epoch(self) -> int:
        shares = zip(self.sources, self.schedule.shares, strict=True)
        longest = max(math.ceil(len(rows) / share) for rows, share in shares)
        block = self.schedule.block if len(self.sources) > 1 else 1
        return math.ceil(longest / block) * block

    def epochs(self) -> list[float]:
        """Returns the epochs over each source."""
        counts = self.schedule.counts(self.length)
        return [float(count) / len(rows) for count, rows in zip(counts, self.sources, strict=True)]
