"""Documents to token ids, ended by eos; the one place where text is tokenized for pretraining.

Nothing here reads or writes files, and batches are encoded on the calling process.
"""

import hashlib
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from llmlab.data.hashing import text_hash
from llmlab.settings.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedBatch(NamedTuple):
    """Ids of all documents (tokens,); length in tokens and uint64 text hash of each (documents,); characters."""

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    characters: int


class TextEncoder:
    """Encodes documents with a serialized tokenizer; special tokens written out in a document are plain text."""

    def __init__(self, tokenizer: str, eos_token_id: int):
        self.serialized = tokenizer
        self.eos_token_id = eos_token_id
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.adds_eos = self.tokenizer.encode("a").ids[-1:] == [eos_token_id]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "TextEncoder":
        """Returns the encoder of a Transformers tokenizer, which must have an eos token."""
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: this tokenizer has no eos token, which has to end documents")
        return cls(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextEncoder, (self.serialized, self.eos_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        return hashlib.sha256(f"{self.eos_token_id} {self.tokenizer.to_str()}".encode()).hexdigest()

    def encode(self, texts: list[str]) -> EncodedBatch:
        """Encodes documents, each with the special tokens that the tokenizer adds and an eos at its end."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        if not self.adds_eos:
            for document in ids:
                document.append(self.eos_token_id)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum()))
        hashes = np.fromiter(map(text_hash, texts), np.uint64, len(texts))
        return EncodedBatch(tokens, lengths, hashes, sum(map(len, texts)))
