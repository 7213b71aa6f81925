"""The text corpus of a stage: sources found, tokenized, split and mixed, with a report of what went in.

One function does it for map-style and streaming sources; the parts are in the modules beside this one.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmlab.data.mixture import Mixture, Schedule
from llmlab.data.sources import Tally, TextSource, is_online, label_of, load_text
from llmlab.data.text.encoding import TextEncoder
from llmlab.data.text.packing import STRETCH, PackedRows, all_of, hold_out, stretch_of
from llmlab.data.text.store import TokenStore, open_store, write_store
from llmlab.data.text.streaming import Reader, RowStream, is_held_out
from llmlab.settings.data import DataSource, TextDataSettings
from llmlab.settings.errors import UserError

STREAM_VALIDATION_ROWS = 512  # collected from streams, where nothing says how many are wanted
CHARACTERS_PER_TOKEN = 6  # generous: enough text for so many rows
ENTROPY_ROWS = 20_000  # rows that the unigram entropy is taken over, at most


@dataclass
class SourceReport:
    """What a source gave.

    Attributes:
        name: and its subset.
        share: of all training tokens.
        tally: documents found, and rows dropped by reason; of a stream, what this process has read so far.
        tokens, rows: of the training part; None where a stream has not told.
        epochs: how many times this run goes through it; None where unknown.
        held_out: where its validation rows come from, in words.
        whole: whether it is read to its end; else `tally` counts its beginning, as far as the run needs it.
        count: about how many documents it has; None where unknown.
    """

    name: str
    share: float
    tally: Tally
    tokens: int | None = None
    rows: int | None = None
    epochs: float | None = None
    held_out: str = "nothing"
    whole: bool = True
    count: int | None = None

    def record(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "tally"}
        return {**values, "documents": self.tally.documents, "dropped": dict(self.tally.dropped)}


@dataclass
class CorpusReport:
    """What went into a corpus.

    Attributes:
        sources: of the training data.
        validation_rows: rows to validate with.
        unigram_entropy: nats per token of the validation rows under their own token frequencies: no model that ignores
            context can do better, so a trained one must.
    """

    sources: list[SourceReport]
    validation_rows: int = 0
    unigram_entropy: float | None = None

    def summary(self) -> str:
        """Returns one line for people."""
        parts = []
        for source in self.sources:
            part = f"{source.name} {source.share:.1%}" if len(self.sources) > 1 else source.name
            if source.tokens is not None:
                part += f": {source.tokens:,} tokens"
            if not source.whole:
                total = "more" if source.count is None else f"about {source.count:,}"
                part += f", reads {source.tally.documents:,} of {total} documents"
            if source.epochs is not None:
                part += f", {source.epochs:.2g} epochs"
            if source.tally.dropped:
                why = ", ".join(f"{count:,} {reason}" for reason, count in source.tally.dropped.most_common())
                part += f", rows dropped: {why}"
            parts.append(part)
        entropy = "" if self.unigram_entropy is None else f", unigram entropy {self.unigram_entropy:.3f}"
        return "; ".join(parts) + f"; validation: {self.validation_rows:,} rows{entropy}"

    def record(self) -> dict[str, Any]:
        """Returns plain values for the run's record."""
        return {**vars(self), "sources": [source.record() for source in self.sources]}


@dataclass(frozen=True)
class Corpus:
    """Training and validation rows, each a dict of `input_ids` and `labels`, (max_seq_len,) int64."""

    train: Mixture | RowStream
    validation: Mixture | None
    report: CorpusReport


@dataclass(frozen=True)
class _Part:
    """One source's two sides; a stream has no `train` but the share of documents that its reader must leave out."""

    validation: PackedRows | None
    report: SourceReport
    train: PackedRows | None = None
    left_out: float = 0.0


