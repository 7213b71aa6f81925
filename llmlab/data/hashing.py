"""Hashes of documents, and the seeded keys by which documents are held out: equal text has equal keys."""

import hashlib

import numpy as np


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
