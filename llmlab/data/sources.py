"""Text sources: a hub id, local files or a demo corpus, all as one resumable sequence of rows with a text column.

No row disappears unseen: what is not usable text is tallied by reason.  Mixing, tokenizing and packing are done
elsewhere.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.data import demo, files
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.paths import expand, is_local, missing

if TYPE_CHECKING:
    from datasets import IterableDataset

TEXT_COLUMNS = ("text", "content", "document", "article", "story", "body", "raw_content", "code")
"""Columns taken for the text, in this order, where no column is named."""

LOOK_AT = 100  # rows from which columns are recognized
CHECK_FROM = 1000  # rows after which a share of dropped rows means something


@dataclass
class Tally:
    """How many rows of a source gave a document, and why the others did not."""

    documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return self.documents + self.dropped.total()

    def check(self, name: str, allowed: float) -> None:
        """Raises UserError where no row was usable, or more than the allowed share was not."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        if not self.documents:
            raise UserError(f"{name}: no usable text in {self.rows:,} rows" + (f" ({reasons})" if reasons else ""))
        if self.dropped.total() > allowed * self.rows:
            raise UserError(
                f"{name}: {self.dropped.total():,} of {self.rows:,} rows cannot be used ({reasons}); "
                f"mend them, or raise allow_dropped = {allowed:g}"
            )


@dataclass(frozen=True)
class TextSource:
    """A source that was found and understood.

    Attributes:
        name: as the user wrote it.
        rows: the rows, in a fixed order, with a `state_dict` to resume from and shards to distribute.
        column: the column that holds the text.
        identity: what another content would change; plain values for a cache key.
        size: bytes on disk, about those of the text; None where unknown.
        splits: the splits that the source has.
    """

    name: str
    rows: "IterableDataset"
    column: str
    identity: dict[str, Any]
    size: int | None = None
    splits: tuple[str, ...] = ("train",)

    def texts(self, tally: Tally, allow_dropped: float = 1.0) -> Iterator[str]:
        """Yields the documents once, counting every row; stops early where too many are dropped."""
        return usable_texts(self.rows, self.column, tally, self.name, allow_dropped)


def usable_texts(
    rows: Iterable[dict[str, Any]], column: str, tally: Tally, name: str, allow_dropped: float
) -> Iterator[str]:
    """Yields the text of each row that has one, counting every row.

    Raises:
        UserError: more than the allowed share of at least a thousand rows had to be dropped.
    """
    for row in rows:
        text = row.get(column)
        reason = _unusable(text) if column in row else f"without '{column}'"
        if reason is None:
            tally.documents += 1
            yield text
        else:
            tally.dropped[reason] += 1
            if tally.rows >= CHECK_FROM:
                tally.check(name, allow_dropped)


def _unusable(text: Any) -> str | None:
    if text is None or text == "" or (isinstance(text, str) and text.isspace()):
        return "empty"
    if not isinstance(text, str):
        return "not text"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return "not valid Unicode"
    return None


@dataclass(frozen=True)
class RowSource:
    """A source that was found, its rows not yet understood.

    Attributes:
        name: as the user wrote it.
        rows: all columns of the rows, in a fixed order, with a `state_dict` to resume from and shards to distribute.
        identity: what another content would change; plain values for a cache key.
        splits: the splits that the source has.
        size: bytes on disk, about those of the text; None where unknown.
        select: returns the rows with one column alone, which some files are read faster for.
    """

    name: str
    rows: "IterableDataset"
    identity: dict[str, Any]
    splits: tuple[str, ...]
    size: int | None
    select: Callable[[str], "IterableDataset"]

    def first(self) -> list[dict[str, Any]]:
        """Returns the rows that formats and columns are recognized from."""
        return list(itertools.islice(self.rows, LOOK_AT))


def load_rows(source: DataSource, *, streaming: bool = False, split: str | None = None) -> RowSource:
    """Finds a source, whatever its rows are.

    Args:
        source: a hub id, a file (txt, json, jsonl, csv, parquet, each also .gz), a folder of them, or `demo/...`.
        streaming: read a hub data set as it comes instead of downloading it first; local files are always read so.
        split: another split than the source names.

    Raises:
        UserError: there is no such source, or it cannot be reached or read.
    """
    split = split or source.split
    path = expand(source.name)
    if source.name.startswith(demo.PREFIX):
        return _find_demo(source, split)
    if path.exists():
        return _find_local(source, path, split)
    if is_local(source.name):
        raise missing(source.name)
    return _find_hub(source, split, streaming)


