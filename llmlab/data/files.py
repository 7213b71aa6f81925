"""Local data files: which files a path means, their shards, and the rows of each shard. Not `datasets`' builders:
errors name file and line, inconsistent rows are counted, nothing is copied, and a resumed stream can skip shards."""

import csv
import gzip
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow.parquet

from llmlab.data import demo
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, reading, reason_of

FORMATS = ("txt", "json", "jsonl", "csv", "parquet")
ENDINGS = ", ".join(f".{kind}" for kind in FORMATS) + " (each also with .gz)"
SEPARATOR = "<|endoftext|>"
"""Ends a document in a text file; a text file without one is a single document."""

SHARD_BYTES = 64_000_000
LONGEST_DOCUMENT = 16_000_000  # characters; a longer text file is cut at a line end, so that memory stays bounded

_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "eval": "test"}
_SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


class Shard(NamedTuple):
    """A part of a file that is read on its own: bytes of JSON lines, row groups of parquet, else the whole file."""

    path: str
    format: str
    start: int = 0
    end: int = sys.maxsize
    unit: str = "document"  # of a text file


def format_of(path: Path) -> str | None:
    """Returns the one of `FORMATS` that a file name ends in (before a `.gz`), or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in FORMATS if name.endswith(f".{kind}")), None)


def find_files(path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split at a path: that in their name (`train-00.jsonl`, `dev/part.txt`), else train."""
    if path.is_file():
        return {"train": [path]}
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and format_of(file) and not any(part.startswith(".") for part in inside.parts):
            words = re.findall("[a-z]+", str(inside).lower())
            named = next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), "train")
            splits.setdefault(named, []).append(file)
    if not splits:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise UserError(f"{path}: no file in this folder ends in {ENDINGS} (found {found})")
    return splits


def is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def count_rows(files: Sequence[Path]) -> int | None:
    """Returns the number of rows of parquet files; None for others, which would have to be read."""
    known = all(path.suffix.lower() == ".parquet" for path in files)
    return sum(_parquet(path).metadata.num_rows for path in files) if known else None


def files_of(source: DataSource) -> list[Path]:
    """Returns the local files of a source, of every split; none where it is on the hub or generated."""
    path = Path(source.name).expanduser()
    if source.name.startswith(demo.PREFIX) or not path.exists():
        return []
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and format_of(file))


def shards_of(files: Iterable[Path], unit: str = "document") -> list[Shard]:
    """Returns the shards of these files, in order; `unit` is what a row of a text file is."""
    shards = []
    for path in files:
        kind = format_of(path)
        if kind is None:
            raise UserError(f"{path}: expected a file that ends in {ENDINGS}")
        with reading(path, kind):
            if kind == "json":
                with _open_text(path) as handle:
                    kind = "jsonl" if handle.read(4096).lstrip().startswith("{") else "json"  # many call lines .json
            if kind == "jsonl" and not is_gzipped(path):
                starts = range(0, max(path.stat().st_size, 1), SHARD_BYTES)
                shards += [Shard(str(path), kind, start, start + SHARD_BYTES) for start in starts]
            elif kind == "parquet" and not is_gzipped(path):
                groups = range(_parquet(path).num_row_groups)
                shards += [Shard(str(path), kind, group, group + 1) for group in groups]
            else:
                shards.append(Shard(str(path), kind, unit=unit))
    return shards


def read_shard(shard: Shard, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a shard as plain mappings; of a parquet file only `column` is read."""
    path = Path(shard.path)
    with reading(path, shard.format):
        readers = {"parquet": partial(_read_parquet, column=column), "jsonl": _read_json_lines}
        readers |= {"json": _read_json_list, "csv": _read_csv, "txt": _read_text}
        for row in readers[shard.format](path, shard):
            yield row if isinstance(row, dict) else {"text": row}


def _read_text(path: Path, shard: Shard) -> Iterator[str]:
    """Yields the documents of a text file, its paragraphs or its lines; only a document may be blank."""
    pieces: list[str] = []
    unit, length, separated = shard.unit, 0, False
    for text, ends in _split_lines(path):
        pieces.append(text)
        length += len(text)
        separated = separated or ends
        if unit == "document" and not ends and length <= LONGEST_DOCUMENT:
            continue
        if unit == "paragraph" and not ends and text.strip():
            continue
        piece = "".join(pieces)
        pieces, length = [], 0
        if ends or unit != "document":
            piece = piece.strip("\n")
        if piece.strip() or unit == "document":
            yield piece
    rest = "".join(pieces)
    if not separated and unit == "document":
        yield rest
    elif rest.strip():  # what follows the last separator is usually nothing
        yield rest.strip("\n")


def _split_lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields the lines of a text file, cut at each `SEPARATOR`, and whether one follows."""
    with _open_text(path) as handle:
        for line in handle:
            *ends, last = line.split(SEPARATOR)
            for end in ends:
                yield end, True
            yield last, False


def _read_json_lines(path: Path, shard: Shard) -> Iterator[Any]:
    with _open(path) as handle:
        position = shard.start
        if position > 0:  # a line that starts in the previous shard belongs to it
            handle.seek(position - 1)
            position += len(handle.readline()) - 1
        while position < shard.end and (line := handle.readline()):
            if line.strip():
                try:
                    row = json.loads(line if position else line.removeprefix(b"\xef\xbb\xbf"))
                except (ValueError, RecursionError) as error:
                    number = _line_number(path, position)
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else reason_of(error)
                    raise UserError(f"{path}:{number}: this line is not valid JSON: {reason}") from None
                yield row
            position += len(line)


def _read_json_list(path: Path, shard: Shard) -> list[Any]:
    with _open_text(path) as handle:
        try:
            rows = json.load(handle)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: this is not valid JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, or one object a line; found {type(rows).__name__}")
    return rows


def _read_csv(path: Path, shard: Shard) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST_DOCUMENT)
    with _open_text(path, newline="") as handle:
        reader = csv.DictReader(handle)
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: this is not valid CSV: {error}") from None


def _read_parquet(path: Path, shard: Shard, column: str | None) -> Iterator[dict[str, Any]]:
    file = _parquet(path)
    columns = None if column is None else [column] if column in file.schema_arrow.names else []
    groups = range(shard.start, min(shard.end, file.num_row_groups))
    for batch in file.iter_batches(batch_size=512, row_groups=list(groups), columns=columns):
        yield from batch.to_pylist() if batch.num_columns else ({} for _ in range(batch.num_rows))


def _parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    with reading(path, "parquet"):
        file = io.BytesIO(gzip.decompress(path.read_bytes())) if is_gzipped(path) else path
        return pyarrow.parquet.ParquetFile(file)


def _open(path: Path) -> IO[bytes]:
    handle = gzip.open(path, "rb") if is_gzipped(path) else path.open("rb")  # noqa: SIM115 - returned
    head = handle.read(4096)
    is_utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if is_utf16 or b"\0" in head:
        handle.close()
        raise UserError(f"{path}: this {'text is UTF-16' if is_utf16 else 'is a binary file'}; expected UTF-8 text")
    handle.seek(0)
    return handle


def _open_text(path: Path, newline: str | None = None) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline)


def _line_number(path: Path, position: int) -> int:
    """Returns the number of the line that begins at a byte."""
    with _open(path) as handle:
        lines = itertools.takewhile(lambda line: handle.tell() <= position, iter(handle.readline, b""))
        return 1 + sum(1 for _ in lines)
