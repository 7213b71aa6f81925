"""Rows of exactly one sequence length over a tokenized corpus, and the share of it that is held out.

Rows are views: documents follow each other, separated by eos, and are cut wherever a row is full; only the last
partial row is left over.  Attention across the documents of a row is the model's business.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from llmlab.data.hashing import seeded_keys
from llmlab.data.text.store import TokenStore
from llmlab.settings.errors import UserError

STRETCH = 2**24
"""Tokens that are shuffled together, and of which it is judged what to hold out.

Both look no further, so that a run which reads more of its source sees the same rows first."""


@dataclass(frozen=True)
class HeldOut:
    """A corpus in two parts, as spans of tokens.

    Attributes:
        train: (spans, 2) begin and end of each stretch of training tokens.
        validation: (spans, 2) the same of the held-out tokens.
        how: in words, for the record.
    """

    train: np.ndarray
    validation: np.ndarray
    how: str


class PackedRows(Dataset):
    """Rows of `length` tokens; row i is the same whatever else is read.

    Args:
        name: prefix of the sample ids.
        store: tokenized corpus.
        spans: (spans, 2) the tokens that belong to it.
        length: tokens in a row.
        most: rows at most; None is all.
    """

    def __init__(self, name: str, store: TokenStore, spans: np.ndarray, length: int, most: int | None = None):
        self.name = name
        self.store = store
        self.length = length
        self.most = most
        self.spans = spans[spans[:, 0] < spans[:, 1]]
        self.starts = np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0])])  # before each span
        self.tokens = int(self.starts[-1])

    def __len__(self) -> int:
        whole = self.tokens // self.length
        return whole if self.most is None else min(whole, self.most)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return as_example(self.row(index))

    def row(self, index: int) -> np.ndarray:
        """Returns the ids of a row, (length,)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        position, left = index * self.length, self.length
        span = int(np.searchsorted(self.starts, position, side="right")) - 1
        pieces = []
        while left:
            begin = self.spans[span, 0] + position - self.starts[span]
            piece = self.store.read(int(begin), int(min(begin + left, self.spans[span, 1])))
            pieces.append(piece)
            left -= len(piece)
            position += len(piece)
            span += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def sample_id(self, index: int) -> str:
        """Returns the stable name of a row, without reading it."""
        return f"{self.name}:{index}"


def as_example(row: np.ndarray) -> dict[str, torch.Tensor]:
    """Returns what a causal model trains on: `input_ids` and `labels`, (length,) int64; the model shifts them."""
    ids = torch.from_numpy(row.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def all_of(store: TokenStore) -> np.ndarray:
    """Returns the single span of a whole corpus, (1, 2)."""
    return np.array([[0, len(store.tokens)]])


def stretch_of(length: int) -> int:
    """Returns the rows that are shuffled together."""
    return max(1, STRETCH // length)


def hold_out(name: str, store: TokenStore, fraction: float, *, seed: int, length: int) -> HeldOut:
    """Splits a corpus that has no validation split, the same way every time.

    Documents are held out in the order of a seeded hash of their text until they make up the fraction of the tokens
    and at least one row, so equal documents stay on one side.  Where single documents are too large for that (one
    book, one play), the end of the text is held out.  The first `STRETCH` tokens decide which hashes that are.

    Raises:
        UserError: the corpus is too small for a row on either side.
    """
    keys, ends = seeded_keys(store.documents["hash"], seed), np.cumsum(store.documents["tokens"])
    judged = int(np.searchsorted(ends, STRETCH)) + 1
    lengths = store.documents["tokens"][:judged]
    total = int(lengths.sum())
    wanted = max(math.ceil(fraction * total), length)
    if total - wanted < length:
        raise UserError(
            f"{name}: its {total:,} tokens are too few to train on and validate with rows of max_seq_len = {length}; "
            f"expected at least {2 * length:,}; use a shorter max_seq_len or more text"
        )
    order = np.argsort(keys[:judged], kind="stable")
    reached = np.cumsum(lengths[order])
    count = int(np.searchsorted(reached, wanted)) + 1
    last = keys[order[count - 1]]
    count = int(np.searchsorted(keys[order], last, side="right"))  # equal documents come along
    if reached[count - 1] > 2 * wanted or total - reached[count - 1] < length:
        cut, end = total - wanted, len(store.tokens)
        train = np.array([[0, cut], [total, end]] if end > total else [[0, cut]])
        return HeldOut(train, np.array([[cut, total]]), f"the last {wanted:,} tokens")
    held = keys <= last
    return HeldOut(_spans(~held, ends), _spans(held, ends), f"{int(held.sum()):,} documents by hash")


def _spans(chosen: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the token spans of runs of chosen documents, (runs, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    first, after = edges[::2], edges[1::2]
    begins = np.concatenate([[0], ends])
    return np.stack([begins[first], begins[after]], axis=1)
