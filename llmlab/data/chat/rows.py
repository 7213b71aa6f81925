"""Rows of a stage that learns from conversations: sources read, rendered, proven, held out, mixed, and a report.

What a row is made of is its maker's business: `instructions.py` and `preferences.py` have one each.  Padding and
packing are the trainer's.
"""

import hashlib
import json
import math
import os
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, Features, List, Value, interleave_datasets
from transformers import PreTrainedTokenizerBase

from llmlab.data.cache import cache_folder, cores
from llmlab.data.chat.conversations import ConversationSource, OtherLabel
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.chat.rendered import open_rendered
from llmlab.data.hashing import seeded_keys, text_hash
from llmlab.data.sources import label_of
from llmlab.settings.data import DataSettings, DataSource
from llmlab.settings.errors import UserError, printable

VERSION = 3  # of the rendered rows: raise it with every change that alters them
READ_AT_LEAST = 65_536  # rows of a source: so many are shuffled together, and a short run reads no fewer
MARGIN = 0.1  # more rows are read than are needed: some are dropped
WORTH_PROCESSES = 5_000  # rows from which rendering in several processes pays


class RowMaker(Protocol):
    """Turns conversations into rows.

    Attributes:
        columns: what the trainer gets, with their types.
        counts: further whole numbers of each row, whose sums the report tells; `cut` is among them: whether the row
            lost something to a length limit.
        limit: the setting that says how long a row may be, for messages.
        identity: what another value of would change the rows; plain values for a cache key.
        tokenizer: what renders them.
    """

    columns: Features
    counts: Sequence[str]
    limit: str
    identity: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase

    def open(self, named: DataSource, split: str | None = None, at_most: int | None = None) -> ConversationSource:
        """Finds a source, of which so many rows will be read, and recognizes its format."""

    def make(self, conversation: dict[str, Any]) -> dict[str, Any]:
        """Returns columns and counts, `problem` (what is wrong with the row, or empty) and `lost` (whether it is left
        with nothing to learn).

        Raises:
            UnusableRow: it cannot be made a row of.
        """


@dataclass
class RowsReport:
    """What a source gave.

    Attributes:
        name: and its subset.
        form: the format of its rows.
        share: of the rows that are trained on.
        rows: read.
        trained_rows: left to train on.
        counts: sums over the training rows of what the maker counts.
        dropped: rows that could not be used, by reason.
        lost: rows that were left with nothing to learn by a length limit.
        left_out: rows of unpaired preferences whose label was not asked for.
        passes: how many times training goes through them; None until it is known.
        whole: whether all rows were read, or only as many as the run needs.
        count: rows that the source has; None where unknown.
    """

    name: str
    form: str
    share: float
    rows: int
    trained_rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    left_out: int = 0
    passes: float | None = None
    whole: bool = True
    count: int | None = None

    def record(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**asdict(self), "dropped": dict(self.dropped)}

    def summary(self) -> str:
        """Returns one line for people."""
        parts = [f"{self.trained_rows:,} rows"]
        if not self.whole:
            parts.append(f"reads {self.rows:,} of {'more' if self.count is None else f'{self.count:,}'}")
        if "trained_tokens" in self.counts:
            parts.append(f"{self.counts['trained_tokens'] / max(self.counts['tokens'], 1):.0%} of tokens trained")
        if self.counts.get("prompt_cut"):
            parts.append(f"{self.counts['prompt_cut']:,} prompts cut from the left")
        if self.counts.get("cut"):
            parts.append(f"{self.counts['cut']:,} cut")
        if self.left_out:
            parts.append(f"{self.left_out:,} of the other label left out")
        if self.lost:
            parts.append(f"{self.lost:,} left out: cut to nothing")
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.most_common()]
        return f"{self.name} ({self.form}): " + ", ".join(parts)


@dataclass(frozen=True)
class Rows:
    """Training and validation rows, and a report for each source; `validation` is None where nothing is held out."""

    train: Dataset
    validation: Dataset | None
    reports: list[RowsReport]

    def went_through(self, times: float) -> None:
        """Notes in the reports how often each source is gone through, when the mixture is so many times."""
        for report in self.reports:
            report.passes = round(times * len(self.train) * report.share / report.trained_rows, 3)

    def summary(self) -> str:
        """Returns what went in, one line a source, and how many rows validate."""
        held = f"validation: {0 if self.validation is None else len(self.validation):,} rows"
        return "\n".join([*(report.summary() for report in self.reports), held])

    def record(self) -> dict[str, Any]:
        """Returns plain values for the run's record."""
        held = 0 if self.validation is None else len(self.validation)
        return {"sources": [report.record() for report in self.reports], "validation_rows": held}


