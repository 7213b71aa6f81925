"""Documents to token ids, each ended by eos: the one place where text is tokenized for pretraining. Byte-level BPE
with a well-known splitting pattern runs in tiktoken, which gives the same ids in a quarter of the time."""

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
SINGLE_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""GPT-2's between digits that stand alone."""

LLAMA3 = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LONG_SPACE = re.compile(r"(?<!\s)\s{10000}")  # on a million whitespace characters tiktoken's regex overflows its stack
NO_TOKEN = np.iinfo(np.uint32).max  # stands for a byte that is not in the vocabulary
MOST_ADDED = 64  # non-special added tokens; each document is searched for all of them
SMALL = 100_000  # characters, which take less time than building the fast encoder of a large vocabulary


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
        self.adds_eos = self.tokenizer.encode("a").ids[-1:] == [eos_token_id]

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
        """The fast encoder with the tokens that the tokenizer adds at both ends; to None where there is none."""
        framed, plain = self.tokenizer.encode("a"), self.tokenizer.encode("a", add_special_tokens=False).ids
        start = (framed.special_tokens_mask + [0]).index(0)
        prefix, suffix = framed.ids[:start], framed.ids[start + len(plain) :]
        encode = fast_encoder(self.tokenizer)
        if (
            encode is None
            or not plain
            or framed.ids != prefix + plain + suffix
            or not all(framed.special_tokens_mask[start + len(plain) :])
        ):
            return lambda text: None

        def encode_framed(text: str) -> np.ndarray | None:
            ids = encode(text)
            return ids if ids is None else np.concatenate([prefix, ids, suffix], dtype=np.uint32, casting="unsafe")

        return encode_framed

    def encode(self, texts: list[str]) -> EncodedBatch:
        """Encodes documents, each with the special tokens that the tokenizer adds and an eos at its end."""
        characters = sum(map(len, texts))
        uses_fast = characters > SMALL or "encode_fast" in vars(self)
        ids = [self.encode_fast(text) if uses_fast else None for text in texts]
        others = [number for number, each in enumerate(ids) if each is None]
        encodings = self.tokenizer.encode_batch_fast([texts[number] for number in others])
        for number, encoding in zip(others, encodings, strict=True):
            ids[number] = np.array(encoding.ids, self.dtype)
        end = np.array([] if self.adds_eos else [self.eos_token_id], self.dtype)
        sizes = [(len(each) + len(end), text_hash(text)) for each, text in zip(ids, texts, strict=True)]
        tokens = np.concatenate([end[:0], *(part for each in ids for part in (each, end))], dtype=self.dtype)
        return EncodedBatch(tokens, np.array(sizes, DOCUMENT), characters)


def fast_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray | None] | None:
    """Returns a function from a text to the tokenizer's ids (tokens,), or to None for a text that must go through the
    tokenizer itself; None unless both give the same ids for every text.

    tiktoken merges any two neighbours whose joined bytes are a token; tokenizers merges only the pairs on its list.
    Both merge the pair of lowest rank first, the leftmost of equals. If every token's own text is encoded as that one
    token, each token can arise only from its listed pair, and the two agree; this is what is checked. What remains are
    newly assigned characters that the Unicode tables of the two may class differently (SINGLE_DIGITS: 13 rare digits).
    """
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    state = json.loads(tokenizer.to_str())
    model, normalizer = state["model"], state["normalizer"]
    pattern = _pattern(state["pre_tokenizer"])
    every_added = {token["content"] for token in state["added_tokens"]}
    added = {token["content"] for token in state["added_tokens"] if not token["special"]}
    if tokenizer.normalizer is not None:
        added |= {tokenizer.normalizer.normalize_str(word) for word in added}
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
    rest = vocabulary.keys() - set(words)
    if model["ignore_merges"] is False:
        rest -= every_added  # with it, one that is a whole piece is its token
    if any(model.get(option) for option in options) or rest or len(set(words)) < len(words):
        return None
    parts = models.BPE(vocabulary, [tuple(pair) for pair in model["merges"]])
    if any(len(parts.tokenize(word)) != 1 for word in words if len(word) > 1 or word in vocabulary):
        return None
    values = {letter: byte for byte, letter in letters.items()}
    ranks = {bytes(values[letter] for letter in word): rank for rank, word in enumerate(words)}
    unused = {"<|unused|>": len(words)}  # without any, tiktoken searches for special tokens at each character
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused)
    ids = np.array([vocabulary.get(word, NO_TOKEN) for word in words], np.uint32)

    def encode(text: str) -> np.ndarray | None:
        plain = text if normalizer is None or text.isascii() else tokenizer.normalizer.normalize_str(text)
        if any(word in text or word in plain for word in added) or LONG_SPACE.search(plain):
            return None
        tokens = ids[encoding.encode_to_numpy(plain, disallowed_special=())]
        return None if NO_TOKEN in tokens else tokens

    return encode


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Returns the regular expression equivalent to a pre-tokenizer, or None if it is not a known one."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [first, {"type": "ByteLevel", "add_prefix_space": False} as last]}:
            steps = first, last["use_regex"]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case _:
            return None
    match steps:
        case {"type": "Digits", "individual_digits": True}, True:
            return SINGLE_DIGITS
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}, False:
            return pattern if pattern in (QWEN_PATTERN, LLAMA3) else None
    return None
