"""Text to token ids, each distinct word once: the fast path under packing and streaming.

A byte-level BPE never merges across the space before a word, so the ids of a word do not depend on what stands around
it, and text is mostly words seen before.  Tokenizers for which that is not certain go through `encode_batch_fast` as
they are.  The result is the same to the last id; nothing here reads or writes files.
"""

import hashlib
import json
import re
import unicodedata
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from llmlab.data.hashing import text_hash
from llmlab.settings.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTION, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_PATTERN = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
LLAMA_PATTERN = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
PATTERNS = (QWEN_PATTERN, LLAMA_PATTERN)
"""How byte-level tokenizers cut text before merging, beside GPT-2's pattern, which `tokenizers` has built in."""


class Words(NamedTuple):
    """Where text may be cut so that no tokenizer pattern ever matches across the cut.

    Attributes:
        pattern: matches one word after the other, whitespace included; together they are the text.
        begins: characters that a word may be put behind any other word with.
    """

    pattern: re.Pattern[str]
    begins: str


# No pattern goes on from a letter into these marks, and GPT-2's none from a visible character into whitespace.  The
# others take line ends behind punctuation, but stop there for good.  Python knows some whitespace that they do not:
# nothing is cut there.
_MARKS = r"[,.;:!?)'\"]"
_LETTERS = rf"\s*[A-Za-z]+(?={_MARKS})"
GPT2_WORDS = Words(re.compile(rf"{_LETTERS}|\s*\S+(?:[^\S \t\r\n]\s*\S*)*|\s+"), " \t\r\n")
PATTERN_WORDS = Words(re.compile(rf"{_LETTERS}|\s*\S+(?:(?![\r\n]+\S)[^\S ]\s*\S*)*(?:[\r\n]+(?=\S))?|\s+"), " ")

MOST_WORDS = 400_000  # about 80 MB; the words are forgotten when there are more
WORDS_TOGETHER = 500  # new words that are encoded as one text


class Encoded(NamedTuple):
    """Documents as token ids, each ended by eos.

    Attributes:
        tokens: (tokens,) ids of all documents, one after the other.
        lengths: (documents,) tokens of each.
        hashes: (documents,) uint64 of each document's text, the same on every machine.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray


class TextEncoder:
    """Turns documents into ids; small enough to send to another process.

    Special tokens that are spelled out in a document are read as the text they are.

    Args:
        tokenizer: serialized tokenizer (`Tokenizer.to_str()`).
        eos_token_id: what ends a document.
    """

    def __init__(self, tokenizer: str, eos_token_id: int):
        self.serialized = tokenizer
        self.eos_token_id = eos_token_id
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values())
        self.dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
        alone, framed = (self.tokenizer.encode("a", add_special_tokens=framed).ids for framed in (False, True))
        before = next(i for i in range(len(framed)) if framed[i : i + len(alone)] == alone)
        after = framed[before + len(alone) :]
        self.prefix = np.array(framed[:before], self.dtype).tobytes()
        self.suffix = np.array(after if eos_token_id in after else [*after, eos_token_id], self.dtype).tobytes()
        self.cut = words_of(json.loads(tokenizer))
        self.normalizes = self.tokenizer.normalizer is not None
        self.words: dict[str, bytes] = {}
        self.bytes_of = np.zeros(size, np.int64)  # bytes of text behind each id
        if self.cut is not None:
            for token, number in vocabulary.items():
                self.bytes_of[number] = len(token)  # a byte-level vocabulary spells one character a byte
            for number, added in self.tokenizer.get_added_tokens_decoder().items():
                self.bytes_of[number] = len(added.content.encode())

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "TextEncoder":
        """Returns the encoder of a Transformers tokenizer.

        Raises:
            UserError: it has no end-of-text token to separate documents.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path}: this tokenizer has no eos token, which must separate documents"
            )
        return cls(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextEncoder, (self.serialized, self.eos_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        content = f"{self.eos_token_id} {self.tokenizer.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the ids of the documents, each between the tokenizer's own special tokens and ended by eos."""
        bodies = self._encode_whole(texts) if self.cut is None else self._encode_words(texts, self.cut)
        documents = [self.prefix + body + self.suffix for body in bodies]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) // self.dtype.itemsize
        hashes = np.fromiter(map(text_hash, texts), np.uint64, len(texts))
        return Encoded(np.frombuffer(b"".join(documents), self.dtype), lengths, hashes)

    def _encode_whole(self, texts: list[str]) -> list[bytes]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encodings]

    def _encode_words(self, texts: list[str], cut: Words) -> list[bytes]:
        if self.normalizes:  # to NFC, which leaves no trace across whitespace
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        words = [cut.pattern.findall(text) for text in texts]
        if len(self.words) > MOST_WORDS:
            self.words.clear()
        new = set(chain.from_iterable(words)).difference(self.words)
        together = [word for word in new if word[0] in cut.begins and not word[-1].isspace()]
        self._learn_together(together)
        alone = list(new.difference(self.words))
        self.words.update(zip(alone, self._encode_whole(alone), strict=True))
        return [b"".join(map(self.words.__getitem__, each)) for each in words]

    def _learn_together(self, words: list[str]) -> None:
        """Encodes many words as one text, and cuts the ids apart where the words' bytes end."""
        for start in range(0, len(words), WORDS_TOGETHER):
            group = words[start : start + WORDS_TOGETHER]
            ids = self._encode_whole(["".join(group)])[0]
            token_ends = np.cumsum(self.bytes_of[np.frombuffer(ids, self.dtype)])
            word_ends = np.fromiter(accumulate(len(word.encode()) for word in group), np.int64, len(group))
            last = np.searchsorted(token_ends, word_ends)
            if token_ends[-1] != word_ends[-1] or (token_ends[last] != word_ends).any():
                continue  # characters that this vocabulary lacks: these words are encoded one by one
            cuts = ((last + 1) * self.dtype.itemsize).tolist()
            pieces = [ids[begin:end] for begin, end in zip([0, *cuts], cuts, strict=False)]
            self.words.update(zip(group, pieces, strict=True))


def words_of(tokenizer: dict[str, Any]) -> Words | None:
    """Returns how text can be cut for a serialized tokenizer without changing an id; None where that is uncertain."""
    model, normalizer, pre = tokenizer["model"], tokenizer["normalizer"], tokenizer["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    kinds = [step["type"] for step in steps]
    merging = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model["type"] != "BPE"
        or any(model.get(key) for key in merging)
        or (normalizer is not None and normalizer["type"] != "NFC")
        or kinds not in (["ByteLevel"], ["Digits", "ByteLevel"], ["Split", "ByteLevel"])
        or steps[-1]["add_prefix_space"]
        or any(_reaches_across(token) for token in tokenizer["added_tokens"])
    ):
        return None
    if kinds[0] != "Split":
        return GPT2_WORDS if steps[-1]["use_regex"] else None
    cut = steps[0]
    known = cut["pattern"].get("Regex") in PATTERNS and cut["behavior"] == "Isolated" and not cut["invert"]
    return PATTERN_WORDS if known and not steps[-1]["use_regex"] else None


def _reaches_across(token: dict[str, Any]) -> bool:
    """Whether an added token can match across a cut; special ones are read as text here."""
    cuts = re.search(rf"\s|[A-Za-z]{_MARKS}", token["content"])
    reaches = token["lstrip"] or token["rstrip"] or token["single_word"] or cuts
    return bool(reaches) and not token["special"]
