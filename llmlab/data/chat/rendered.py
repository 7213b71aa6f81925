"""Rendered rows on disk: written once, and verified whole before they are read again.

A source that has more rows than a run needs is read in part, from all its files in turn; the part of N rows is the
beginning of every longer one, so that what is cached never decides what is read.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from datasets import Dataset, load_from_disk
from filelock import FileLock

from llmlab.data.chat.conversations import ConversationSource
from llmlab.data.checksums import Checksums, tell
from llmlab.data.interleaving import spread
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import read_json

RECORD = "llmlab.json"  # beside what `datasets` writes
Render = Callable[[list[str]], Dataset]


def open_rendered(
    source: ConversationSource, folder: Path, at_most: int | None, render: Render
) -> tuple[Dataset, bool]:
    """Returns the rendered rows of a source, and whether they are all of it.

    Args:
        source: what to render.
        folder: of the cache of its whole; a part lies beside it.
        at_most: rows of it; None is all.
        render: makes rows of rows that are JSON text.

    Raises:
        UserError: the source cannot be read, or the cache cannot be written.
    """
    part = folder.with_name(f"{folder.name}-part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            whole = _open_verified(folder, source.name)
            if whole is not None and (at_most is None or len(whole) <= at_most):
                return whole, True
            beginning = None if at_most is None else _open_verified(part, source.name)
            if beginning is not None and len(beginning) >= at_most:
                return beginning.select(range(at_most)), False
            texts, ended = _read(source, at_most)
            _write(render(texts), folder if ended else part)
            return load_from_disk(str(folder if ended else part)), ended
    except OSError as error:
        raise UserError(f"cache_dir = {folder.parent}: cannot be written: {error.strerror or error}") from None


def _read(source: ConversationSource, at_most: int | None) -> tuple[list[str], bool]:
    """Returns rows as JSON text, since rows of one file may have different types, and whether they are all."""
    if at_most is None or source.count is None or source.count <= at_most:
        rows = source.rows if at_most is None else islice(source.rows, at_most + 1)
        texts = [json.dumps(row, default=str) for row in rows]
        if at_most is None or len(texts) <= at_most:
            return texts, True
        if source.rows.num_shards == 1:
            return texts[:at_most], False
    return [json.dumps(row, default=str) for row in islice(spread(source.rows), at_most)], False


def _open_verified(folder: Path, name: str) -> Dataset | None:
    """Returns the rows in this folder; those that are not what was written are removed."""
    if not folder.exists():
        return None
    try:
        record = read_json(folder / RECORD)
        with reading(folder / RECORD, "the record of rendered rows"):
            files = {file: Checksums.parse(sums) for file, sums in record["files"].items()}
        for file, sums in files.items():
            sums.verify(folder / file, whole=True)
        return load_from_disk(str(folder))
    except (UserError, FileNotFoundError) as error:
        tell(f"{name}: its cache is damaged and made anew ({error})")
        shutil.rmtree(folder)
        return None


def _write(rows: Dataset, folder: Path) -> None:
    needed, free = rows.data.nbytes, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"cache_dir = {folder.parent}: the rendered rows take {needed / 1e9:,.1f} GB, and the disk has "
            f"{free / 1e9:,.1f} GB free; choose another disk, or train for fewer steps"
        )
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        rows.save_to_disk(str(temporary / "rows"))
        files = {path.name: Checksums.of(path).record() for path in sorted((temporary / "rows").iterdir())}
        (temporary / "rows" / RECORD).write_text(json.dumps({"files": files}) + "\n", encoding="utf-8")
        if folder.exists():  # a shorter part
            shutil.rmtree(folder)
        (temporary / "rows").rename(folder)
    finally:
        shutil.rmtree(temporary)
