"""Packed rows of exactly one sequence length: map-style over a tokenized corpus, with its held-out split and mixtures
of sources; or streamed, tokenized and packed as they are read, shuffled in blocks, resumed exactly. Rows are views:
documents follow each other, separated by eos, and are cut wherever a row is full; only the last partial row is left
over. Cross-document attention masks are made in the model. A stream's block of rows is shuffled and its unfinished row
is carried into the next, so a position is small: the source's state before the block, the carried tokens, and the rows
consumed."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from llmlab.data.sources import Tally, TextSource, take_texts
from llmlab.data.splits import is_held_out, seeded_keys
from llmlab.data.text.encoder import TextEncoder
from llmlab.data.text.store import TokenStore
from llmlab.settings.errors import UserError

WINDOW = 2**24  # tokens that are shuffled together and decide what is held out, so that longer runs begin the same
SOME = 2**16  # documents that are looked at together
BLOCK_CHARACTERS = 2_000_000  # of text shuffled together
REMEMBERED = 32  # blocks of each source whose beginning can still be resumed from
BLOCK = 64  # rows within which a mixture's proportions hold, but for rounding: short runs get what was asked for too


class Split(NamedTuple):
    """Training and held-out tokens as spans of begin and end, (spans, 2), and in words how they were chosen."""

    train: np.ndarray
    validation: np.ndarray
    rule: str


class PackedRows:
    """Rows of `length` tokens over the spans (spans, 2) of a store, None being all of it; at most `limit` rows."""

    def __init__(
        self, name: str, store: TokenStore, length: int, spans: np.ndarray | None = None, limit: int | None = None
    ):
        self.name, self.store, self.length = name, store, length
        self.spans = np.array([[0, len(store)]]) if spans is None else spans
        self.starts = np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0])])  # before each span
        self.tokens = int(self.starts[-1])
        self.rows = self.tokens // length if limit is None else min(self.tokens // length, limit)
        if self.tokens < length:
            problem = f"its {self.tokens:,} tokens do not fill one row of max_seq_len = {length}"
            raise UserError(f"{name}: {problem}; use a shorter max_seq_len or more text")

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int, offset: int = 0) -> np.ndarray:
        """Returns the ids of a row, (length,), if the first begins at an offset below `length`; past the end comes the
        beginning."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self.length + offset
        rest = begin + self.length - self.tokens
        pieces = self._read(begin, min(begin + self.length, self.tokens)) + (self._read(0, rest) if rest > 0 else [])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read(self, position: int, end: int) -> list[np.ndarray]:
        """Returns the tokens from one position to another, a piece for each span."""
        span = int(np.searchsorted(self.starts, position, side="right")) - 1
        pieces = []
        while position < end:
            stop = min(end, int(self.starts[span + 1]))
            shift = int(self.spans[span, 0] - self.starts[span])
            pieces.append(self.store.read(position + shift, stop + shift))
            position = stop
            span += 1
        return pieces


