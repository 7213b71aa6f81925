"""The text corpus of a stage: locates, tokenizes, splits and mixes the sources, with a report. One function does it
for map-style and streaming sources; the parts are in the modules beside this one."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from llmlab.data.sources import Tally, TextSource, label_of, load_text
from llmlab.data.text.encoder import TextEncoder
from llmlab.data.text.packing import WINDOW, Mixture, PackedRows, Reader, RowStream, Schedule, hold_out, window_rows
from llmlab.data.text.store import open_store
from llmlab.settings.data import DataSource, TextDataSettings
from llmlab.settings.errors import UserError

STREAM_VALIDATION_ROWS = 512  # collected from streams, where nothing says how many are wanted
ENTROPY_ROWS = 20_000  # rows that the unigram entropy is taken over, at most


@dataclass
class SourceReport:
    """What was read of a source of text."""

    name: str  # and its subset
    share: float  # of all training tokens
    tally: Tally  # of a stream, what this process has read so far
    tokens: int | None = None  # of the training rows; None for a stream
    rows: int | None = None
    epochs: float | None = None  # of this run over its training rows
    held_out: str = "nothing"  # where its validation rows come from
    whole: bool = True  # whether it is read to its end; else `tally` counts its beginning, as far as the run needs it
    count: int | None = None  # about how many documents it has

    def record(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "tally"}
        return {**values, "documents": self.tally.documents, "dropped": dict(self.tally.dropped)}

    def summary(self, *, alone: bool) -> str:
        """Returns one line for people; the share is left out for a single source."""
        line = self.name if alone else f"{self.name} {self.share:.1%}"
        if self.tokens is not None:
            line += f": {self.tokens:,} tokens"
        if not self.whole:
            total = "more" if self.count is None else f"about {self.count:,}"
            line += f", reads {self.tally.documents:,} of {total} documents"
        if self.epochs is not None:
            line += f", {self.epochs:.2g} epochs"
        if self.tally.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.tally.dropped.most_common())
            line += f", rows dropped: {reasons}"
        return line


@dataclass(frozen=True)
class Corpus:
    """Training and validation rows, each a dict of `input_ids` and `labels`, (max_seq_len,) int64, and a report."""

    train: Mixture | RowStream
    validation: Mixture | None
    sources: list[SourceReport]
    unigram_entropy: float | None  # nats per token of the validation rows, which a trained model beats

    def summary(self) -> str:
        """Returns one line for people."""
        sources = "; ".join(source.summary(alone=len(self.sources) == 1) for source in self.sources)
        entropy = "" if self.unigram_entropy is None else f", unigram entropy {self.unigram_entropy:.3f}"
        return f"{sources}; validation: {len(self.validation or ()):,} rows{entropy}"

    def record(self) -> dict[str, Any]:
        """Returns plain values for the run's record."""
        rows = {"validation_rows": len(self.validation or ()), "unigram_entropy": self.unigram_entropy}
        return {"sources": [source.record() for source in self.sources], **rows}