def build_rows(
    settings: DataSettings,
    maker: RowMaker,
    *,
    seed: int,
    allow_truncated: float = 0.05,
    validation_rows: int | None = None,
    max_samples: int | None = None,
    rows_needed: int | None = None,
    rows_before: Sequence[int] | None = None,
) -> Rows:
    """Builds the rows that the settings describe, and proves them.

    Sources of any formats are mixed by their weights: shares of rows, drawn until every source was used whole.

    Args:
        settings: sources, weights, validation, cache.
        maker: makes the rows.
        seed: of the held-out rows and of mixing.
        allow_truncated: share of a source's rows that may be left with nothing to learn by a length limit.
        validation_rows: rows to validate with at most.
        max_samples: training rows at most, drawn by the seed.
        rows_needed: rows that the whole run trains on; larger sources are read only as far. None reads them whole.
        rows_before: rows of each source that the run to resume has read: it goes on with the same.

    Raises:
        UserError: a source is missing or unreadable, too many of its rows are unusable, or a row is wrong: it names
            the row and what to do.
    """
    builder = _Builder(settings, maker, seed, allow_truncated, validation_rows or 2**62)
    weights = np.array([source.weight for source in settings.datasets])
    parts, held, reports = [], [], []
    needed = min((n for n in (rows_needed, max_samples) if n is not None), default=None)
    for number, (named, share) in enumerate(zip(settings.datasets, weights / weights.sum(), strict=True)):
        # the share that is held out, not how much of it validates: that must not decide what is trained on
        at_most = None if needed is None else builder.rows_for(share * needed / (1 - builder.held_out))
        if rows_before is not None:
            at_most = rows_before[number]
        train, validation, report = builder.part(named, float(share), at_most)
        parts.append(train)
        reports.append(report)
        held += [] if validation is None else [validation]
    if settings.validation_datasets is not None:
        held = [builder.validation(named) for named in settings.validation_datasets]
    validation = None
    if held:
        every = builder.mix(held, [len(rows) for rows in held])
        validation = every.select(range(min(len(every), validation_rows or len(every))))
    train = builder.mix(parts, list(weights))
    if max_samples is not None and len(train) > max_samples:
        train = train.shuffle(seed=seed).select(range(max_samples))
    return Rows(train, validation, reports)


