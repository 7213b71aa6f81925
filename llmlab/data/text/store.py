"""Tokenized corpora on disk: a memory-mapped file of ids, written once and shared by every run that needs the same.
The cache key covers the source's content, the tokenizer and this format's version, but neither the sequence length nor
the split: those are views (`packing.py`). A run tokenizes the beginning of a source as far as it needs, and one that
needs more appends to it. `meta.json` is replaced last and says how much of the other files counts; the last 256 MB are
verified on opening, other blocks when they are first read."""

import json
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from llmlab.data.cache import Checksums, cache_folder, open_cached
from llmlab.data.sources import Tally, TextSource, spread, take_texts
from llmlab.data.splits import is_held_out
from llmlab.data.text.encoder import DOCUMENT, TextEncoder
from llmlab.data.workers import map_batches
from llmlab.settings.data import DataSettings
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import read_json, write_atomically

VERIFIED_AT_ONCE = 256 << 20  # bytes of tokens that opening verifies, a fraction of a second
VERSION = 3  # of this file format, and of what encoding makes of a text
BATCH_CHARACTERS = 1_000_000

SMALL = 64_000_000  # bytes of a source that is read in the order of its files: every run needs about all of it
BYTES_PER_TOKEN = 4  # of English text, to judge how many tokens there will be
MOST_BYTES_PER_TOKEN = 6  # so many bytes of text are nearly always enough


class TokenStore:
    """A tokenized corpus or its beginning (`whole` says which); `fresh` where this process has just written to it."""

    def __init__(self, folder: Path, *, fresh: bool = False):
        self.folder, self.fresh = folder, fresh
        self.meta = read_json(folder / "meta.json")
        with reading(folder / "meta.json", "the record of a tokenized corpus"):
            self.tally = Tally(self.meta["documents"])
            self.tally.dropped.update(self.meta["dropped"])
            self.whole = self.meta["position"] is None
            self.dtype = np.dtype(self.meta["dtype"])
            self.sums = {name: Checksums(**record) for name, record in self.meta["files"].items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)  # the map itself must not be copied to a worker

    def __len__(self) -> int:
        return self.sums["tokens.bin"].size // self.dtype.itemsize

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) ids of all documents, each ended by eos, as stored; `read` verifies them."""
        return np.asarray(np.memmap(self.folder / "tokens.bin", self.dtype, "r", shape=(len(self),)))

    @cached_property
    def documents(self) -> np.ndarray:
        """(documents,) number of tokens and hash of each."""
        size = self.sums["documents.bin"].size
        return np.asarray(np.memmap(self.folder / "documents.bin", DOCUMENT, "r", shape=(size // DOCUMENT.itemsize,)))

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns the tokens of a span, verified: altered ones are an error, and the next run tokenizes anew."""
        size = self.dtype.itemsize
        try:
            self.sums["tokens.bin"].verify(self.folder / "tokens.bin", begin * size, end * size)
        except UserError as error:
            (self.folder / "meta.json").unlink(missing_ok=True)  # without it, it is no corpus
            raise UserError(f"{error}; run it again (--resume), which tokenizes {self.meta['name']} anew") from None
        return self.tokens[begin:end]


def _read(folder: Path) -> tuple[TokenStore, bool]:
    store = TokenStore(folder)
    tokens = store.sums["tokens.bin"]
    tokens.verify(folder / "tokens.bin", max(0, tokens.size - VERIFIED_AT_ONCE))
    store.sums["documents.bin"].verify(folder / "documents.bin")
    return store, store.whole


def open_store(
    source: TextSource,
    encoder: TextEncoder,
    settings: DataSettings,
    tokens: int | None = None,
    held_out: tuple[float, int] | None = None,
) -> TokenStore:
    """Returns at least so many tokens of a source (None: all), or of its held-out (fraction, seed) of documents."""
    identity = source.identity if held_out is None else {**source.identity, "held_out": held_out}
    folder = cache_folder(settings.cache_dir, [VERSION, identity, encoder.identity])

    def extend(store: TokenStore | None) -> tuple[TokenStore, bool]:
        """Appends documents to a corpus until it has so many tokens, and then says so in `meta.json`."""
        done = 0 if store is None else len(store)
        estimates = [tokens, None if source.size is None else source.size // BYTES_PER_TOKEN]
        expected = min((count for count in estimates if count is not None), default=None)
        needed, free = ((expected or done) - done) * encoder.dtype.itemsize, shutil.disk_usage(folder.parent).free
        if needed > free:
            takes = f"its tokens take about {needed / 1e9:,.1f} GB in {folder.parent}"
            ways = "set cache_dir to another disk, train for fewer steps, or read it as it comes (streaming=true)"
            raise UserError(f"{source.name}: {takes}, and the disk has {free / 1e9:,.1f} GB free; {ways}")
        rows = source.rows if source.size is not None and source.size <= SMALL else spread(source.rows)
        if store is None:
            tally, characters, sums = Tally(), 0, {name: Checksums() for name in ("tokens.bin", "documents.bin")}
        else:
            tally, characters, sums = store.tally, store.meta["characters"], store.sums
            rows.load_state_dict(store.meta["position"])
        texts = source.texts(tally, settings.allow_dropped, rows)
        if held_out is not None:
            texts = (text for text in texts if is_held_out(text, *held_out))
        size = BATCH_CHARACTERS if tokens is None else min(BATCH_CHARACTERS, tokens * MOST_BYTES_PER_TOKEN)
        ended = False

        def batches() -> Iterator[list[str]]:
            nonlocal ended
            while batch := take_texts(texts, size):
                yield batch
                if tokens is not None and sums["tokens.bin"].size >= tokens * encoder.dtype.itemsize:
                    return
            ended = True

        folder.mkdir(exist_ok=True)
        bar = tqdm(None, f"tokenizing {source.name}", expected, initial=done, unit="tok", unit_scale=1, disable=None)
        with bar, (folder / "tokens.bin").open("ab") as ids, (folder / "documents.bin").open("ab") as documents:
            files = {"tokens.bin": ids, "documents.bin": documents}
            for name, file in files.items():
                file.truncate(sums[name].size)  # what an interrupted extension wrote
            for batch in map_batches(encoder.encode, batches(), settings.num_proc):
                for name, array in (("tokens.bin", batch.tokens), ("documents.bin", batch.documents)):
                    data = array.tobytes()
                    files[name].write(data)
                    sums[name].update(data)
                characters += batch.characters
                bar.update(len(batch.tokens))
            bar.total = bar.n  # what was expected was a guess
        tally.check(source.name, settings.allow_dropped)
        meta = {"name": source.name, "dtype": encoder.dtype.name, "characters": characters}
        meta |= {"documents": tally.documents, "dropped": dict(tally.dropped)}
        meta["position"] = None if ended else rows.state_dict()
        meta["files"] = {name: checksums.record() for name, checksums in sums.items()}
        write_atomically(folder / "meta.json", json.dumps(meta) + "\n")
        return TokenStore(folder, fresh=True), ended

    store, _ = open_cached(folder, source.name, tokens, _read, extend)
    store.tally.check(source.name, settings.allow_dropped)
    return store
