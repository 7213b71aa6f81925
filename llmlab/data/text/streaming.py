"""Streamed rows: sources tokenized and packed as they are read, shuffled in blocks, resumed exactly.

A block's rows are shuffled and its unfinished row is carried into the next, so a position is small: the source's state
before the block, the carried tokens, and the rows consumed.  Order across sources is the `Schedule` that map-style
data has too.  There is no tokenized copy on disk, and no random access.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from llmlab.data.sources import Tally, TextSource, take_texts
from llmlab.data.splits import is_held_out
from llmlab.data.text.packing import Schedule, as_example
from llmlab.data.text.store import TextEncoder
from llmlab.settings.errors import UserError

BLOCK_CHARACTERS = 2_000_000  # of text shuffled together
REMEMBERED = 32  # blocks of each source whose beginning can still be resumed from

State = dict[str, Any]
START: State = {"epoch": 0, "block": 0, "row": 0, "carried": [], "position": None}


class Block(NamedTuple):
    """Shuffled rows (rows, length), the number of the first among the source's, and the reader's state before them."""

    before: State
    first: int
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
        return Block(before, before["row"], rows[order])

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
                while block is None or number >= block.first + len(block.rows):
                    block = blocks[source] = next_blocks[source].result()
                    self._history[source].append(block.before)
                    next_blocks[source] = pool.submit(self.readers[source].read)
                row += 1
                self.rows = row
                yield as_example(block.rows[number - block.first])
        finally:
            pool.shutdown()  # no reader may be repositioned while one of them reads

    def sample_id(self, index: int) -> str:
        """Returns the stable name of the row at a place, without reading it."""
        source, number = self.schedule.locate(index)
        return f"{self.readers[source].name}:{number}"

    def state_dict(self) -> State:
        """Returns the position after the rows yielded so far."""
        return self.state_at(self.rows)

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
