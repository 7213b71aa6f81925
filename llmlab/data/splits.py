"""Which rows are read: the requested subset and splits of a dataset, else the training split; and the seeded hashes by
which documents are held out: equal text has equal keys. Datasets have several names for their training split: `train`,
`train_sft` beside `train_prefs`, or a split for each of their parts."""

import hashlib
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np

from llmlab.settings.errors import UserError, did_you_mean

Use = Literal["text", "instructions", "preferences", "prompts", "prompts or text"]

_WORDS = {"text": set(), "preferences": {"prefs", "preference", "dpo"}}  # of names that say what a split is for
_NOT_TRAINING = {"test", "validation", "valid", "val", "dev", "eval", "heldout"}


def choose_splits(source: str, splits: Iterable[str], named: str | None, use: Use) -> list[str]:
    """Returns the splits to read, in order: those named (several as `a+b`), else the training data for this use."""
    splits = list(splits)
    found = f"(found {', '.join(sorted(splits))})"
    if named is not None:
        parts = [part.strip() for part in named.split("+")]
        for split in parts:
            plain = split.partition("[")[0]  # train[:10%]
            if plain not in splits:
                raise UserError(f"{source}: there is no split '{plain}' here{did_you_mean(plain, splits)} {found}")
        return parts
    if "train" in splits:
        return ["train"]
    training = [split for split in splits if split.startswith("train")]
    if len(training) > 1:
        training = _of_use(training, use)
    if len(training) == 1:
        return training
    sets = [split for split in splits if not (_words(split) & _NOT_TRAINING or split.startswith("train"))]
    if training or not sets:
        example = f"{source} | | 1 | {splits[0]}" if splits else ""
        raise UserError(f"{source}: there is no split 'train' here {found}; name the one to read: {example}")
    return sets


def choose_subset(source: str, subsets: Iterable[str], use: Use) -> str:
    """Returns the subset to read of a dataset that has several and no default."""
    subsets = list(subsets)
    fitting = _of_use(subsets, use)
    if len(fitting) != 1:
        found = f"it has several subsets ({', '.join(subsets)})"
        raise UserError(f"{source}: {found}; name the one to read: {source} | {subsets[0]}")
    return fitting[0]


def _of_use(names: list[str], use: Use) -> list[str]:
    return [name for name in names if _words(name) & _WORDS.get(use, {"sft"})]


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))


def text_hash(text: str) -> int:
    """Returns a 64-bit hash of a document."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seeded_keys(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Returns uint64 sort keys from document hashes and a seed."""
    with np.errstate(over="ignore"):
        mixed = hashes ^ (np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019))
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return mixed ^ (mixed >> np.uint64(29))


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out fraction, by the seeded hash of its text alone."""
    return int(seeded_keys(np.array([text_hash(text)], np.uint64), seed)[0]) < fraction * 2**64
