"""Instruction data of a stage: sources read, rendered, proven, held out and mixed, with a report of what went in.

Rows are tokens and labels, cut to length here, so that what is lost is counted; padding and packing are the trainer's.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, interleave_datasets, load_from_disk
from transformers import PreTrainedTokenizerBase

from llmlab.data.conversations import ConversationSource, load_conversations
from llmlab.data.corpus import label_of
from llmlab.data.encoding import text_hash
from llmlab.data.formats import UnusableRow
from llmlab.data.packing import seeded
from llmlab.data.rendering import LossOn, Renderer, find_problem
from llmlab.data.store import cache_folder
from llmlab.settings.data import DataSettings, DataSource
from llmlab.settings.errors import UserError

VERSION = 1  # of the rendered rows: raise it with every change that alters them
WORTH_PROCESSES = 5_000  # rows from which rendering in several processes pays
ROW = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tokens": Value("int32"),  # before cutting
        "hash": Value("int64"),  # of the row's content; Arrow's writer takes no Python integer above 63 bits
        "dropped": Value("string"),  # why the row cannot be used, or empty
        "problem": Value("string"),  # what is wrong with its mask, or empty
    }
)


@dataclass
class InstructionReport:
    """What a source gave.

    Attributes:
        name: and its subset.
        form: the format of its rows.
        share: of the rows that are trained on.
        rows: read.
        trained_rows: left to train on.
        tokens, trained_tokens: of the training rows, and those among them with a label.
        dropped: rows that could not be used, by reason.
        cut: rows longer than max_seq_len.
        lost: rows that lost every label to that, and are left out.
        passes: how many times training goes through them; None until it is known.
    """

    name: str
    form: str
    share: float
    rows: int
    trained_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    lost: int = 0
    passes: float | None = None

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": dict(self.dropped)}

    def summary(self) -> str:
        """Returns one line for people."""
        parts = [f"{self.trained_rows:,} rows", f"{self.trained_tokens / max(self.tokens, 1):.0%} of tokens trained"]
        if self.cut:
            parts.append(
                f"{self.cut:,} cut" + (f", {self.lost:,} of them left with nothing to train" * bool(self.lost))
            )
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.most_common()]
        return f"{self.name} ({self.form}): " + ", ".join(parts)


@dataclass(frozen=True)
class Instructions:
    """Training and validation rows (`input_ids`, `labels`), and a report for each source.

    `validation` is None where nothing is held out.
    """

    train: Dataset
    validation: Dataset | None
    reports: list[InstructionReport]

    def summary(self) -> str:
        """Returns what went in, one line a source, and how many rows validate."""
        held = f"validation: {0 if self.validation is None else len(self.validation):,} rows"
        return "\n".join([*(report.summary() for report in self.reports), held])

    def record(self) -> dict[str, Any]:
        """Returns plain values for the run's record."""
        held = 0 if self.validation is None else len(self.validation)
        return {"sources": [report.record() for report in self.reports], "validation_rows": held}


def build_instructions(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    loss_on: LossOn,
    allow_truncated: float,
    seed: int,
    stops: tuple[int, ...] = (),
    validation_rows: int | None = None,
) -> Instructions:
    """Builds the rows that the settings describe, and proves their masks.

    Sources of any formats are mixed by their weights: shares of rows, drawn until every source was used whole.

    Args:
        settings: sources, weights, validation, cache.
        tokenizer: with a chat template, unless all rows are plain text.
        max_seq_len: longest row in tokens; longer ones lose their end.
        loss_on: what is trained: every turn of the assistant, its last one (`completion`), or all tokens.
        allow_truncated: share of rows that may lose every label to `max_seq_len`.
        seed: of the held-out rows and of mixing.
        stops: ids at which the model stops, beside those that the tokenizer tells.
        validation_rows: rows to validate with at most.

    Raises:
        UserError: a source is missing or unreadable, too many of its rows are unusable, or a mask is wrong: it names
            the row and what to do.
    """
    builder = _Builder(
        settings, Renderer(tokenizer, loss_on, stops), max_seq_len, allow_truncated, seed, validation_rows or 2**62
    )
    weights = np.array([source.weight for source in settings.datasets])
    parts, held, reports = [], [], []
    for named, share in zip(settings.datasets, weights / weights.sum(), strict=True):
        train, validation, report = builder.part(named, float(share))
        parts.append(train)
        reports.append(report)
        held += [] if validation is None else [validation]
    if settings.validation_datasets is not None:
        held = [builder.rows(named)[0] for named in settings.validation_datasets]
    validation = None
    if held:
        every = _mix(held, [len(rows) for rows in held], seed)
        validation = every.select(range(min(len(every), validation_rows or len(every))))
    return Instructions(_mix(parts, list(weights), seed), validation, reports)


