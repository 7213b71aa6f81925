"""The cache of tokenized corpora and rendered rows: its folders, their locks, and the checksums of their files.
Checksums are of blocks, so that a large file is verified where it is read, and grows without being read again. They
detect accidents (cut, altered, half written), not forgery."""

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from llmlab.settings.errors import UserError, printable
from llmlab.settings.paths import expand

BLOCK = 4 << 20  # bytes

Cached = tuple[Any, bool]
"""What is cached of a source, and whether it is all there is."""


def cache_folder(cache_dir: str | None, key: Any, prefix: str = "") -> Path:
    """Returns the folder of what is decided by a key of plain values."""
    base = cache_dir or os.environ.get("LLMLAB_CACHE") or Path.home() / ".cache" / "llmlab"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return expand(base) / "corpora" / f"{prefix}{digest}"


def open_cached(
    folder: Path, name: str, least: int | None, read: Callable[[Path], Cached], write: Callable[[Any], Cached]
) -> Cached:
    """Returns at least so much of a source (None: all) from its cache folder. Damaged files, for which `read` raises,
    are removed; `write` extends what `read` returned, or None."""
    content, whole = None, False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.exists():
                try:
                    content, whole = read(folder)
                except (UserError, FileNotFoundError) as error:
                    print(printable(f"{name}: its cache is damaged and will be rebuilt ({error})"), file=sys.stderr)
                    shutil.rmtree(folder)
            if content is None or not (whole or (least is not None and len(content) >= least)):
                try:
                    content, whole = write(content)
                except BaseException:
                    if content is None:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
    except OSError as error:
        raise UserError(f"{name}: cannot be cached in {folder.parent}: {error.strerror or error}") from None
    return content, whole


class Checksums:
    """The size of a file and the CRC-32 of each of its blocks; the last one may be short."""

    def __init__(self, size: int = 0, sums: Iterable[int] = ()):
        self.size, self.sums = size, list(sums)
        self.verified: set[int] = set()  # blocks that were read and are what was written

    def record(self) -> dict[str, Any]:
        """Returns the arguments that make these again, as plain values."""
        return {"size": self.size, "sums": self.sums}

    def update(self, data: bytes | np.ndarray) -> None:
        begin = 0
        while begin < len(data):
            if self.size % BLOCK == 0:
                self.sums.append(0)
            part = memoryview(data)[begin : begin + BLOCK - self.size % BLOCK]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self.size += len(part)
            begin += len(part)

    def verify(self, path: Path, begin: int = 0, end: int | None = None) -> None:
        """Raises UserError where a block with these bytes is not what was written; each block is read once."""
        for number in range(begin // BLOCK, -(-(self.size if end is None else end) // BLOCK)):
            if number in self.verified:
                continue
            start, stop = number * BLOCK, min((number + 1) * BLOCK, self.size)
            with path.open("rb") as handle:
                handle.seek(start)
                content = handle.read(stop - start)
            if len(content) < stop - start or zlib.crc32(content) != self.sums[number]:
                raise UserError(f"{path}: byte {start:,} to {stop:,} are not what was written")
            self.verified.add(number)
