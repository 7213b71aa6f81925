"""Rows of sources that are read as they come: tokenized and packed on the fly, shuffled in blocks, resumed exactly.

A source is read in blocks of documents; a block's rows are shuffled, and its unfinished row is carried into the next.
So a position is small: where the source stood before the block, what was carried, and how many rows were taken.
Proportions and order across sources are the `Schedule` that map-style data has too.  There is no tokenized copy on
disk, and no random access.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from llmlab.data.hashing import seeded_keys, text_hash
from llmlab.data.mixture import Schedule
from llmlab.data.sources import Tally, TextSource, usable_texts
from llmlab.data.text.encoding import TextEncoder
from llmlab.data.text.packing import as_example
from llmlab.settings.errors import UserError

BLOCK_CHARACTERS = 2_000_000  # of text shuffled together
REMEMBERED = 32  # blocks of each source whose beginning can still be resumed from

State = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A stretch of a source.

    Attributes:
        before: the reader's state before it, to read it again.
        first: number of its first row among the source's rows.
        rows: (rows, length) ids, shuffled.
    """

    before: State
    first: int
    rows: np.ndarray


class Reader:
    """Reads one source block by block, again and again.

    Args:
        source: text to read.
        encoder: the tokenizer.
        tally: counts what is read.
        length: tokens in a row.
        seed: of the order of shards and rows.
        held_out: share of the documents that is left to validation, by the hash of their text.
        allow_dropped: share of the rows that may be unusable.
        rank, world_size: which process this is, of how many that share the source.
    """

    def __init__(
        self,
        source: TextSource,
        encoder: TextEncoder,
        *,
        tally: Tally,
        length: int,
        seed: int,
        held_out: float = 0.0,
        allow_dropped: float = 0.05,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.source = source
        self.rows = split_dataset_by_node(source.rows, rank, world_size)
        self.name = source.name if world_size == 1 else f"{source.name}@{rank}"
        self.encoder = encoder
        self.length = length
        self.seed = seed
        self.held_out = held_out
        self.allow_dropped = allow_dropped
        self.tally = tally
        self.start: State = {"epoch": 0, "block": 0, "row": 0, "carried": [], "position": None}
        self.load(self.start)

    def load(self, state: State) -> None:
        """Goes to where the reader stood at this state."""
        self._state = state
        self._texts: Iterator[str] | None = None

    def read(self) -> Block:
        """Reads the next block, of at least one row.

        Raises:
            UserError: the source cannot be read, or has too little usable text.
        """
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
                raise UserError(f"{self.name}: no document in it is left for training here")
            position = None if ended else self.rows.state_dict()
            epoch += ended
        ids = np.concatenate(pieces)
        count = tokens // self.length
        rows = ids[: count * self.length].reshape(count, self.length)
        order = np.random.default_rng([self.seed, before["block"]]).permutation(count)
        self._state = {
            "epoch": epoch,
            "block": before["block"] + 1,
            "row": before["row"] + count,
            "carried": ids[count * self.length :].tolist(),
            "position": position,
        }
        return Block(before, before["row"], rows[order])

    def _take(self, epoch: int, position: State | None) -> tuple[list[str], bool]:
        """Returns the next documents of a pass over the source, and whether it ended with them."""
        if self._texts is None:
            # what `datasets` calls the epoch seeds the order of the shards
            self.rows.set_epoch(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0] >> 1))
            self.rows.load_state_dict(position or {})
            self._texts = usable_texts(self.rows, self.source.column, self.tally, self.source.name, self.allow_dropped)
        texts: list[str] = []
        size = 0
        for text in self._texts:
            if not (self.held_out and is_held_out(text, self.held_out, self.seed)):
                texts.append(text)
                size += len(text)
                if size >= BLOCK_CHARACTERS:
                    return texts, False
        self._texts = None
        if self.tally.documents:  # none where this process resumed at the very end
            self.tally.check(self.source.name, self.allow_dropped)
        return texts, True


class RowStream(IterableDataset):
    """Endless rows of several sources, each tokenized one block ahead in a thread.

    Iterate it in the training process (no data loader workers): `state_at` must know what was read.

    Args:
        readers: the sources.
        weights: relative shares.
        seed: of the order across sources.
    """

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float], *, seed: int):
        self.readers = list(readers)
        self.schedule = Schedule(weights, seed)
        self.rows = 0  # handed out since the beginning of training
        self.load_state_dict({"rows": 0, "sources": [reader.start for reader in readers]})

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise UserError("dataloader_num_workers: expected 0 with streaming, which reads ahead in a thread")
        self.load_state_dict(self._start)
        row = self.rows
        blocks: list[Block | None] = [None] * len(self.readers)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmlab-stream")
        try:
            coming: list[Future[Block]] = [pool.submit(reader.read) for reader in self.readers]
            while True:
                source, number = self.schedule.locate(row)
                block = blocks[source]
                while block is None or number >= block.first + len(block.rows):
                    block = blocks[source] = coming[source].result()
                    self._begun[source].append(block.before)
                    coming[source] = pool.submit(self.readers[source].read)
                row += 1
                self.rows = row
                yield as_example(block.rows[number - block.first])
        finally:
            pool.shutdown()  # the readers are not to be moved while one of them reads

    def sample_id(self, index: int) -> str:
        """Returns the stable name of the row at a place, without reading it."""
        source, number = self.schedule.locate(index)
        return f"{self.readers[source].name}:{number}"

    def state_dict(self) -> State:
        """Returns the position after the rows handed out so far."""
        return self.state_at(self.rows)

    def state_at(self, rows: int) -> State:
        """Returns the position after so many rows since the beginning of training, which JSON can hold.

        A data loader fetches ahead: `rows` is what training has consumed, at most what was handed out.

        Raises:
            ValueError: that many rows were not handed out yet, or so long ago that it is forgotten.
        """
        if rows > self.rows:
            raise ValueError(f"{rows} rows were not handed out yet; {self.rows} were")
        sources = []
        for begun, wanted in zip(self._begun, self.schedule.counts(rows), strict=True):
            state = next((state for state in reversed(begun) if state["row"] <= wanted), None)
            if state is None:
                raise ValueError(f"the position after {rows} rows is forgotten; {self.rows} were handed out since")
            sources.append(state)
        return {"rows": rows, "sources": sources}

    def load_state_dict(self, state: State) -> None:
        """Goes to a position: the next iteration yields exactly the rows that follow it."""
        if len(state["sources"]) != len(self.readers):
            raise UserError(
                f"datasets: the position to resume from is of {len(state['sources'])} sources; "
                f"there are {len(self.readers)} now"
            )
        self._start = state
        self.rows = state["rows"]
        self._begun = [deque([source], maxlen=REMEMBERED) for source in state["sources"]]
        for reader, source in zip(self.readers, state["sources"], strict=True):
            reader.load(source)


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to validation, by a seeded hash of its text."""
    return int(seeded_keys(np.array([text_hash(text)], np.uint64), seed)[0]) < fraction * 2**64
