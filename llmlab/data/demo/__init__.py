"""Corpora generated from seeded grammars, so that a first run and the tests need no network: `demo/<name>`. Train and
validation split share no story and no conversation, and a corpus is the same for everyone, whatever the seed."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any, NamedTuple

from llmlab.data.demo import arithmetic, chat, stories, tools
from llmlab.settings.errors import UserError, did_you_mean

PREFIX = "demo/"
SPLITS = ("train", "validation")
VERSION = 2  # of the text: raise it with every change that alters what is generated

VALIDATION_SHARE = 0.05
CHUNK_BYTES = 250_000


CORPORA: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {  # what writes a row, and bytes where none are given
    "stories": (stories.write_row, 6_000_000),
    "chat": (chat.write_row, 2_000_000),
    "preferences": (chat.write_pair, 2_000_000),
    "arithmetic": (arithmetic.write_row, 8_000_000),
    **{
        f"{name}/{level}" if level else name: (partial(write, difficulty=level), size)
        for name, write, size in (("tools", tools.write_row, 4_000_000), ("tasks", tools.write_task, 500_000))
        for level in (None, 1, 2, 3, 4)
    },
}


class DemoShard(NamedTuple):
    """A part of a demo corpus that is generated on its own."""

    corpus: str
    split: str
    seed: int
    chunk: int
    size: int


def demo_shards(name: str, *, split: str = "train", size: str | None = None, seed: int = 0) -> list[DemoShard]:
    """Returns the parts of a corpus of `size` bytes of text (as in `2MB`); validation has a twentieth of that."""
    corpus = name.removeprefix(PREFIX)
    if corpus not in CORPORA:
        known = ", ".join(PREFIX + known for known in CORPORA)
        raise UserError(f"{name}: there is no such demo corpus{did_you_mean(corpus, CORPORA)} (there is {known})")
    if split not in SPLITS:
        raise UserError(f"{name}: split = {split}: expected one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    total = CORPORA[corpus][1]
    if size is not None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kM])B", size)
        if not match or float(match[1]) == 0:
            raise UserError(f"{name} | {size}: expected a size such as 2MB or 500kB after the name of a demo corpus")
        total = int(float(match[1]) * {"k": 1e3, "M": 1e6}[match[2]])
    if split == "validation":
        total = max(1, int(total * VALIDATION_SHARE))
    starts = enumerate(range(0, total, CHUNK_BYTES))
    return [DemoShard(corpus, split, seed, chunk, min(CHUNK_BYTES, total - start)) for chunk, start in starts]


def read_shard(shard: DemoShard) -> Iterator[dict[str, Any]]:
    """Yields the rows of one part: about its share of bytes, never less than one row."""
    random = Random(f"{shard.corpus}/{shard.seed}/{shard.split}/{shard.chunk}")
    (write_row, _), written = CORPORA[shard.corpus], 0
    while written < shard.size:
        row = write_row(random, validation=shard.split == "validation")
        written += _text_length({**row, "tools": ""})  # which are the same in every row
        yield row


def _text_length(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_text_length, value)) if isinstance(value, list) else len(str(value))
