"""The cache of rendered rows: an Arrow file for each source, written in batches and verified whole when it is opened.

A run reads as many rows of a source as it needs, from all its files in turn.  A shorter cache is a prefix of a longer
one, so the result never depends on what is cached.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import pyarrow
from datasets import Dataset
from filelock import FileLock

from llmlab.data.chat.conversations import ConversationSource
from llmlab.data.checksums import Checksums, tell
from llmlab.data.interleaving import spread
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import read_json

BATCH = 32_768  # rows that are read and rendered together
ROWS, RECORD = "rows.arrow", "llmlab.json"


def open_rows(
    source: ConversationSource, folder: Path, at_most: int | None, render: Callable[[list[str]], Dataset]
) -> tuple[Dataset, bool]:
    """Returns the rendered rows of a source (None: all), and whether they are all it has.

    `render` makes rows of rows as JSON strings, since those of one file may have different types.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            cached = _open_verified(folder, source.name)
            if cached is None or not (cached[1] or (at_most is not None and len(cached[0]) >= at_most)):
                cached = _write(source, folder, at_most, render)
    except OSError as error:
        raise UserError(f"cache_dir = {folder.parent}: cannot be written: {error.strerror or error}") from None
    rows, whole = cached
    return (rows, whole) if at_most is None or len(rows) <= at_most else (rows.select(range(at_most)), False)


def _open_verified(folder: Path, name: str) -> tuple[Dataset, bool] | None:
    """Returns the rows in a folder and whether they are all; damaged ones are removed."""
    if not folder.exists():
        return None
    try:
        record = read_json(folder / RECORD)
        with reading(folder / RECORD, "the record of rendered rows"):
            sums, whole = Checksums.parse(record["rows"]), record["whole"]
        sums.verify(folder / ROWS, whole=True)
        return Dataset.from_file(str(folder / ROWS)), whole
    except (UserError, FileNotFoundError) as error:
        tell(f"{name}: its cache is damaged and will be rebuilt ({error})")
        shutil.rmtree(folder)
        return None


def _write(
    source: ConversationSource, folder: Path, at_most: int | None, render: Callable[[list[str]], Dataset]
) -> tuple[Dataset, bool]:
    rows = iter(spread(source.rows))
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        limited = islice(rows, at_most)
        batches = iter(lambda: [json.dumps(row, default=str) for row in islice(limited, BATCH)], [])
        tables = (render(texts).data.table for texts in batches)
        first = next(tables)
        path = temporary / "rows" / ROWS
        path.parent.mkdir()
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
        whole = at_most is None or next(rows, None) is None
        record = {"rows": Checksums.of(path).record(), "whole": whole}
        path.with_name(RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        if folder.exists():  # fewer rows
            shutil.rmtree(folder)
        path.parent.rename(folder)
        return Dataset.from_file(str(folder / ROWS)), whole
    finally:
        shutil.rmtree(temporary)
