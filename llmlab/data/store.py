"""Tokenized corpora on disk: a memory-mapped file of ids, written once and shared by every run that needs the same.

The key covers the source's content, the tokenizer's and this format's version, so a stale corpus is never read.  Not
the sequence length, nor the held-out share: rows and splits are views (`packing.py`).
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
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from llmlab.data.encoding import Encoded, TextEncoder
from llmlab.data.sources import Tally, TextSource
from llmlab.settings.errors import UserError
from llmlab.settings.paths import expand

VERSION = 1  # of this file format, and of what encoding makes of a text
BATCH_CHARACTERS = 1_000_000
SERIAL_BATCHES = 8  # tokenized before other processes are worth starting

DOCUMENT = np.dtype([("tokens", np.int64), ("hash", np.uint64)])


class TokenStore:
    """A tokenized corpus.

    Attributes:
        folder: where it lies.
        tally: documents, and rows dropped by reason.
        fresh: whether this process has just written it.
    """

    def __init__(self, folder: Path, *, fresh: bool = False):
        self.folder = folder
        self.fresh = fresh
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.tally = Tally(self.meta["documents"])
        self.tally.dropped.update(self.meta["dropped"])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)  # the map itself must not be copied to a worker

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) ids of all documents, each ended by eos."""
        return np.asarray(np.memmap(self.folder / "tokens.bin", np.dtype(self.meta["dtype"]), mode="r"))

    @cached_property
    def documents(self) -> np.ndarray:
        """(documents,) number of tokens and hash of each."""
        return np.fromfile(self.folder / "documents.bin", DOCUMENT)


def open_store(
    source: TextSource,
    encoder: TextEncoder,
    *,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    allow_dropped: float = 0.05,
) -> TokenStore:
    """Returns the tokenized source, tokenizing it now where that was not done before.

    Processes that ask for the same corpus at the same time wait for the first of them.

    Args:
        source: text to tokenize.
        encoder: the tokenizer.
        cache_dir: folder of tokenized corpora; None is `$LLMLAB_CACHE` or `~/.cache/llmlab`.
        num_proc: processes that tokenize; None is every core.
        allow_dropped: share of the rows that may be unusable.

    Raises:
        UserError: no or too few rows are usable, or the cache cannot be written.
    """
    return write_store(
        lambda tally: source.texts(tally, allow_dropped),
        source.name,
        source.identity,
        encoder,
        size=source.size,
        cache_dir=cache_dir,
        num_proc=num_proc,
        allow_dropped=allow_dropped,
    )


def write_store(
    texts: Callable[[Tally], Iterator[str]],
    name: str,
    identity: dict[str, Any],
    encoder: TextEncoder,
    *,
    size: int | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    allow_dropped: float = 0.05,
) -> TokenStore:
    """Returns the tokenized corpus of that identity, made from `texts(tally)` where it is not there yet."""
    root = cache_folder(cache_dir)
    key = {"version": VERSION, "source": identity, "tokenizer": encoder.fingerprint}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / digest
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{digest}.lock"):
            if (folder / "meta.json").is_file():
                store = TokenStore(folder)
                store.tally.check(name, allow_dropped)
                return store
            for rest in root.glob(f"{digest}.writing-*"):  # of a process that was killed
                shutil.rmtree(rest)
            temporary = Path(tempfile.mkdtemp(dir=root, prefix=f"{digest}.writing-"))
            try:
                tally = Tally()
                tokens = _write(temporary, texts(tally), name, encoder, size, num_proc or _cores())
                tally.check(name, allow_dropped)
                meta = {"name": name, "dtype": encoder.dtype.name, "tokens": tokens, "documents": tally.documents}
                meta |= {"dropped": dict(tally.dropped), "key": key}
                (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
                os.replace(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary)
                raise
    except OSError as error:
        raise UserError(f"{name}: cannot be tokenized into {root}: {error.strerror or error}") from None
    return TokenStore(folder, fresh=True)


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder of tokenized corpora."""
    base = cache_dir or os.environ.get("LLMLAB_CACHE") or Path.home() / ".cache" / "llmlab"
    return expand(base) / "corpora"


def _write(
    folder: Path, texts: Iterator[str], name: str, encoder: TextEncoder, size: int | None, num_proc: int
) -> int:
    total = 0
    bar = tqdm(desc=f"tokenizing {name}", total=size, unit="B", unit_scale=True, disable=None)
    with bar, (folder / "tokens.bin").open("wb") as tokens, (folder / "documents.bin").open("wb") as documents:
        for characters, encoded in _encode_all(_batches(texts), encoder, num_proc):
            tokens.write(encoded.tokens.data)
            table = np.empty(len(encoded.lengths), DOCUMENT)
            table["tokens"], table["hash"] = encoded.lengths, encoded.hashes
            documents.write(table.data)
            total += len(encoded.tokens)
            bar.update(characters)
            bar.set_postfix_str(f"{total:,} tokens", refresh=False)
        bar.total = bar.n  # a file's size is only about that of its text
    return total


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
