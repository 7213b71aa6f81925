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

import numpy as np
import pyarrow
from datasets import Dataset

from llmlab.data.cache import Checksums, open_cached
from llmlab.data.chat.conversations import ConversationSource
from llmlab.data.interleaving import spread
from llmlab.settings.errors import reading
from llmlab.settings.files import read_json

BATCH = 32_768  # rows that are read and rendered together
ROWS, RECORD = "rows.arrow", "llmlab.json"


def open_rows(
    source: ConversationSource, folder: Path, at_most: int | None, render: Callable[[list[str]], Dataset]
) -> tuple[Dataset, bool]:
    """Returns the rendered rows of a source (None: all), and whether they are all it has.

    `render` makes rows of rows as JSON strings, since those of one file may have different types.
    """

    def write(shorter: Dataset | None) -> tuple[Dataset, bool]:
        return _write(source, folder, at_most, render)

    rows, whole = open_cached(folder, source.name, at_most, _read, write)
    return (rows, whole) if at_most is None or len(rows) <= at_most else (rows.select(range(at_most)), False)


def _read(folder: Path) -> tuple[Dataset, bool]:
    record = read_json(folder / RECORD)
    with reading(folder / RECORD, "the record of rendered rows"):
        sums, whole = Checksums.parse(record["rows"]), record["whole"]
    sums.verify(folder / ROWS)
    return Dataset.from_file(str(folder / ROWS)), whole


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
        path = temporary / "rows" / ROWS  # a folder inside, since others may not read the temporary one
        path.parent.mkdir()
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
        whole = at_most is None or next(rows, None) is None
        sums = Checksums()
        sums.update(np.memmap(path, np.uint8, "r"))
        record = {"rows": sums.record(), "whole": whole}
        path.with_name(RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        if folder.exists():  # fewer rows
            shutil.rmtree(folder)
        path.parent.rename(folder)
        return Dataset.from_file(str(folder / ROWS)), whole
    finally:
        shutil.rmtree(temporary)
