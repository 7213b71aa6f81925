"""Sources: a hub id, local files or a demo corpus, all as one resumable sequence of rows, interleaved so that any
prefix has rows of all files (`datasets` interleaves too, but reads ahead in threads and by whole tables). Rows without
usable text are counted by reason. Mixing sources and tokenizing are the business of `text` and `chat`."""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetBuilder, DatasetInfo, IterableDataset, concatenate_datasets

from llmlab.data import demo, files
from llmlab.data.splits import Use, choose_splits, choose_subset
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, did_you_mean, reading, reason_of
from llmlab.settings.paths import expand, is_local, missing

TEXT_COLUMNS = ("text", "content", "document", "article", "story", "body", "raw_content", "code")
"""Columns taken for the text, in this order, where no column is named."""

PARTS = 8  # of one source that are read in turn
LOOK_AT = 100  # rows by which columns are recognized
CHECK_FROM = 1000  # rows after which a share of dropped rows means something


@dataclass
class Tally:
    """Counts of the documents and, by reason, of the dropped rows of a source."""

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
            problem = f"{self.dropped.total():,} of {self.rows:,} rows cannot be used ({reasons})"
            raise UserError(f"{name}: {problem}; fix them, or raise allow_dropped = {allowed:g}")


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """A source with all its columns."""

    name: str  # as the user wrote it
    rows: IterableDataset  # in a fixed order, with a `state_dict` to resume from and shards to distribute
    identity: dict[str, Any]  # plain values for a cache key, which change with the content
    splits: tuple[str, ...] = ("train",)  # those there are
    select: Callable[[str], IterableDataset] | None = None  # the rows with one column alone, which is faster to read
    size: int | None = None  # bytes on disk, about those of the text; None where unknown
    count: int | None = None  # rows; None where unknown

    def first(self) -> list[dict[str, Any]]:
        """Returns the rows by which formats and columns are recognized."""
        return list(itertools.islice(self.rows, LOOK_AT))


@dataclass(frozen=True, kw_only=True)
class TextSource(RowSource):
    """A source whose rows have their text in one column, and perhaps no other column."""

    column: str

    def texts(
        self, tally: Tally, allow_dropped: float = 1.0, rows: Iterable[dict[str, Any]] | None = None
    ) -> Iterator[str]:
        """Yields the text of each row, or of these, that has one, counting all; refuses too many that have none."""
        for row in self.rows if rows is None else rows:
            text = row.get(self.column)
            reason = _unusable(text) if self.column in row else f"without '{self.column}'"
            if reason is None:
                tally.documents += 1
                yield text
            else:
                tally.dropped[reason] += 1
                if tally.rows >= CHECK_FROM:
                    tally.check(self.name, allow_dropped)


def take_texts(texts: Iterator[str], characters: int) -> list[str]:
    """Returns the next texts, until they have so many characters."""
    batch, size = [], 0
    while size < characters and (text := next(texts, None)) is not None:
        batch.append(text)
        size += len(text)
    return batch


def _unusable(text: Any) -> str | None:
    """Returns why a value is no document, or None."""
    if not isinstance(text, str):
        return "empty" if text is None else "not text"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return "not valid Unicode"
    return None if text and not text.isspace() else "empty"


def load_text(source: DataSource, *, streaming: bool = False) -> TextSource:
    """Finds a text source and its text column; `streaming` reads a hub dataset without downloading it first."""
    found = load_rows(source, "text", streaming=streaming)
    column = choose_column(source, found.first())
    values = {"rows": found.select(column), "identity": {**found.identity, "column": column}}
    return TextSource(**{**vars(found), **values}, column=column)


def load_rows(source: DataSource, use: Use, *, streaming: bool = False, at_most: int | None = None) -> RowSource:
    """Finds a source; a hub dataset is downloaded unless `streaming`, or where it has more than `at_most` rows."""
    path = expand(source.name)
    if source.text_unit != "document" and not path.exists():
        raise UserError(f"{source.name}: text_unit = {source.text_unit} is for local text files")
    if source.name.startswith(demo.PREFIX):
        return _find_demo(source)
    if path.exists():
        return _find_local(source, path, use)
    if is_local(source.name):
        raise missing(source.name)
    return _find_hub(source, use, streaming, at_most)


