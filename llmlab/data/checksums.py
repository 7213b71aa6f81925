"""Checksums of cache files, block by block: detects cache files that changed after they were written.

Blocks are verified independently, so a large file is verified where it is read, and grows without being read again.
They detect accidents (cut, altered, half written), not forgery.
"""

import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmlab.settings.errors import UserError, printable

BLOCK = 4 << 20  # bytes
VERIFIED_AT_ONCE = 256 << 20  # bytes of a file that opening it verifies, a fraction of a second


class Checksums:
    """The size of a file and the CRC-32 of each of its blocks; the last one may be short."""

    def __init__(self, size: int = 0, sums: Iterable[int] = ()):
        self.size = size
        self.sums = list(sums)

    @classmethod
    def of(cls, path: Path) -> "Checksums":
        """Returns those of a file as it is."""
        sums = cls()
        with path.open("rb") as handle:
            while block := handle.read(BLOCK):
                sums.update(block)
        return sums

    @classmethod
    def parse(cls, record: dict[str, Any]) -> "Checksums":
        """Returns what `record` returned."""
        text = record["crc32"]
        return cls(record["bytes"], [int(text[place : place + 8], 16) for place in range(0, len(text), 8)])

    def record(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"bytes": self.size, "crc32": "".join(f"{value:08x}" for value in self.sums)}

    def update(self, data: bytes) -> None:
        """Appends data."""
        begin = 0
        while begin < len(data):
            if self.size % BLOCK == 0:
                self.sums.append(0)
            part = memoryview(data)[begin : begin + BLOCK - self.size % BLOCK]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self.size += len(part)
            begin += len(part)

    def verify_block(self, path: Path, number: int) -> None:
        """Raises UserError where a block of the file is not what was written."""
        begin = number * BLOCK
        with path.open("rb") as handle:
            handle.seek(begin)
            found = handle.read(min(BLOCK, self.size - begin))
        if zlib.crc32(found) != self.sums[number]:
            raise UserError(f"{path}: byte {begin:,} to {begin + len(found):,} are not what was written")

    def verify(self, path: Path, *, whole: bool) -> None:
        """Raises UserError where the file is too short or, of a whole one, any block is not what was written."""
        size = path.stat().st_size
        if size < self.size:  # may be longer: bytes left by an interrupted append are ignored
            raise UserError(f"{path}: it has {size:,} bytes, and {self.size:,} were written")
        for number in range(len(self.sums)) if whole else ():
            self.verify_block(path, number)


def tell(text: str) -> None:
    """Prints a notice about a cache on standard error."""
    print(printable(text), file=sys.stderr)