def build_corpus(
    settings: TextDataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    rows_needed: int | None = None,
    validation_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Corpus:
    """Builds the training and validation rows of `max_seq_len` tokens that the settings describe. `rows_needed` (None:
    one epoch) and `validation_rows` (None: all held out, of a stream 512) are of all processes."""
    seed = settings.seed  # type: ignore[attr-defined]
    builder = _Builder(settings, TextEncoder.of(tokenizer), max_seq_len, seed, validation_rows, rank, world_size)
    weights = [source.weight for source in settings.datasets]
    shares = (np.array(weights) / sum(weights)).tolist()
    needed = [None] * len(weights) if rows_needed is None else Schedule(weights, seed).counts(rows_needed).tolist()
    sources = [builder.find(named) for named in settings.datasets]
    parts = [builder.part(*each) for each in zip(settings.datasets, sources, shares, needed, strict=True)]
    trains, validations, reports = zip(*parts, strict=True)
    if settings.streaming:
        train: Mixture | RowStream = RowStream(trains, weights, seed=seed)
    else:
        train = Mixture(trains, weights, seed=seed, length=rows_needed)
        for report, epochs in zip(reports, train.epochs(), strict=True):
            report.epochs = epochs
    if named := settings.validation_datasets:
        validations, weights = [builder.validation_rows(each) for each in named], [each.weight for each in named]
    if validations[0] is None:  # nothing is held out
        return Corpus(train, None, list(reports), None)
    length = min(sum(map(len, validations)), validation_rows or sys.maxsize)
    validation = Mixture(validations, weights, seed=seed, length=length)
    return Corpus(train, validation, list(reports), unigram_entropy(validation, builder.encoder.vocab_size))


@dataclass(frozen=True)
class _Builder:
    """Shared context for building each source."""

    settings: TextDataSettings
    encoder: TextEncoder
    length: int
    seed: int
    most_validation_rows: int | None
    rank: int
    world_size: int

    def find(self, named: DataSource) -> TextSource:
        """Finds a source; hub datasets are streamed: the token store is the only copy on disk."""
        return load_text(named, streaming=self.settings.streaming or not datasets.config.HF_HUB_OFFLINE)

    def part(
        self, named: DataSource, source: TextSource, share: float, rows: int | None
    ) -> tuple[PackedRows | Reader, PackedRows | None, SourceReport]:
        """Returns so many training rows of a source (None is all) and validation rows, its own if it has any."""
        report = SourceReport(label_of(named), share, Tally(), count=source.count)
        fraction = self.settings.validation_fraction if self.settings.validation_datasets is None else 0.0
        own = None
        if fraction and "validation" in source.splits and named.split != "validation":
            own, fraction = self.validation_rows(named.model_copy(update={"split": "validation"})), 0.0
            report.held_out = "its own validation split"
        if not self.settings.streaming:
            train, held_out = self._pack(source, report, fraction, rows)
            return train, own or held_out, report
        if fraction:
            own = self._first_rows(f"{report.name}/held-out", source, fraction)
            report.held_out = f"{fraction:g} of the documents by hash; their first {len(own):,} rows validate"
        shard = {"rank": self.rank, "world_size": self.world_size, "allow_dropped": self.settings.allow_dropped}
        reader = Reader(source, self.encoder, report.tally, self.length, self.seed, fraction, **shard)
        return reader, own, report

    def _pack(
        self, source: TextSource, report: SourceReport, fraction: float, rows: int | None
    ) -> tuple[PackedRows, PackedRows | None]:
        window = window_rows(self.length)
        # whole windows, so that a longer run starts with the same rows
        limit = None if rows is None else math.ceil(max(rows, 1) / window) * window
        tokens = None if limit is None else max(limit * self.length, WINDOW)
        while True:
            store = open_store(source, self.encoder, self.settings, tokens)
            split = hold_out(source.name, store, fraction, seed=self.seed, length=self.length)
            train = PackedRows(report.name, store, self.length, split.train, None if store.whole else limit)
            if store.whole or len(train) == limit:
                break
            tokens = len(store) + math.ceil(1.1 * (limit - len(train)) * self.length)  # the held-out ones on top
        report.tally, report.whole = store.tally, store.whole
        report.tokens, report.rows = len(train) * self.length, len(train)
        if source.count is None and source.size and not store.whole:
            report.count = round(source.size / store.meta["characters"] * store.tally.documents)
        validation = None
        if fraction:
            report.held_out = split.rule
            # from the beginning of a large source, independent of how much is read
            most = self.most_validation_rows if len(store) > WINDOW else None
            validation = PackedRows(f"{report.name}/held-out", store, self.length, split.validation, most)
        return train, validation

    def validation_rows(self, named: DataSource) -> PackedRows:
        """Returns the rows of a source that is there for validation."""
        source, label = self.find(named), label_of(named)
        if self.settings.streaming:
            return self._first_rows(label, source)
        return PackedRows(label, open_store(source, self.encoder, self.settings), self.length)

    def _first_rows(self, label: str, source: TextSource, fraction: float = 0.0) -> PackedRows:
        """Tokenizes as much of a stream as validation needs, from its start; of a fraction, its held-out documents."""
        rows = self.most_validation_rows or STREAM_VALIDATION_ROWS
        held_out = (fraction, self.seed) if fraction else None
        store = open_store(source, self.encoder, self.settings, rows * self.length, held_out)
        if not len(store):
            problem = f"validation_fraction = {fraction:g} holds out none of its {store.tally.documents:,} documents"
            raise UserError(f"{source.name}: {problem}; name validation_datasets, or read it without streaming")
        return PackedRows(label, store, self.length, limit=rows)


def unigram_entropy(rows: Mixture, vocab_size: int) -> float:
    """Returns the entropy of the token frequencies of the rows, in nats per token."""
    counts = np.zeros(vocab_size, np.int64)
    for index in range(min(len(rows), ENTROPY_ROWS)):
        np.add.at(counts, rows[index]["input_ids"].numpy(), 1)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum()) if len(frequencies) > 1 else 0.0