def as_example(row: np.ndarray) -> dict[str, torch.Tensor]:
    """Returns what a causal model trains on: `input_ids` and `labels`, (length,) int64; the model shifts them."""
    ids = torch.from_numpy(row.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def window_rows(length: int) -> int:
    """Returns the rows of this length that are shuffled together."""
    return max(1, WINDOW // length)


def hold_out(name: str, store: TokenStore, fraction: float, *, seed: int, length: int) -> Split:
    """Splits off a fraction, at least one row, by a seeded hash of documents; of too large ones (a book) the end."""
    if not fraction:
        return Split(np.array([[0, len(store)]]), np.empty((0, 2), int), "nothing")
    hashes, ends = store.documents["hash"], np.cumsum(store.documents["tokens"])
    first = int(np.searchsorted(ends, WINDOW)) + 1  # documents whose hash is used
    lengths = store.documents["tokens"][:first]
    total = int(lengths.sum())
    budget = max(math.ceil(fraction * total), length)
    if total - budget < length:
        problem = f"its {total:,} tokens are too few to train on and validate with rows of max_seq_len = {length}"
        raise UserError(f"{name}: {problem}; expected at least {2 * length:,}; use a shorter max_seq_len or more text")
    keys = seeded_keys(hashes[:first], seed)
    order = np.argsort(keys, kind="stable")
    last = keys[order[np.searchsorted(np.cumsum(lengths[order]), budget)]]
    validated = int(lengths[keys <= last].sum())  # duplicates go to the same side
    if validated > 2 * budget or total - validated < length:
        cut, end = total - budget, len(store)
        return Split(np.array([[0, cut], [total, end]]), np.array([[cut, total]]), f"the last {budget:,} tokens")
    parts = (hashes[begin : begin + SOME] for begin in range(0, len(hashes), SOME))  # their keys take memory
    validates = np.concatenate([seeded_keys(part, seed) <= last for part in parts])
    return Split(_spans(~validates, ends), _spans(validates, ends), f"{validates.sum():,} documents by hash")


def _spans(chosen: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the token spans of runs of chosen documents, (runs, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return np.where(edges > 0, ends[edges - 1], 0).reshape(-1, 2)


class Schedule:
    """The source of every row of a mixture, and its index there: shuffled blocks, each in the weights' proportion. It
    depends on seed and weights alone, not on the length: row i stays row i when a run is extended."""

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
    """Map-style rows of several packed sources, one epoch by default. Each epoch shuffles a source anew, window by
    window, and after the first its rows begin at another token: a small corpus is overfitted later."""

    def __init__(
        self, sources: Sequence[PackedRows], weights: Sequence[float], *, seed: int, length: int | None = None
    ):
        self.sources = list(sources)
        self.schedule = Schedule(weights, seed)
        self.seed = seed
        if length is None:  # whole blocks in which every source is used whole
            shares = zip(self.sources, self.schedule.shares, strict=True)
            block = self.schedule.block if len(self.sources) > 1 else 1
            length = math.ceil(max(math.ceil(len(rows) / share) for rows, share in shares) / block) * block
        self.length = length
        self._order: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # source -> epoch, stretch and its rows' order

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return as_example(self._read(index)[2])

    def origins(self) -> Iterator[tuple[np.ndarray, str, int]]:
        """Yields the tokens of each row, the name of its source and its number there, from 1."""
        for index in range(self.length):
            source, row, ids = self._read(index)
            yield ids, self.sources[source].name.removesuffix("/held-out"), row + 1

    def _read(self, index: int) -> tuple[int, int, np.ndarray]:
        """Returns the source of a row, its index within that source, and its ids, (length,)."""
        source, epoch, row = self.locate(index)
        rows = self.sources[source]
        offset = int(np.random.default_rng([self.seed, source, epoch]).integers(rows.length)) if epoch else 0
        return source, row, rows.row(row, offset)

    def locate(self, index: int) -> tuple[int, int, int]:
        """Returns the source of a row, the epoch over it, and the row's index within it."""
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
        return source, epoch, stretch * size + int(self._order[source][1][offset])

    def epochs(self) -> list[float]:
        """Returns the epochs over each source."""
        counts = self.schedule.counts(self.length)
        return [float(count) / len(rows) for count, rows in zip(counts, self.sources, strict=True)]


State = dict[str, Any]
START: State = {"epoch": 0, "block": 0, "row": 0, "carried": [], "position": None}


class Block(NamedTuple):
    """Shuffled rows (rows, length), and the reader's state before them."""

    before: State
    rows: np.ndarray


@dataclass
class Reader:
    """Reads one source block by block, again and again, without its held-out fraction; each rank its own part."""

    source: TextSource
    encoder: TextEncoder
    tally: Tally
    length: int
    seed: int
    held_out: float = 0.0
    allow_dropped: float = 0.05
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.rows = split_dataset_by_node(self.source.rows, self.rank, self.world_size)
        self.name = self.source.name if self.world_size == 1 else f"{self.source.name}@{self.rank}"
        self.load(START)

    def load(self, state: State) -> None:
        """Goes back to a state."""
        self._state = state
        self._texts: Iterator[str] | None = None

    def read(self) -> Block:
        """Reads the next block, of at least one row."""
        before = self._state
        epoch, position = before["epoch"], before["position"]
        pieces = [np.array(before["carried"], self.encoder.dtype)]
        tokens = len(pieces[0])
        while tokens < self.length:
            texts, ended = self._take(epoch, position)
            if texts:
                pieces.append(self.encoder.encode(texts).tokens)
                tokens += len(pieces[-1])
            elif ended and position is None:
                raise UserError(f"{self.name}: no document in it is left for training")
            position = None if ended else self.rows.state_dict()
            epoch += ended
        ids = np.concatenate(pieces)
        count = tokens // self.length
        rows = ids[: count * self.length].reshape(count, self.length)
        order = np.random.default_rng([self.seed, before["block"]]).permutation(count)
        self._state = {"epoch": epoch, "block": before["block"] + 1, "row": before["row"] + count}
        self._state |= {"carried": ids[count * self.length :].tolist(), "position": position}
        return Block(before, rows[order])

    def _take(self, epoch: int, position: State | None) -> tuple[list[str], bool]:
        """Returns the next documents of a pass over the source, and whether it ended with them."""
        if self._texts is None:
            # what `datasets` calls the epoch seeds the order of the shards
            self.rows.set_epoch(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0] >> 1))
            self.rows.load_state_dict(position or {})
            texts = self.source.texts(self.tally, self.allow_dropped, self.rows)
            if self.held_out:
                texts = (text for text in texts if not is_held_out(text, self.held_out, self.seed))
            self._texts = texts
        batch = take_texts(self._texts, BLOCK_CHARACTERS)
        if sum(map(len, batch)) >= BLOCK_CHARACTERS:
            return batch, False
        self._texts = None
        if self.tally.documents:  # none where this process resumed at the very end
            self.tally.check(self.source.name, self.allow_dropped)
        return batch, True


class RowStream(IterableDataset):
    """Endless rows of several sources, each tokenized one block ahead in a thread of the training process."""

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float], *, seed: int):
        self.readers = list(readers)
        self.schedule = Schedule(weights, seed)
        self.rows = 0  # yielded since the beginning of training
        self.load_state_dict({"rows": 0, "sources": [START] * len(readers)})

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise UserError("dataloader_num_workers: expected 0 with streaming, which reads ahead in a thread")
        self.load_state_dict(self._start)
        row = self.rows
        blocks: list[Block | None] = [None] * len(self.readers)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmlab-stream")
        try:
            next_blocks: list[Future[Block]] = [pool.submit(reader.read) for reader in self.readers]
            while True:
                source, number = self.schedule.locate(row)
                block = blocks[source]
                while block is None or number >= block.before["row"] + len(block.rows):
                    block = blocks[source] = next_blocks[source].result()
                    self._history[source].append(block.before)
                    next_blocks[source] = pool.submit(self.readers[source].read)
                row += 1
                self.rows = row
                yield as_example(block.rows[number - block.before["row"]])
        finally:
            pool.shutdown()  # no reader may be repositioned while one of them reads

    def state_at(self, rows: int) -> State:
        """Returns the position after so many rows of training, as JSON; a data loader may have fetched some more."""
        if rows > self.rows:
            raise ValueError(f"{rows} rows were not yielded yet; {self.rows} were")
        sources = []
        for states, wanted in zip(self._history, self.schedule.counts(rows), strict=True):
            state = next((state for state in reversed(states) if state["row"] <= wanted), None)
            if state is None:
                raise ValueError(f"the position after {rows} rows is forgotten; {self.rows} were yielded since")
            sources.append(state)
        return {"rows": rows, "sources": sources}

    def load_state_dict(self, state: State) -> None:
        """Goes to a position: the next iteration yields exactly the rows that follow it."""
        if len(state["sources"]) != len(self.readers):
            before, now = len(state["sources"]), len(self.readers)
            raise UserError(f"datasets: the position to resume from is of {before} sources; there are {now} now")
        self._start = state
        self.rows = state["rows"]
        self._history = [deque([source], maxlen=REMEMBERED) for source in state["sources"]]
        for reader, source in zip(self.readers, state["sources"], strict=True):
            reader.load(source)