def _find_demo(source: DataSource) -> RowSource:
    split = source.split or "train"
    shards = demo.demo_shards(source.name, split=split, size=source.subset)
    rows = IterableDataset.from_generator(_read_shards, gen_kwargs={"shards": shards, "read": demo.read_shard})
    identity = {"demo": source.name, "size": source.subset, "split": split, "version": demo.VERSION}
    known = {"identity": identity, "splits": demo.SPLITS, "size": sum(shard.size for shard in shards)}
    return RowSource(name=source.name, rows=rows, select=lambda column: rows, **known)


def _find_local(source: DataSource, path: Path, use: Use) -> RowSource:
    if path.is_dir() and _has_configs(path):
        with reading(f"{source.name}: README.md", "the description of a dataset"):
            described = _open_builder(str(path), source.subset, use).config.data_files or {}
        by_split = {name: [Path(file) for file in found] for name, found in described.items()}
    elif source.subset:
        problem = "a local path has no subsets unless its README.md says so (configs:)"
        raise UserError(f"{source.name} | {source.subset}: {problem}; name the file or folder itself")
    else:
        by_split = files.find_files(path)
    chosen = choose_splits(source.name, by_split, source.split, use)
    if any("[" in name for name in chosen):
        raise UserError(f"{source.name}: split = {source.split}: slices are for datasets of the hub")
    found = [file for name in chosen for file in by_split[name]]
    if source.text_unit != "document" and not all(files.format_of(file) == "txt" for file in found):
        raise UserError(f"{source.name}: text_unit = {source.text_unit} is for text files; these have rows")
    sizes = [sum(file.stat().st_size for file in by_split[name]) for name in chosen]
    if not sum(sizes):
        raise UserError(f"{source.name}: the file is empty")
    shards = [files.shards_of(by_split[name], source.text_unit) for name in chosen]

    def select(column: str | None) -> IterableDataset:
        options = [{"shards": each, "read": partial(files.read_shard, column=column)} for each in shards]
        return join_splits([IterableDataset.from_generator(_read_shards, gen_kwargs=o) for o in options], sizes, use)

    identity = {"files": [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in found]}
    if source.text_unit != "document":
        identity["text_unit"] = source.text_unit
    size = None if any(file.suffix.lower() in (".parquet", ".gz") for file in found) else sum(sizes)
    known = {"identity": identity, "splits": tuple(sorted(by_split)), "size": size, "count": files.count_rows(found)}
    return RowSource(name=source.name, rows=select(None), select=select, **known)


def join_splits(parts: list[IterableDataset], sizes: list[int], use: Use) -> "IterableDataset | Interleaved":
    """Returns the rows of several splits: of chat data interleaved in proportion to the splits' sizes."""
    if len(parts) == 1:
        return parts[0]
    if use == "text":  # shuffled when it is packed
        return concatenate_datasets(parts)
    return Interleaved(parts, sizes if len(sizes) == len(parts) and all(sizes) else None)


def _find_hub(source: DataSource, use: Use, streaming: bool, at_most: int | None) -> RowSource:
    try:
        builder = _open_builder(source.name, source.subset, use)
        info = builder.info.splits or {}
        splits = tuple(info or builder.config.data_files or ())
        chosen = choose_splits(source.name, splits, source.split, use) if splits else [source.split or "train"]
        sizes = [info[name].num_examples for name in chosen if name in info]
        is_known = len(sizes) == len(chosen)
        count = sum(sizes) if is_known else None
        if not streaming and not datasets.config.HF_HUB_OFFLINE and not any("[" in name for name in chosen):
            larger = at_most is not None and (count is None or count > at_most)
            streaming = larger or not _fits_disk(builder.info)
        if streaming:
            parts = [builder.as_streaming_dataset(name) for name in chosen]
        else:
            builder.download_and_prepare()
            loaded = [builder.as_dataset(name) for name in chosen]
            count = sum(map(len, loaded))
            parts = [data.to_iterable_dataset(num_shards=min(64, max(1, len(data)))) for data in loaded]
        rows = join_splits(parts, sizes, use)
        next(iter(rows), None)  # streaming datasets connect only here
    except UserError:
        raise
    except ConnectionError as error:
        problem = "there is no such local file or folder, and the Hugging Face hub cannot be reached"
        advice = "without a network use local files or demo/stories"
        raise UserError(f"{source.name}: {problem} ({reason_of(error)}); {advice}") from None
    except (OSError, ValueError) as error:  # not there, gated, no such subset, or the disk is full
        raise UserError(f"{source.name}: cannot be loaded: {reason_of(error)}") from None
    identity = {"hub": source.name, "subset": builder.config.name, "split": chosen, "content": builder.hash}
    identity["streamed"] = streaming  # files and tables have other shards, so another order
    size = sum(info[name].num_bytes for name in chosen) if is_known else None
    known = {"identity": identity, "splits": splits, "size": size, "count": count}
    return RowSource(name=source.name, rows=rows, select=lambda column: rows.select_columns([column]), **known)