def build_corpus(
    settings: TextDataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    seed: int | None = None,
    rows_needed: int | None = None,
    validation_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Corpus:
    """Builds the training and validation rows that the settings describe.

    Args:
        settings: sources, weights, validation, streaming, cache.
        tokenizer: must have an eos token, which separates documents.
        max_seq_len: tokens in a row.
        seed: of the held-out share and of all order; None is the settings' seed.
        rows_needed: rows that the whole run trains on, over all processes: sources are read so far; None is one epoch.
        validation_rows: rows to validate with at most; None is all that are held out, from a stream 512.
        rank, world_size: which process this is: streams give each process its own part. Map-style rows are the same
            in every process, for a sampler to share out.

    Raises:
        UserError: a source is missing, unreadable, too small, or has too many unusable rows.
    """
    seed = settings.seed if seed is None else seed  # type: ignore[attr-defined]
    builder = _Builder(settings, TextEncoder.of(tokenizer), max_seq_len, seed, validation_rows)
    weights = [source.weight for source in settings.datasets]
    shares = np.array(weights) / sum(weights)
    sources = [builder.find(source) for source in settings.datasets]
    if settings.streaming:
        parts = [builder.stream_part(*each) for each in zip(settings.datasets, sources, shares, strict=True)]
        readers = [builder.reader(source, part, rank, world_size) for source, part in zip(sources, parts, strict=True)]
        train: Mixture | RowStream = RowStream(readers, weights, seed=seed)
    else:
        needed = [None] * len(weights) if rows_needed is None else Schedule(weights, seed).counts(rows_needed).tolist()
        parts = [builder.packed_part(*each) for each in zip(settings.datasets, sources, shares, needed, strict=True)]
        train = Mixture([part.train for part in parts], weights, seed=seed, length=rows_needed)  # type: ignore[misc]
        for part, epochs in zip(parts, train.epochs(), strict=True):
            part.report.epochs = epochs
    if settings.validation_datasets is None:
        validation = builder.mix([part.validation for part in parts], weights)
    else:
        named = settings.validation_datasets
        validation = builder.mix([builder.validation_rows(source) for source in named], [s.weight for s in named])
    report = CorpusReport([part.report for part in parts])
    if validation is not None:
        report.validation_rows = len(validation)
        report.unigram_entropy = unigram_entropy(validation)
    return Corpus(train, validation, report)


@dataclass(frozen=True)
class _Builder:
    """What every source is built with."""

    settings: TextDataSettings
    encoder: TextEncoder
    length: int
    seed: int
    most_validation_rows: int | None

    @property
    def holds_out(self) -> bool:
        return self.settings.validation_datasets is None and self.settings.validation_fraction > 0

    def find(self, named: DataSource) -> TextSource:
        """Finds a source; what a hub data set is read for is its tokens, so it needs no other copy on disk."""
        return load_text(named, streaming=self.settings.streaming or is_online())

    def packed_part(self, named: DataSource, source: TextSource, share: float, rows: int | None) -> _Part:
        """Reads a source for so many training rows; None is to its end."""
        label = label_of(named)
        own = self.holds_out and "validation" in source.splits and named.split != "validation"
        stretch = stretch_of(self.length)
        # whole stretches, since a longer run must not shuffle otherwise what this one sees
        wanted = None if rows is None else -(-max(rows, 1) // stretch) * stretch * self.length
        tokens = None if wanted is None else max(wanted, STRETCH)
        while True:
            store = self._store(source, tokens)
            spans, validation, how = all_of(store), None, "nothing"
            if self.holds_out and not own:
                held = hold_out(
                    named.name, store, self.settings.validation_fraction, seed=self.seed, length=self.length
                )
                how, spans = held.how, held.train
                # of a large source the first ones, however much of it is read
                most = self.most_validation_rows if len(store.tokens) > STRETCH else None
                validation = PackedRows(f"{label}/held-out", store, held.validation, self.length, most)
            trained = int((spans[:, 1] - spans[:, 0]).sum())
            if store.whole or (wanted is not None and trained >= wanted):
                break
            tokens = len(store.tokens) + math.ceil(1.1 * (wanted - trained))  # what is held out comes on top
        if own:
            how, validation = "its own validation split", self._own_validation(named)
        train = self._rows(label, store, spans, None if store.whole or wanted is None else wanted // self.length)
        report = SourceReport(label, float(share), store.tally, held_out=how, whole=store.whole, count=source.count)
        report.tokens, report.rows = len(train) * self.length if train.most else train.tokens, len(train)
        if source.count is None and source.size and not store.whole:
            report.count = round(source.size / store.meta["characters"] * store.tally.documents)
        return _Part(validation, report, train)

    def stream_part(self, named: DataSource, source: TextSource, share: float) -> _Part:
        report = SourceReport(label_of(named), float(share), Tally())
        if self.holds_out and "validation" in source.splits and named.split != "validation":
            report.held_out = "its own validation split"
            return _Part(self._own_validation(named), report)
        if self.holds_out:
            fraction = self.settings.validation_fraction
            store = self._beginning(source, held_out=fraction)
            report.held_out = f"{fraction:g} of the documents by hash; the first {store.tally.documents:,} validate"
            rows = self._rows(f"{label_of(named)}/held-out", store, all_of(store))
            return _Part(rows, report, left_out=fraction)
        return _Part(None, report)

    def reader(self, source: TextSource, part: _Part, rank: int, world_size: int) -> Reader:
        return Reader(
            source,
            self.encoder,
            tally=part.report.tally,
            length=self.length,
            seed=self.seed,
            held_out=part.left_out,
            allow_dropped=self.settings.allow_dropped,
            rank=rank,
            world_size=world_size,
        )

    def validation_rows(self, named: DataSource) -> PackedRows:
        """Returns the rows of a source that is there for validation."""
        source = self.find(named)
        store = self._beginning(source) if self.settings.streaming else self._store(source)
        return self._rows(label_of(named), store, all_of(store))

    def mix(self, parts: Sequence[PackedRows | None], weights: Sequence[float]) -> Mixture | None:
        """Returns as many validation rows as there are in all, in the training proportions."""
        rows = [part for part in parts if part is not None]
        if not rows:
            return None
        length = min(sum(map(len, rows)), self.most_validation_rows or sys.maxsize)
        return Mixture(rows, weights, seed=self.seed, length=length)

    def _own_validation(self, named: DataSource) -> PackedRows:
        return self.validation_rows(named.model_copy(update={"split": "validation"}))

    def _rows(self, label: str, store: TokenStore, spans: np.ndarray, most: int | None = None) -> PackedRows:
        rows = PackedRows(label, store, spans, self.length, most)
        if not len(rows):
            raise UserError(
                f"{label}: its {rows.tokens:,} tokens do not fill one row of max_seq_len = {self.length}; "
                "use a shorter max_seq_len or more text"
            )
        return rows

    def _store(self, source: TextSource, tokens: int | None = None) -> TokenStore:
        settings = self.settings
        return open_store(
            source,
            self.encoder,
            tokens=tokens,
            cache_dir=settings.cache_dir,
            num_proc=settings.num_proc,
            allow_dropped=settings.allow_dropped,
        )

    def _beginning(self, source: TextSource, held_out: float | None = None) -> TokenStore:
        """Tokenizes as much of a stream as validation needs, from its start."""
        wanted = (self.most_validation_rows or STREAM_VALIDATION_ROWS) * self.length * CHARACTERS_PER_TOKEN

        def texts(tally: Tally, position: Any) -> Iterator[str]:
            read, left = Tally(), wanted
            for text in source.texts(read, self.settings.allow_dropped):
                if held_out is None or is_held_out(text, held_out, self.seed):
                    tally.documents += 1
                    yield text
                    left -= len(text)
                    if left <= 0:
                        return
            if not tally.documents:
                raise UserError(
                    f"{source.name}: validation_fraction = {held_out or 0:g} holds out none of its {read.documents:,} "
                    "documents; name validation_datasets, or read it without streaming"
                )

        identity = {**source.identity, "first": wanted, "held_out": held_out, "seed": self.seed}
        return write_store(texts, source.name, identity, self.encoder, cache_dir=self.settings.cache_dir, num_proc=1)


def unigram_entropy(rows: Mixture) -> float:
    """Returns the entropy of the token frequencies of the rows, in nats per token."""
    counts = np.zeros(1, np.int64)
    for index in range(min(len(rows), ENTROPY_ROWS)):
        source, row = rows.locate(index)
        more = np.bincount(rows.sources[source].row(row), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum()) if len(frequencies) > 1 else 0.0