@dataclass(frozen=True)
class _Builder:
    """What every source is built with."""

    settings: DataSettings
    maker: RowMaker
    seed: int
    allow_truncated: float
    validation_rows: int

    @property
    def held_out(self) -> float:
        """The share of a source that is not trained on."""
        return self.settings.validation_fraction if self.settings.validation_datasets is None else 0.0

    def rows_for(self, needed: float) -> int:
        """Returns how many rows of a source to read for so many that are needed."""
        return max(READ_AT_LEAST, math.ceil(needed + MARGIN * needed))

    def validation(self, named: DataSource, split: str | None = None) -> Dataset:
        """Returns the rows of a source that is there for validation."""
        at_most = None if self.validation_rows == 2**62 else self.rows_for(self.validation_rows)
        return self.rows(named, split=split, at_most=at_most)[0]

    def part(self, named: DataSource, share: float, at_most: int | None) -> tuple[Dataset, Dataset | None, RowsReport]:
        """Returns a source's training rows, its held-out rows where there are any, and its report."""
        train, report, source = self.rows(named, share, at_most=at_most)
        validation = None
        fraction = self.settings.validation_fraction
        if self.settings.validation_datasets is None and fraction > 0:
            if "validation" in source.splits and named.split != "validation":
                validation = self.validation(named, "validation")
            else:
                train, validation = self._hold_out(named, train, math.ceil(share * self.validation_rows))
        report.trained_rows = len(train)
        report.counts = {name: int(np.sum(train[name][:])) for name in self.maker.counts}
        return train, validation, report

    def rows(
        self, named: DataSource, share: float = 1.0, split: str | None = None, at_most: int | None = None
    ) -> tuple[Dataset, RowsReport, ConversationSource]:
        """Returns the usable rows of a source, after proving them."""
        source = self.maker.open(named, split, at_most)
        rendered, whole = self._rendered(source, at_most)
        report = RowsReport(label_of(named), source.form.name, share, len(rendered), whole=whole, count=source.count)
        names = ("dropped", "problem", "lost", "left_out")
        dropped, problems, lost, left_out = (np.array(rendered[name][:]) for name in names)
        report.dropped.update(str(reason) for reason in dropped[dropped != ""])
        report.lost, report.left_out = int(lost.sum()), int(left_out.sum())
        self._check_dropped(report, dropped)
        self._check_problems(report, problems)
        self._check_lost(report, lost, np.array(rendered["whole"][:]))
        return rendered.select(np.flatnonzero((dropped == "") & ~lost & ~left_out)), report, source

    def mix(self, parts: list[Dataset], weights: list[float]) -> Dataset:
        """Returns the rows of several sources in these proportions, every source used whole at least once."""
        parts = [part.select_columns(list(self.maker.columns)) for part in parts]
        if len(parts) == 1:
            return parts[0]
        shares = list(np.array(weights, float) / np.sum(weights))
        return interleave_datasets(parts, probabilities=shares, seed=self.seed, stopping_strategy="all_exhausted")

    def _check_dropped(self, report: RowsReport, dropped: np.ndarray) -> None:
        count, rows = report.dropped.total(), report.rows - report.left_out
        if not rows:
            raise UserError(f"{report.name}: all of its {report.rows:,} rows have another label than only_label")
        if count == rows or count > self.settings.allow_dropped * rows:
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in report.dropped.most_common(5))
            first = int(np.flatnonzero(dropped != "")[0]) + 1 if count else 0
            raise UserError(
                f"{report.name}: {count:,} of {rows:,} rows cannot be used, the first is row {first}: "
                f"{reasons}; mend them, or raise allow_dropped = {self.settings.allow_dropped:g}"
            )

    def _check_problems(self, report: RowsReport, problems: np.ndarray) -> None:
        wrong = np.flatnonzero(problems != "")
        if len(wrong):
            raise UserError(
                f"{report.name}: row {int(wrong[0]) + 1} (and {len(wrong) - 1:,} more of {report.rows:,}): "
                f"{problems[wrong[0]]}; use a chat template that marks the assistant's turns whole, or set "
                "chat_template=chatml"
            )

    def _check_lost(self, report: RowsReport, lost: np.ndarray, lengths: np.ndarray) -> None:
        if report.lost > self.allow_truncated * report.rows:
            first = int(np.flatnonzero(lost)[0])
            enough = int(np.percentile(lengths, 95))
            raise UserError(
                f"{report.name}: {report.lost:,} of {report.rows:,} rows have nothing left to train after cutting to "
                f"{self.maker.limit}, the first is row {first + 1} with {int(lengths[first]):,} tokens; "
                f"95 % of the rows fit into {enough:,}, or raise allow_truncated = {self.allow_truncated:g}"
            )

    def _hold_out(self, named: DataSource, rows: Dataset, limit: int) -> tuple[Dataset, Dataset]:
        """Splits by a seeded hash of the rows, so that equal rows stay on one side; about `limit` of them validate.

        What is trained on does not depend on how many rows validate.
        """
        keys = seeded_keys(np.array(rows["hash"], np.int64).view(np.uint64), self.seed)
        wanted = math.ceil(self.settings.validation_fraction * len(rows))
        ordered = np.sort(keys)
        held, used = keys <= ordered[wanted - 1], keys <= ordered[min(wanted, limit) - 1]
        if held.all():
            raise UserError(
                f"{named.name}: its {len(rows):,} usable rows are too few to hold out validation_fraction = "
                f"{self.settings.validation_fraction:g}; set validation_fraction=0, or name validation_datasets"
            )
        return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(used))

    def _rendered(self, source: ConversationSource, at_most: int | None) -> tuple[Dataset, bool]:
        """Returns rows of a source as tokens, from the cache where the same was rendered before, and whether all."""
        material = {
            "version": VERSION,
            "source": source.identity,
            "column": source.column,
            "tokenizer": _tokenizer_identity(self.maker.tokenizer),
            **self.maker.identity,
        }
        key = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:24]
        folder = cache_folder(self.settings.cache_dir) / f"rows-{key}"
        return open_rendered(source, folder, at_most, lambda texts: self._render(source, texts))

    def _render(self, source: ConversationSource, texts: list[str]) -> Dataset:
        raw = Dataset.from_dict({"row": texts})
        counts = {name: Value("int64") for name in self.maker.counts}
        about = {"whole": Value("int64"), "hash": Value("int64"), "lost": Value("bool"), "left_out": Value("bool")}
        # Arrow's writer takes no Python integer above 63 bits: hashes are shifted
        environment, variables = os.environ, dict(os.environ)
        try:
            return raw.map(
                _MakeRow(source, self.maker),
                remove_columns="row",
                new_fingerprint=uuid.uuid4().hex,  # else it hashes the maker, tokenizer and all; the cache is ours
                features=Features({**self.maker.columns, **counts, **about, **_TEXTS}),
                num_proc=(self.settings.num_proc or cores()) if len(raw) >= WORTH_PROCESSES else None,
                desc=f"Rendering {printable(source.name)}" if sys.stderr.isatty() else None,
            )
        finally:
            # with several processes `datasets` leaves a copy in its place, and a variable set
            os.environ = environment  # noqa: B003
            os.environ.clear()
            os.environ.update(variables)


_TEXTS = {"dropped": Value("string"), "problem": Value("string")}


class _MakeRow:
    """Makes one row, which comes as JSON text since rows of one file may have different types."""

    def __init__(self, source: ConversationSource, maker: RowMaker):
        self.read = source.read
        self.maker = maker

    def __call__(self, example: dict[str, str]) -> dict[str, Any]:
        columns = {name: [] if isinstance(kind, List) else None for name, kind in self.maker.columns.items()}
        values: dict[str, Any] = columns | dict.fromkeys(self.maker.counts, 0)
        values |= {
            "whole": 0,
            "hash": text_hash(example["row"]) - 2**63,
            "lost": False,
            "left_out": False,
            "dropped": "",
        }
        values |= {"problem": ""}
        try:
            return values | self.maker.make(self.read(json.loads(example["row"])))
        except OtherLabel:
            return {**values, "left_out": True}
        except UnusableRow as reason:
            return {**values, "dropped": str(reason)}


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what changes when a tokenizer would render otherwise."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template) + str(tokenizer.special_tokens_map)
    return hashlib.sha256(text.encode()).hexdigest()