def _open_builder(name: str, subset: str | None, use: Use) -> DatasetBuilder:
    try:
        return datasets.load_dataset_builder(name, subset)
    except ValueError:  # several subsets, none of them the default
        subsets = [] if subset else datasets.get_dataset_config_names(name)
        if len(subsets) < 2:
            raise
        return datasets.load_dataset_builder(name, choose_subset(name, subsets, use))


def _has_configs(folder: Path) -> bool:
    """Whether a folder is a copy of a hub dataset whose README.md lists the files of each split."""
    with suppress(FileNotFoundError):
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
        return head.startswith("---") and "\nconfigs:" in head
    return False


def _fits_disk(info: DatasetInfo) -> bool:
    """Whether a dataset can be downloaded, as far as its sizes are known."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    while not folder.exists():
        folder = folder.parent
    return (info.download_size or 0) + (info.dataset_size or 0) < shutil.disk_usage(folder).free


def choose_column(source: DataSource, rows: Iterable[dict[str, Any]]) -> str:
    """Returns the column that holds the text: the one named, else the one that the first rows make clear."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(str(name), set()).add(type(value))
    if not kinds:
        raise UserError(f"{source.name}: no usable text: it has no rows")
    found = f"columns found: {', '.join(kinds)}"
    if source.column is not None:
        if source.column not in kinds:
            near = did_you_mean(source.column, kinds)
            raise UserError(f"{source.name}: there is no column '{source.column}'{near} ({found})")
        return source.column
    if usual := next((name for name in TEXT_COLUMNS if str in kinds.get(name, ())), None):
        return usual
    if "messages" in kinds or "conversations" in kinds:
        raise UserError(f"{source.name}: these are conversations, for llmlab sft; text is expected here ({found})")
    textual = [name for name, types in kinds.items() if str in types and types <= {str, type(None)}]
    if len(textual) == 1:
        return textual[0]
    why = f"several could be ({', '.join(textual)})" if textual else "none holds text"
    raise UserError(f"{source.name}: cannot tell which column is the text: {why}; set column: ... ({found})")


def label_of(source: DataSource) -> str:
    """Returns the short name of a source in sample ids."""
    return "/".join(filter(None, (source.name, source.subset, source.split)))


def _read_shards(shards: list[Any], read: Callable[..., Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from read(shard)


class Interleaved:
    """All rows of some parts, once, in proportion to their weights (such as sizes; None are equal) until they end."""

    num_shards = 1

    def __init__(self, parts: Sequence[IterableDataset], weights: Sequence[float] | None = None):
        self.parts = list(parts)
        self.weights = list(weights or [1.0] * len(parts))
        self.load_state_dict({})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.load_state_dict(self.start)  # an abandoned iteration does not count
        taken, ended, states = self.taken, self.ended, self.states
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state or {})
        iterators = list(map(iter, self.parts))
        while not all(ended):
            left = (number for number, end in enumerate(ended) if not end)
            number = min(left, key=lambda each: (taken[each] + 0.5) / self.weights[each])
            states[number] = None
            row = next(iterators[number], None)
            if row is None:
                ended[number] = True
            else:
                taken[number] += 1
                yield row

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, which JSON can hold."""
        rows = zip(self.parts, self.states, self.taken, strict=True)
        states = [part.state_dict() if state is None and taken else state for part, state, taken in rows]
        return {"taken": list(self.taken), "ended": list(self.ended), "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets every iteration begin at a position; an empty one is the start."""
        self.start = state
        count = len(self.parts)
        self.taken = list(state.get("taken", [0] * count))
        self.ended = list(state.get("ended", [False] * count))
        self.states = list(state.get("states", [None] * count))  # of parts that were not read since


def spread(rows: IterableDataset) -> IterableDataset | Interleaved:
    """Returns the same rows in an order whose prefixes have rows of all parts of the source, not of its first file."""
    count = min(PARTS, rows.num_shards)
    return rows if count == 1 else Interleaved([rows.shard(count, index) for index in range(count)])
