"""Documents to token ids, each ended by eos: the one place where text is tokenized for pretraining. Byte-level BPE
that splits text in one of the usual ways goes through tiktoken, which takes a quarter of the time for the same ids."""

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from llmlab.data.splits import text_hash
from llmlab.data.tokenizer import QWEN_PATTERN
from llmlab.settings.errors import UserError

DOCUMENT = np.dtype([("tokens", np.int64), ("hash", np.uint64)])

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # cut out, then GPT-2's
)
LLAMA3 = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LONG_SPACE = re.compile(r"\s{10000}")  # on a million, tiktoken's patterns overflow the stack
NO_TOKEN = np.iinfo(np.uint32).max  # a byte that the vocabulary lacks
MOST_ADDED = 64  # tokens of which each document is searched


class EncodedBatch(NamedTuple):
    """Ids of all documents (tokens,); length and hash of each, (documents,) of `DOCUMENT`; characters in all."""

    tokens: np.ndarray
    documents: np.ndarray
    characters: int


class TextEncoder:
    """Encodes documents with a serialized tokenizer; special tokens written out in a document are plain text."""

    def __init__(self, tokenizer: str, eos_token_id: int):
        self.eos_token_id = eos_token_id
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.identity = self.tokenizer.to_str(), eos_token_id  # all that decides the ids
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        framed, plain = self.tokenizer.encode("a").ids, self.tokenizer.encode("a", add_special_tokens=False).ids
        start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        self.prefix, self.suffix = framed[:start], framed[start + len(plain) :]
        if self.suffix[-1:] != [eos_token_id]:
            self.suffix.append(eos_token_id)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TextEncoder":
        """Returns the encoder of a Transformers tokenizer, which must have an eos token."""
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: this tokenizer has no eos token, which has to end documents")
        return cls(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextEncoder, self.identity

    @cached_property
    def encode_fast(self) -> Callable[[str], np.ndarray | None]:
        return fast_encoder(self.tokenizer) or (lambda text: None)

    def encode(self, texts: list[str]) -> EncodedBatch:
        """Encodes documents, each with the special tokens that the tokenizer adds and an eos at its end."""
        ids = [self.encode_fast(text) for text in texts]
        others = [number for number, each in enumerate(ids) if each is None]
        encodings = self.tokenizer.encode_batch_fast([texts[number] for number in others], add_special_tokens=False)
        for number, encoding in zip(others, encodings, strict=True):
            ids[number] = np.array(encoding.ids, self.dtype)
        prefix, suffix = (np.array(part, self.dtype) for part in (self.prefix, self.suffix))
        parts = [part for each in ids for part in (prefix, each, suffix)]
        frame = len(prefix) + len(suffix)
        documents = np.array([(len(i) + frame, text_hash(t)) for i, t in zip(ids, texts, strict=True)], DOCUMENT)
        return EncodedBatch(np.concatenate(parts, dtype=self.dtype), documents, sum(map(len, texts)))


def fast_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray | None] | None:
    """Returns a function from a text to the tokenizer's ids (tokens,), or to None where it must be asked itself.

    There is none unless the ids are the same for any text.  tiktoken merges any two tokens whose bytes together are a
    token, tokenizers those on its list; both take the first of the earliest.  They differ only where a token could
    come from two other parts than it was learned from, and then it never comes of its own text alone.
    """
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    state = json.loads(tokenizer.to_str())
    model, normalizer = state["model"], state["normalizer"]
    pattern = _pattern(state["pre_tokenizer"])
    added = [token["content"] for token in state["added_tokens"] if not token["special"]]
    if (
        pattern is None
        or model["type"] != "BPE"
        or normalizer not in (None, {"type": "NFC"})
        or len(added) > MOST_ADDED
    ):
        return None
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    letters, vocabulary = bytes_to_unicode(), model["vocab"]
    words = [letters[byte] for byte in range(256)] + ["".join(pair) for pair in model["merges"]]
    rest = vocabulary.keys() - set(words) - {token["content"] for token in state["added_tokens"]}
    if any(model.get(option) for option in options) or rest or len(set(words)) < len(words):
        return None
    parts = models.BPE(vocabulary, [tuple(pair) for pair in model["merges"]])
    if any(len(parts.tokenize(word)) != 1 for word in words if len(word) > 1 or word in vocabulary):
        return None
    values = {letter: byte for byte, letter in letters.items()}
    ranks = {bytes(values[letter] for letter in word): rank for rank, word in enumerate(words)}
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ids = np.array([vocabulary.get(word, NO_TOKEN) for word in words], np.uint32)

    def encode(text: str) -> np.ndarray | None:
        plain = text if normalizer is None or text.isascii() else tokenizer.normalizer.normalize_str(text)
        if any(word in text or word in plain for word in added) or LONG_SPACE.search(plain):
            return None
        tokens = ids[encoding.encode_to_numpy(plain, disallowed_special=())]
        return None if NO_TOKEN in tokens else tokens

    return encode


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Returns the pattern that splits a text as this does, if it is a usual one."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [first, {"type": "ByteLevel", "add_prefix_space": False} as second],
        }:
            match first, second["use_regex"]:
                case {"type": "Digits", "individual_digits": True}, True:
                    return SINGLE_DIGITS
                case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}, False:
                    return pattern if pattern in (QWEN_PATTERN, LLAMA3) else None
    return None
