"""Tokenized corpora on disk: a memory-mapped file of ids, written once and shared by every run that needs the same.

The key covers the source's content, the tokenizer's and this format's version, so a stale corpus is never read.  Not
the sequence length, nor the held-out share: rows and splits are views (`packing.py`).  Nor how much of the source a
run needs: its beginning is tokenized, and a run that needs more appends to it.

What is guaranteed: a corpus that was cut, altered or half written is made anew on opening, up to 256 MB; of a larger
one the tokens are verified block by block when they are first read, and nothing altered is ever returned.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from llmlab.data.cache import cache_folder, cores
from llmlab.data.checksums import BLOCK, VERIFIED_AT_ONCE, Checksums, tell
from llmlab.data.interleaving import spread
from llmlab.data.sources import Tally, TextSource, usable_texts
from llmlab.data.text.encoding import Encoded, TextEncoder
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import read_json, write_atomically

VERSION = 2  # of this file format, and of what encoding makes of a text
BATCH_CHARACTERS = 1_000_000
SERIAL_BATCHES = 8  # tokenized before other processes are worth starting

SMALL = 64_000_000  # bytes of a source that is read in the order of its files: every run needs about all of it
BYTES_PER_TOKEN = 4  # of English text, to judge whether its tokens fit the disk

DOCUMENT = np.dtype([("tokens", np.int64), ("hash", np.uint64)])


class TokenStore:
    """A tokenized corpus, or its beginning.

    Attributes:
        folder: where it lies.
        tally: documents, and rows dropped by reason.
        whole: whether it is all of the source.
        fresh: whether this process has just written or extended it.
    """

    def __init__(self, folder: Path, *, fresh: bool = False):
        self.folder = folder
        self.fresh = fresh
        self.meta = read_json(folder / "meta.json")
        with reading(folder / "meta.json", "the record of a tokenized corpus"):
            self.tally = Tally(self.meta["documents"])
            self.tally.dropped.update(self.meta["dropped"])
            self.whole = self.meta["position"] is None
            self.type = np.dtype(self.meta["dtype"])
            self.sums = {name: Checksums.parse(record) for name, record in self.meta["files"].items()}
            self._unverified = set(range(len(self.sums["tokens.bin"].sums)))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)  # the map itself must not be copied to a worker

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) ids of all documents, each ended by eos, as they lie on the disk; `read` verifies them."""
        return np.asarray(np.memmap(self.folder / "tokens.bin", self.type, mode="r", shape=(self.meta["tokens"],)))

    @cached_property
    def documents(self) -> np.ndarray:
        """(documents,) number of tokens and hash of each."""
        return np.fromfile(self.folder / "documents.bin", DOCUMENT, self.meta["documents"])

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns a stretch of the tokens.

        Raises:
            UserError: they are not what was written; the next run makes the corpus anew.
        """
        for block in range(begin * self.type.itemsize // BLOCK, -(-end * self.type.itemsize // BLOCK)):
            if block in self._unverified:
                try:
                    self.sums["tokens.bin"].verify_block(self.folder / "tokens.bin", block)
                except UserError as error:
                    (self.folder / "meta.json").unlink(missing_ok=True)  # without it, it is no corpus
                    raise UserError(
                        f"{error}; run it again (--resume), which tokenizes {self.meta['name']} anew"
                    ) from None
                self._unverified.discard(block)
        return self.tokens[begin:end]

    def verify(self) -> None:
        """Raises UserError where a file is not what was written, as far as that can be told quickly."""
        tokens = self.sums["tokens.bin"]
        if tokens.size != self.meta["tokens"] * self.type.itemsize:
            raise UserError(f"{self.folder / 'meta.json'}: it contradicts itself")
        whole = tokens.size <= VERIFIED_AT_ONCE
        tokens.verify(self.folder / "tokens.bin", whole=whole)
        self.sums["documents.bin"].verify(self.folder / "documents.bin", whole=True)
        if whole:
            self._unverified.clear()


def open_store(
    source: TextSource,
    encoder: TextEncoder,
    *,
    tokens: int | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    allow_dropped: float = 0.05,
) -> TokenStore:
    """Returns the tokenized source, tokenizing now what was not done before.

    Processes that need the same corpus at the same time wait for the first of them.

    Args:
        source: text to tokenize.
        encoder: the tokenizer.
        tokens: at least so many from its beginning; None is the whole source.
        cache_dir: folder of tokenized corpora; None is `$LLMLAB_CACHE` or `~/.cache/llmlab`.
        num_proc: processes that tokenize; None is every core.
        allow_dropped: share of the rows that may be unusable.

    Raises:
        UserError: no or too few rows are usable, or the cache cannot be written or does not fit the disk.
    """
    small = source.size is not None and source.size <= SMALL
    rows = source.rows if small else spread(source.rows)

    def read(tally: Tally, position: Any) -> Iterator[str]:
        if position:
            rows.load_state_dict(position)
        return usable_texts(rows, source.column, tally, source.name, allow_dropped)

    return write_store(
        read,
        source.name,
        source.identity,
        encoder,
        position=rows.state_dict,
        tokens=tokens,
        size=source.size,
        cache_dir=cache_dir,
        num_proc=num_proc,
        allow_dropped=allow_dropped,
    )


def write_store(
    read: Callable[[Tally, Any], Iterator[str]],
    name: str,
    identity: dict[str, Any],
    encoder: TextEncoder,
    *,
    position: Callable[[], Any] = dict,
    tokens: int | None = None,
    size: int | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    allow_dropped: float = 0.05,
) -> TokenStore:
    """Returns the tokenized corpus of that identity, made or extended from `read(tally, position)` where it is short.

    `position` says where reading stands, as plain values.
    """
    root = cache_folder(cache_dir)
    key = {"version": VERSION, "source": identity, "tokenizer": encoder.fingerprint}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / digest
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{digest}.lock"):
            for rest in root.glob(f"{digest}.writing-*"):  # of a process that was killed
                shutil.rmtree(rest)
            store = _open_verified(folder, name)
            if store is not None and (store.whole or (tokens is not None and len(store.tokens) >= tokens)):
                store.tally.check(name, allow_dropped)
                return store
            _check_disk(root, name, encoder, tokens, size, store)
            temporary = Path(tempfile.mkdtemp(dir=root, prefix=f"{digest}.writing-")) if store is None else folder
            try:
                tally = Tally() if store is None else store.tally
                before = None if store is None else store.meta["position"]
                writer = _Writer(temporary, store, encoder, name, tokens, size)
                whole = writer.write(read(tally, before), num_proc or cores())
                tally.check(name, allow_dropped)
                meta = {"name": name, "dtype": encoder.dtype.name, "tokens": writer.tokens}
                meta |= {"characters": writer.characters, "documents": tally.documents, "dropped": dict(tally.dropped)}
                meta |= {"position": None if whole else position(), "key": key}
                meta["files"] = {name: sums.record() for name, sums in writer.sums.items()}
                write_atomically(temporary / "meta.json", json.dumps(meta, indent=2) + "\n")
                if store is None:
                    os.replace(temporary, folder)
            except BaseException:
                if store is None:  # else what was appended is not in the record, and never read
                    shutil.rmtree(temporary)
                raise
    except OSError as error:
        raise UserError(f"{name}: cannot be tokenized into {root}: {error.strerror or error}") from None
    return TokenStore(folder, fresh=True)


def _open_verified(folder: Path, name: str) -> TokenStore | None:
    """Returns the corpus in this folder; one that is not what was written is removed."""
    if not folder.exists():
        return None
    try:
        store = TokenStore(folder)
        store.verify()
        return store
    except (UserError, FileNotFoundError) as error:
        tell(f"{name}: its cache is damaged and made anew ({error})")
        shutil.rmtree(folder)
        return None


def _check_disk(
    root: Path, name: str, encoder: TextEncoder, tokens: int | None, size: int | None, store: TokenStore | None
) -> None:
    """Raises UserError where the tokens to come do not fit the disk, as far as that is known."""
    estimates = [count for count in (tokens, size and size // BYTES_PER_TOKEN) if count is not None]
    done = 0 if store is None else len(store.tokens)
    needed = (min(estimates) - done) * encoder.dtype.itemsize if estimates else 0
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{name}: its tokens take about {needed / 1e9:,.1f} GB in {root}, and the disk has {free / 1e9:,.1f} GB "
            "free; set cache_dir to another disk, train for fewer steps, or read it as it comes (streaming=true)"
        )


class _Writer:
    """Appends documents to the files of a corpus.

    Args:
        folder: of the corpus.
        store: what is in it; None is nothing.
        encoder: the tokenizer.
        name: of the source, for the bar.
        limit: tokens at which to stop; None is the end of the source.
        size: bytes of the source, for the bar.
    """

    def __init__(
        self,
        folder: Path,
        store: TokenStore | None,
        encoder: TextEncoder,
        name: str,
        limit: int | None,
        size: int | None,
    ):
        self.folder, self.encoder, self.name = folder, encoder, name
        self.limit, self.size = limit, size
        self.tokens = 0 if store is None else store.meta["tokens"]
        self.characters = 0 if store is None else store.meta["characters"]
        self.sums = {name: Checksums() for name in ("tokens.bin", "documents.bin")} if store is None else store.sums

    def write(self, texts: Iterator[str], num_proc: int) -> bool:
        """Writes these texts up to the limit, and returns whether that was all of them."""
        ended = False

        def until_enough() -> Iterator[list[str]]:
            nonlocal ended
            batches = _batches(texts)
            while self.limit is None or self.tokens < self.limit:
                batch = next(batches, None)
                if batch is None:
                    ended = True
                    return
                yield batch

        total, unit = (self.size, "B") if self.limit is None else (self.limit, "tok")
        bar = tqdm(desc=f"tokenizing {self.name}", total=total, unit=unit, unit_scale=True, disable=None)
        with bar, ExitStack() as stack:
            files = {}
            for name, sums in self.sums.items():
                files[name] = stack.enter_context((self.folder / name).open("ab"))
                files[name].truncate(sums.size)  # what an extension wrote that was cut off
            bar.update(self.characters if self.limit is None else self.tokens)
            for characters, encoded in _encode_all(until_enough(), self.encoder, num_proc):
                table = np.empty(len(encoded.lengths), DOCUMENT)
                table["tokens"], table["hash"] = encoded.lengths, encoded.hashes
                for name, data in (("tokens.bin", encoded.tokens.tobytes()), ("documents.bin", table.tobytes())):
                    files[name].write(data)
                    self.sums[name].update(data)
                self.tokens += len(encoded.tokens)
                self.characters += characters
                bar.update(characters if self.limit is None else len(encoded.tokens))
                bar.set_postfix_str(f"{self.tokens:,} tokens", refresh=False)
            bar.total = bar.n  # a file's size is only about that of its text
        return ended


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(batches: Iterator[list[str]], encoder: TextEncoder, num_proc: int) -> Iterator[tuple[int, Encoded]]:
    """Yields the encoded batches in order; long corpora are encoded by several processes."""
    for batch in batches if num_proc == 1 else islice(batches, SERIAL_BATCHES):
        yield sum(map(len, batch)), encoder.encode(batch)
    following = next(batches, None)
    if following is None:
        return
    # forked, as in `datasets`: scripts and notebooks need no main guard, and the workers touch neither torch nor CUDA
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_proc, context, _start_worker, (encoder,))
    waiting: deque[tuple[int, Future]] = deque()
    try:
        while following is not None or waiting:
            while following is not None and len(waiting) < 2 * num_proc:
                waiting.append((sum(map(len, following)), pool.submit(_encode_in_worker, following)))
                following = next(batches, None)
            characters, future = waiting.popleft()
            yield characters, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: TextEncoder  # of a worker process, set when it starts


def _start_worker(encoder: TextEncoder) -> None:
    global _ENCODER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _ENCODER = encoder


def _encode_in_worker(batch: list[str]) -> Encoded:
    return _ENCODER.encode(batch)