@dataclass(frozen=True)
class _Builder:
    """What every source is built with."""

    settings: DataSettings
    renderer: Renderer
    max_seq_len: int
    allow_truncated: float
    seed: int
    validation_rows: int

    def part(self, named: DataSource, share: float) -> tuple[Dataset, Dataset | None, InstructionReport]:
        """Returns a source's training rows, its held-out rows where there are any, and its report."""
        train, report, source = self.rows(named, share)
        validation = None
        fraction = self.settings.validation_fraction
        if self.settings.validation_datasets is None and fraction > 0:
            if "validation" in source.splits and named.split != "validation":
                validation = self.rows(named.model_copy(update={"split": "validation"}))[0]
            else:
                wanted = min(math.ceil(fraction * len(train)), math.ceil(share * self.validation_rows))
                train, validation = self._hold_out(named, train, wanted)
        report.trained_rows, report.tokens = len(train), sum(map(len, train["input_ids"]))
        report.trained_tokens = sum(int((labels != -100).sum()) for labels in train.with_format("numpy")["labels"])
        return train, validation, report

    def rows(self, named: DataSource, share: float = 1.0) -> tuple[Dataset, InstructionReport, ConversationSource]:
        """Returns the usable rows of a source, after proving them."""
        source = load_conversations(named)
        rendered = self._rendered(source)
        report = InstructionReport(label_of(named), source.form.name, share, len(rendered))
        dropped, problems = np.array(rendered["dropped"]), np.array(rendered["problem"])
        lengths = np.array(rendered["tokens"])
        report.dropped.update(str(reason) for reason in dropped[dropped != ""])
        self._check_dropped(report, dropped)
        self._check_masks(report, problems)
        lost = np.array([not any(label != -100 for label in labels) for labels in rendered["labels"]]) & (
            dropped == ""
        )
        report.cut, report.lost = int((lengths > self.max_seq_len).sum()), int(lost.sum())
        self._check_lost(report, lost, lengths)
        usable = np.flatnonzero((dropped == "") & ~lost)
        return rendered.select(usable), report, source

    def _check_dropped(self, report: InstructionReport, dropped: np.ndarray) -> None:
        count = report.dropped.total()
        if count == report.rows or count > self.settings.allow_dropped * report.rows:
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in report.dropped.most_common(5))
            first = int(np.flatnonzero(dropped != "")[0]) + 1 if count else 0
            raise UserError(
                f"{report.name}: {count:,} of {report.rows:,} rows cannot be used, the first is row {first}: "
                f"{reasons}; mend them, or raise allow_dropped = {self.settings.allow_dropped:g}"
            )

    def _check_masks(self, report: InstructionReport, problems: np.ndarray) -> None:
        wrong = np.flatnonzero(problems != "")
        if len(wrong):
            raise UserError(
                f"{report.name}: row {int(wrong[0]) + 1} (and {len(wrong) - 1:,} more of {report.rows:,}): "
                f"{problems[wrong[0]]}; use a chat template that marks the assistant's turns whole, or set "
                "chat_template=chatml"
            )

    def _check_lost(self, report: InstructionReport, lost: np.ndarray, lengths: np.ndarray) -> None:
        if report.lost > self.allow_truncated * report.rows:
            first = int(np.flatnonzero(lost)[0])
            enough = int(np.percentile(lengths, 95))
            raise UserError(
                f"{report.name}: {report.lost:,} of {report.rows:,} rows have nothing left to train after cutting to "
                f"max_seq_len = {self.max_seq_len}, the first is row {first + 1} with {int(lengths[first]):,} tokens; "
                f"95 % of the rows fit into {enough:,}, or raise allow_truncated = {self.allow_truncated:g}"
            )

    def _hold_out(self, named: DataSource, rows: Dataset, wanted: int) -> tuple[Dataset, Dataset]:
        """Splits by a seeded hash of the rows, so that equal rows stay on one side."""
        keys = seeded(np.array(rows["hash"], np.int64).view(np.uint64), self.seed)
        held = keys <= np.sort(keys)[wanted - 1]
        if held.all():
            raise UserError(
                f"{named.name}: its {len(rows):,} usable rows are too few to hold out validation_fraction = "
                f"{self.settings.validation_fraction:g}; set validation_fraction=0, or name validation_datasets"
            )
        return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))

    def _rendered(self, source: ConversationSource) -> Dataset:
        """Returns every row of a source as tokens, from the cache where the same was rendered before."""
        material = {
            "version": VERSION,
            "source": source.identity,
            "column": source.column,
            "tokenizer": _tokenizer_identity(self.renderer.tokenizer),
            "stops": self.renderer.stops,
            "loss_on": self.renderer.loss_on,
            "max_seq_len": self.max_seq_len,
        }
        key = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:24]
        folder = cache_folder(self.settings.cache_dir) / f"rows-{key}"
        if not folder.is_dir():
            self._render(source, folder)
        return load_from_disk(str(folder))

    def _render(self, source: ConversationSource, folder: Path) -> None:
        raw = Dataset.from_dict({"row": [json.dumps(row, default=str) for row in source.rows]})
        workers = self.settings.num_proc if len(raw) >= WORTH_PROCESSES else None
        rows = raw.map(
            _RenderRow(source, self.renderer, self.max_seq_len),
            remove_columns="row",
            features=ROW,
            num_proc=workers,
            desc=f"Rendering {source.name}" if sys.stderr.isatty() else None,
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
        try:
            rows.save_to_disk(str(temporary / "rows"))
            if not folder.is_dir():
                (temporary / "rows").rename(folder)
        except OSError as error:
            raise UserError(f"cache_dir = {folder.parent}: cannot be written: {error}") from None
        finally:
            shutil.rmtree(temporary)


class _RenderRow:
    """Turns one row, as JSON text since rows of one file may have different types, into tokens and labels."""

    def __init__(self, source: ConversationSource, renderer: Renderer, max_seq_len: int):
        self.read = source.read
        self.renderer = renderer
        self.max_seq_len = max_seq_len

    def __call__(self, example: dict[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = {"input_ids": [], "labels": [], "tokens": 0, "dropped": "", "problem": ""}
        values["hash"] = text_hash(example["row"]) - 2**63
        try:
            row = self.renderer.render(self.read(json.loads(example["row"])))
        except UnusableRow as reason:
            return {**values, "dropped": str(reason)}
        values["problem"] = find_problem(row, self.renderer.tokenizer, self.renderer.stops)
        values["tokens"] = len(row.input_ids)
        values["input_ids"], values["labels"] = row.input_ids[: self.max_seq_len], row.labels[: self.max_seq_len]
        return values


def _mix(parts: list[Dataset], weights: list[float], seed: int) -> Dataset:
    """Returns the rows of several sources in these proportions, every source used whole at least once."""
    columns = ["input_ids", "labels"]
    parts = [part.select_columns(columns) for part in parts]
    if len(parts) == 1:
        return parts[0]
    shares = np.array(weights, float) / np.sum(weights)
    return interleave_datasets(parts, probabilities=list(shares), seed=seed, stopping_strategy="all_exhausted")


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what changes when a tokenizer would render otherwise."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template) + str(tokenizer.special_tokens_map)
    return hashlib.sha256(text.encode()).hexdigest()
