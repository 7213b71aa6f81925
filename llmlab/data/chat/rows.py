"""The rows of a stage that trains on chat data: sources read, rendered, checked, held out and mixed, with a report.
What a row consists of is `makers.py`. Padding and packing are the trainer's. Rendered rows are cached, an Arrow file a
source; a shorter cache is a prefix of a longer one, so the result never depends on what is cached."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value, interleave_datasets
from pyarrow.compute import list_value_length
from tqdm.auto import tqdm

from llmlab.data.cache import Checksums, cache_folder, open_cached
from llmlab.data.chat.conversations import ConversationSource, OtherLabel
from llmlab.data.chat.makers import RowEncoder
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.sources import label_of, spread
from llmlab.data.splits import seeded_keys, text_hash
from llmlab.data.workers import map_batches
from llmlab.settings.data import DataSettings, DataSource
from llmlab.settings.errors import UserError, printable, reading
from llmlab.settings.files import read_json, write_atomically

COUNTED_ROWS = 20_000  # at most, evenly drawn, for the lengths of rows
LENGTHS_OF = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
BATCH = 512  # rows that are rendered together
ROWS, RECORD = "rows.arrow", "llmlab.json"
VERSION = 4  # of the rendered rows: raise it with every change that alters them
READ_AT_LEAST = 65_536  # rows of a source: so many are shuffled together, and a short run reads no fewer
SAMPLED_FROM = 8_192  # rows of a source, at least, among which `max_samples` are drawn
MARGIN = 0.1  # more rows are read than are needed: some are dropped

CHECKS = {  # columns of every rendered row beside the maker's
    "whole": Value("int64"),  # tokens before truncation
    "hash": Value("int64"),
    "lost": Value("bool"),  # truncated so far that there is nothing to learn
    "left_out": Value("bool"),  # of unpaired preferences, the label is the other one
    "dropped": Value("string"),  # why the row is unusable, or empty
    "problem": Value("string"),  # problem with the loss mask, or empty
}


@dataclass
class RowsReport:
    """What was read of a source."""

    name: str
    form: str  # the format of its rows
    share: float  # of the rows that are trained on
    rows: int  # read, usable or not
    trained_rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # sums over the training rows of the maker's `counts`
    dropped: Counter[str] = field(default_factory=Counter)  # unusable rows by reason
    lost: int = 0  # rows truncated so far that there is nothing to learn
    left_out: int = 0  # rows of unpaired preferences with the other label
    epochs: float | None = None  # of the run over its training rows, once they are known
    whole: bool = True  # whether all its rows were read, or only as many as the run needs
    count: int | None = None  # rows it has; None where unknown

    def record(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}

    def summary(self) -> str:
        """Returns one line for people."""
        parts = [f"{self.trained_rows:,} rows"]
        if not self.whole:
            parts.append(f"reads {self.rows:,} of {'more' if self.count is None else f'{self.count:,}'}")
        if "trained_tokens" in self.counts:
            parts.append(f"{self.counts['trained_tokens'] / max(self.counts['tokens'], 1):.0%} of tokens trained")
        counted = [
            (self.counts.get("prompt_cut"), "prompts truncated on the left"),
            (self.counts.get("cut"), "truncated"),
            (self.left_out, "with the other label left out"),
            (self.lost, "left out: no trained token left after truncation"),
            *((count, f"dropped: {reason}") for reason, count in self.dropped.most_common()),
        ]
        parts += [f"{count:,} {what}" for count, what in counted if count]
        return f"{self.name} ({self.form}): " + ", ".join(parts)


class Part(NamedTuple):
    """Rows of one source and their numbers in it, a report on it, and the splits that it has."""

    rows: Dataset
    numbers: np.ndarray
    report: RowsReport
    splits: tuple[str, ...]

    def select(self, chosen: np.ndarray) -> "Part":
        return self._replace(rows=self.rows.select(chosen), numbers=self.numbers[chosen])


@dataclass(frozen=True)
class Rows:
    """Training and validation rows, and a report for each source; `validation` is None where nothing is held out."""

    train: Dataset
    validation: Dataset | None
    reports: list[RowsReport]
    held_out: Sequence[Part] = ()

    def origins(self) -> Iterator[tuple[np.ndarray, str, int]]:
        """Yields the tokens of each validation row, the name of its source and its number there, from 1."""
        for part in self.held_out:
            for ids, number in zip(part.rows["input_ids"], part.numbers, strict=True):
                yield np.array(ids), part.report.name, int(number) + 1

    def set_epochs(self, epochs: float) -> None:
        """Sets the epochs over each source, given those over the mixture."""
        for report in self.reports:
            report.epochs = round(epochs * len(self.train) * report.share / report.trained_rows, 3)

    def summary(self) -> str:
        """Returns a line for each source, and how many rows there are to validate with."""
        lines = [report.summary() for report in self.reports]
        return "\n".join([*lines, f"validation: {len(self.validation or ()):,} rows"])

    def record(self) -> dict[str, Any]:
        sources = [report.record() for report in self.reports]
        return {"sources": sources, "validation_rows": len(self.validation or ())}


def build_rows(
    settings: DataSettings,
    maker: RowEncoder,
    *,
    seed: int,
    allow_truncated: float = 0.05,
    validation_rows: int | None = None,
    max_samples: int | None = None,
    rows_needed: int | None = None,
    rows_before: Sequence[int] | None = None,
) -> Rows:
    """Builds and checks the rows that the settings describe: sources mixed by weight, until each was used whole. Of
    sources larger than `rows_needed` (None: all) or `max_samples` only the beginning is read, of a resumed run as many
    rows as before (`rows_before`)."""
    builder = _Builder(settings, maker, allow_truncated)
    fraction = settings.validation_fraction if settings.validation_datasets is None else 0.0
    weights = [source.weight for source in settings.datasets]
    validation_read = _rows_to_read(1.0, validation_rows, None)
    parts, held_out = [], []
    for number, source in enumerate(settings.datasets):
        share = source.weight / sum(weights)
        needed = _rows_to_read(share / (1 - fraction), rows_needed, max_samples)
        part = builder.read(source, needed if rows_before is None else rows_before[number], share)
        if fraction and "validation" in part.splits and source.split != "validation":
            own_split = source.model_copy(update={"split": "validation"})
            held_out.append(builder.read(own_split, validation_read))
        elif fraction:
            limit = None if validation_rows is None else math.ceil(share * validation_rows)
            part, validation_part = _hold_out(part, fraction, seed, limit, source.name)
            held_out.append(validation_part)
        part.report.trained_rows = len(part.rows)
        part.report.counts = {name: int(np.sum(part.rows[name][:])) for name in maker.counts}
        parts.append(part)
    if settings.validation_datasets is not None:
        held_out = [builder.read(source, validation_read) for source in settings.validation_datasets]
    validation = _mix(held_out, [len(part.rows) for part in held_out], maker, seed) if held_out else None
    if validation is not None and validation_rows:
        validation = validation.select(range(min(len(validation), validation_rows)))
    train = _mix(parts, weights, maker, seed)
    if max_samples is not None and len(train) > max_samples:
        train = train.shuffle(seed=seed).select(range(max_samples))
    return Rows(train, validation, [part.report for part in parts], held_out)


def _rows_to_read(share: float, rows_needed: int | None, max_samples: int | None) -> int | None:
    """Returns how many rows of a source to read for its share of these; None is all."""
    counts = ((rows_needed, READ_AT_LEAST), (max_samples, SAMPLED_FROM))
    limits = [(share * count, least) for count, least in counts if count is not None]
    return min((max(least, math.ceil(count + MARGIN * count)) for count, least in limits), default=None)


def _mix(parts: list[Part], weights: Sequence[float], maker: RowEncoder, seed: int) -> Dataset:
    """Returns the rows of several sources in these proportions, every source used whole at least once."""
    rows = [part.rows.select_columns(list(maker.columns)) for part in parts]
    if len(rows) == 1:
        return rows[0]
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(rows, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _hold_out(part: Part, fraction: float, seed: int, limit: int | None, name: str) -> tuple[Part, Part]:
    """Splits off a held-out set of about `limit` rows by a seeded hash, so that duplicates stay on one side."""
    keys = seeded_keys(np.array(part.rows["hash"], np.int64).view(np.uint64), seed)
    ordered = np.sort(keys)
    count = math.ceil(fraction * len(keys))
    held_out = keys <= ordered[count - 1]
    validates = keys <= ordered[min(count, limit or count) - 1]
    if held_out.all():
        problem = f"its {len(keys):,} usable rows are too few to hold out validation_fraction = {fraction:g}"
        raise UserError(f"{name}: {problem}; set validation_fraction=0, or name validation_datasets")
    return part.select(np.flatnonzero(~held_out)), part.select(np.flatnonzero(validates))


class _Builder(NamedTuple):
    """Reads one source at a time."""

    settings: DataSettings
    maker: RowEncoder
    allow_truncated: float

    def read(self, source: DataSource, at_most: int | None, share: float = 1.0) -> Part:
        """Returns the usable ones of at most so many rows of a source (None: all)."""
        found = self.maker.open(source, at_most)
        tokenizer = self.maker.tokenizer
        key = [VERSION, found.identity, found.form.columns, self.maker.identity]
        key += [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map)]
        folder = cache_folder(self.settings.cache_dir, key, "rows-")
        rows, whole = open_rows(found, folder, at_most, _MakeRows(found, self.maker), self.settings.num_proc)
        report = RowsReport(label_of(source), found.form.name, share, len(rows), whole=whole, count=found.count)
        checks = {name: np.array(rows[name][:]) for name in CHECKS}
        self._check(report, checks)
        unusable = (checks["dropped"] != "") | checks["lost"] | checks["left_out"]
        usable = np.flatnonzero(~unusable)
        return Part(rows.select(usable), usable, report, found.splits)

    def _check(self, report: RowsReport, checks: dict[str, np.ndarray]) -> None:
        """Completes the report, and refuses a source with too many unusable rows or with a wrong row."""
        dropped, problem, lost, whole = (checks[name] for name in ("dropped", "problem", "lost", "whole"))
        report.dropped.update(str(reason) for reason in dropped[dropped != ""])
        report.lost, report.left_out = int(lost.sum()), int(checks["left_out"].sum())
        unusable, rows = report.dropped.total(), report.rows - report.left_out
        if not rows:
            raise UserError(f"{report.name}: all of its {report.rows:,} rows have another label than only_label")
        if unusable == rows or unusable > self.settings.allow_dropped * rows:
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in report.dropped.most_common(5))
            advice = f"fix them, or raise allow_dropped = {self.settings.allow_dropped:g}"
            which = f"{unusable:,} of {rows:,} rows cannot be used, the first is row {np.argmax(dropped != '') + 1}"
            raise UserError(f"{report.name}: {which}: {reasons}; {advice}")
        wrong = np.flatnonzero(problem != "")
        if len(wrong):
            which = f"row {wrong[0] + 1} (and {len(wrong) - 1:,} more of {report.rows:,}): {problem[wrong[0]]}"
            advice = "use a chat template whose generation block covers the end of turn, or set chat_template=chatml"
            raise UserError(f"{report.name}: {which}; {advice}")
        if report.lost > self.allow_truncated * report.rows:
            first, fits = np.argmax(lost), f"95 % of the rows fit into {int(np.percentile(whole, 95)):,}"
            which = f"{report.lost:,} of {report.rows:,} rows have nothing left to train after truncation"
            limit = f"{self.maker.limit} = {getattr(self.maker, self.maker.limit)}"
            where = f"to {limit}, the first is row {first + 1} with {whole[first]:,} tokens"
            advice = f"{fits}, or raise allow_truncated = {self.allow_truncated:g}"
            raise UserError(f"{report.name}: {which} {where}; {advice}")


def open_rows(
    source: ConversationSource, folder: Path, at_most: int | None, render: "_MakeRows", num_proc: int | None = 1
) -> tuple[Dataset, bool]:
    """Returns the rows of a source (None: all) as `render` makes them of JSON text, and whether it has no more."""

    def write(shorter: Dataset | None) -> tuple[Dataset, bool]:
        rows = iter(spread(source.rows))
        limited = islice(rows, at_most)
        batches = iter(lambda: [json.dumps(row, default=str) for row in islice(limited, BATCH)], [])
        folder.mkdir(exist_ok=True)
        path = folder / f"{ROWS}.writing"  # another run may have mapped the shorter file
        bar = tqdm(desc=f"rendering {printable(source.name)}", total=at_most, unit=" rows", disable=None)
        with bar, pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, render.schema) as writer:
            for table in map_batches(render, batches, num_proc):
                writer.write_table(table)
                bar.update(len(table))
        sums = Checksums()
        sums.update(np.memmap(path, np.uint8, "r"))
        path.replace(folder / ROWS)
        record = {"rows": sums.record(), "whole": at_most is None or next(rows, None) is None}
        write_atomically(folder / RECORD, json.dumps(record) + "\n")
        return Dataset.from_file(str(folder / ROWS)), record["whole"]

    rows, whole = open_cached(folder, source.name, at_most, _read_cache, write)
    return (rows, whole) if at_most is None or len(rows) <= at_most else (rows.select(range(at_most)), False)


def _read_cache(folder: Path) -> tuple[Dataset, bool]:
    record = read_json(folder / RECORD)
    with reading(folder / RECORD, "the record of rendered rows"):
        sums, whole = Checksums(**record["rows"]), record["whole"]
    sums.verify(folder / ROWS)
    return Dataset.from_file(str(folder / ROWS)), whole


class _MakeRows:
    """Makes a table of rows that are JSON text."""

    def __init__(self, source: ConversationSource, maker: RowEncoder):
        self.read = replace(source, rows=None, select=None).read  # the rows are not pickled for worker processes
        self.maker = maker
        empty = {name: [] if isinstance(kind, List) else None for name, kind in maker.columns.items()}
        checks = {"whole": 0, "lost": False, "left_out": False, "dropped": "", "problem": ""}
        self.empty = empty | dict.fromkeys(maker.counts, 0) | checks
        counts = {name: Value("int64") for name in maker.counts}
        self.schema = Features({**maker.columns, **counts, **CHECKS}).arrow_schema

    def __call__(self, texts: list[str]) -> pyarrow.Table:
        return pyarrow.Table.from_pylist(list(map(self._make, texts)), self.schema)

    def _make(self, text: str) -> dict[str, Any]:
        row = {**self.empty, "hash": text_hash(text) - 2**63}  # Arrow's writer takes no integer above 63 bits
        try:
            return row | self.maker.make(self.read(json.loads(text)))
        except OtherLabel:
            return row | {"left_out": True}
        except UnusableRow as reason:
            return row | {"dropped": str(reason)}


def row_lengths(rows: Any) -> tuple[float, int] | None:
    """Returns the mean and the largest number of tokens of a dataset's rows, or None where they are not known."""
    names = [name for name in getattr(rows, "column_names", None) or () if name in LENGTHS_OF]
    if not names:
        return None
    some = rows.select(range(0, len(rows), len(rows) // COUNTED_ROWS + 1)).select_columns(names).with_format("arrow")
    tables = list(some.iter(batch_size=1000))
    tokens = {name: np.concatenate([list_value_length(table[name]) for table in tables]) for name in names}
    if "input_ids" in tokens:
        return float(tokens["input_ids"].mean()), int(tokens["input_ids"].max())
    if "chosen_ids" not in tokens:
        return None
    prompts, answers = tokens.get("prompt_ids", 0), (tokens["chosen_ids"], tokens["rejected_ids"])
    return float((prompts + sum(answers) / 2).mean()), int((prompts + np.maximum(*answers)).max())
