"""How fast text becomes packed rows on one core, beside `datasets.map` in the same process; how fast rows are read.

Interleaved rounds, medians, seconds of CPU time, so that other work on the machine disturbs all candidates alike.

    python benchmarks/tokenize_corpus.py demo/stories corpus.txt pages.jsonl --tokenizer runs/tokenizer --rounds 5
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # per core

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table

from llmlab.data.sources import Tally, load_text
from llmlab.data.text.encoder import TextEncoder
from llmlab.data.text.packing import Mixture, PackedRows
from llmlab.data.text.store import open_store
from llmlab.data.tokenizer import learn_bpe, load_tokenizer
from llmlab.settings.data import DataSettings, DataSource

LENGTH = 512


def cpu_seconds(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


@cache
def encoder_of(tokenizer) -> TextEncoder:
    return TextEncoder.of(tokenizer)  # a few tenths of a second, once a run


def with_llmlab(source: DataSource, tokenizer) -> None:
    """Reads, tokenizes, writes and opens the corpus."""
    encoder = encoder_of(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(load_text(source), encoder, DataSettings(cache_dir=folder, num_proc=1))
        assert len(PackedRows("rows", store, LENGTH)) > 0


def with_map(source: DataSource, tokenizer) -> None:
    """The usual recipe on the same reader: `datasets.map` twice, to tokenize and to concatenate into rows."""
    rows = datasets.Dataset.from_dict({"text": list(load_text(source).texts(Tally()))})

    def tokenize(batch):
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}

    def pack(batch):
        ids = [number for document in batch["input_ids"] for number in document]
        return {"input_ids": [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]}

    tokenized = rows.map(tokenize, batched=True, remove_columns=["text"], keep_in_memory=True)
    assert len(tokenized.map(pack, batched=True, keep_in_memory=True)) > 0


def with_tokenizers(source: DataSource, tokenizer) -> None:
    """`encode_batch_fast` alone, into an array: no file, no rows."""
    texts = list(load_text(source).texts(Tally()))
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    np.concatenate([np.array(encoding.ids, np.uint16) for encoding in encodings])


def read_rows(source: DataSource, tokenizer) -> float:
    """Returns how many tokens a second are read in training order."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(load_text(source), encoder_of(tokenizer), DataSettings(cache_dir=folder, num_proc=1))
        rows = PackedRows("rows", store, LENGTH)
        mixture = Mixture([rows, rows], [2.0, 1.0], seed=0)
        seconds = cpu_seconds(lambda: [mixture[i] for i in range(len(mixture))] and None)
        return len(mixture) * LENGTH / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", default=["demo/stories"])
    parser.add_argument(
        "--tokenizer", help="hub id, folder or tokenizer.json; none trains one of 1024 on demo/stories"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        folder = tempfile.mkdtemp()
        tokenizer = learn_bpe([DataSource(name="demo/stories")], 1024, folder, show_progress=False)
    table = Table(
        "source", "MB", "llmlab MB/s", "encode_batch_fast", "datasets.map", "ratio to map", "rows read, tokens/s"
    )
    for name in arguments.sources:
        source = DataSource.model_validate(name)
        megabytes = sum(len(text.encode()) for text in load_text(source).texts(Tally())) / 1e6
        times: dict[Callable, list[float]] = {with_llmlab: [], with_tokenizers: [], with_map: []}
        for _ in range(arguments.rounds):
            for candidate, seconds in times.items():
                seconds.append(cpu_seconds(lambda candidate=candidate, source=source: candidate(source, tokenizer)))
        speeds = [f"{megabytes / statistics.median(seconds):.1f}" for seconds in times.values()]
        ratio = statistics.median(b / a for a, b in zip(times[with_llmlab], times[with_map], strict=True))
        reading = read_rows(source, tokenizer)
        table.add_row(os.path.basename(name), f"{megabytes:.1f}", *speeds, f"{ratio:.1f} x", f"{reading / 1e6:.0f} M")
    Console(width=140).print(
        f"tokenizer of {len(tokenizer):,} entries, rows of {LENGTH}, {arguments.rounds} rounds", table
    )


if __name__ == "__main__":
    main()