def load_text(source: DataSource, *, streaming: bool = False, split: str | None = None) -> TextSource:
    """Finds a text source and its text column.

    Args:
        source: a hub id, a file (txt, json, jsonl, csv, parquet, each also .gz), a folder of them, or `demo/...`.
        streaming: read a hub data set as it comes instead of downloading it first; local files are always read so.
        split: another split than the source names.

    Raises:
        UserError: there is no such source, it cannot be reached or read, or its text column is not clear.
    """
    found = load_rows(source, streaming=streaming, split=split)
    column = choose_column(source, found.first())
    identity = found.identity if "demo" in found.identity else {**found.identity, "column": column}
    return TextSource(source.name, found.select(column), column, identity, found.size, found.splits)


def _find_demo(source: DataSource, split: str) -> RowSource:
    from datasets import IterableDataset

    shards = demo.demo_shards(source.name, split=split, size=source.subset)
    rows = IterableDataset.from_generator(_demo_rows, gen_kwargs={"shards": shards})
    identity = {"demo": source.name, "size": source.subset, "split": split, "version": demo.VERSION}
    return RowSource(source.name, rows, identity, demo.SPLITS, sum(shard.size for shard in shards), lambda _: rows)


def _find_local(source: DataSource, path: Path, split: str) -> RowSource:
    from datasets import IterableDataset

    if source.subset:
        raise UserError(
            f"{source.name} | {source.subset}: a local path has no subsets; name the file or folder itself"
        )
    found, splits = files.find_files(path, split)
    if sum(file.stat().st_size for file in found) == 0:
        raise UserError(f"{source.name}: the file is empty")
    shards = files.shards_of(found)

    def select(column: str | None) -> IterableDataset:
        return IterableDataset.from_generator(_file_rows, gen_kwargs={"shards": shards, "column": column})

    identity = {"files": [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in found]}
    plain = all(shard.format in ("txt", "json", "jsonl", "csv") and not shard.path.endswith(".gz") for shard in shards)
    size = sum(file.stat().st_size for file in found) if plain else None
    return RowSource(source.name, select(None), identity, tuple(sorted(splits)), size, select)


def _find_hub(source: DataSource, split: str, streaming: bool) -> RowSource:
    import datasets

    try:
        data = datasets.load_dataset(source.name, source.subset, split=split, streaming=streaming)
        rows = data if streaming else data.to_iterable_dataset(num_shards=min(64, max(1, len(data))))
        next(iter(rows), None)  # a stream is reached only now
    except ConnectionError as error:
        raise UserError(
            f"{source.name}: there is no such local file or folder, and the Hugging Face hub cannot be reached "
            f"({_first_line(error)}); without a network use local files or demo/stories"
        ) from None
    except (FileNotFoundError, ValueError) as error:  # not there, gated, or no such subset or split
        raise UserError(f"{source.name}: cannot be loaded: {_first_line(error)}") from None
    except OSError as error:  # most of all a disk that is too small
        hint = "" if streaming else "; streaming: true reads it without a copy on disk"
        raise UserError(f"{source.name}: cannot be loaded: {_first_line(error)}{hint}") from None
    identity = {
        "hub": source.name,
        "subset": source.subset,
        "split": split,
        "content": None if streaming else data._fingerprint,
    }
    splits = tuple(data.info.splits or (split,))
    return RowSource(source.name, rows, identity, splits, None, lambda column: rows.select_columns([column]))


def choose_column(source: DataSource, rows: Iterable[dict[str, Any]]) -> str:
    """Returns the column that holds the text, judged by the first rows.

    Raises:
        UserError: there are no rows, the named column does not exist, or no or several columns could be the text.
    """
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(str(name), set()).add(type(value))
    if not kinds:
        raise UserError(f"{source.name}: no usable text: it has no rows")
    found = f"columns found: {', '.join(kinds)}"
    if source.column is not None:
        if source.column not in kinds:
            raise UserError(
                f"{source.name}: there is no column '{source.column}'{did_you_mean(source.column, kinds)} ({found})"
            )
        return source.column
    textual = [name for name, types in kinds.items() if str in types and types <= {str, type(None)}]
    named = next((name for name in TEXT_COLUMNS if str in kinds.get(name, ())), None)
    if named is not None:
        return named
    if "messages" in kinds or "conversations" in kinds:
        raise UserError(f"{source.name}: these are conversations, for llmlab sft; text is expected here ({found})")
    if len(textual) == 1:
        return textual[0]
    why = f"several could be ({', '.join(textual)})" if textual else "none holds text"
    raise UserError(f"{source.name}: cannot tell which column is the text: {why}; set column: ... ({found})")


def _demo_rows(shards: list[demo.DemoShard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from demo.read_shard(shard)


def _file_rows(shards: list[files.Shard], column: str | None) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from files.read_shard(shard, column)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
