"""Tokenizers: loaded from wherever they are, or trained on text as a byte-level BPE for ChatML. `<|endoftext|>` is the
eos token and ends a document, `<|im_end|>` a turn; generation stops at either, so one vocabulary serves base and chat
models. `<|im_start|>` is the bos token of conversations; like `<|pad|>` it is never added to plain text."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, reading, reason_of
from llmlab.settings.paths import expand, is_local, missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, BOS, END_OF_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (EOS, BOS, END_OF_TURN, PAD)
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""One id each, but not special: decoding keeps them, so that calls can be read from what a model wrote."""

SMALLEST = 256 + len(SPECIAL_TOKENS) + len(TOOL_TAGS)  # entries of a vocabulary without merges: one token a byte

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before merging, which llama.cpp and Ollama know; every digit stands alone."""

TEMPLATE_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
"""Python errors raised from within Jinja templates."""

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "llmlab.json"}
FILES |= {".llmlab.lock", ".llmlab.pipeline"}  # the lock of the run itself

KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "[EOS]")
"""Likely eos tokens of a bare tokenizer.json, which does not name one."""


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Loads the fast tokenizer of a hub id, of a folder, or of the path of a `tokenizer.json`."""
    from llmlab.model.auto import load_auto, opening

    path = expand(name)
    if path.is_file() and not path.with_name("tokenizer_config.json").is_file():
        return _load_tokenizer_json(path)
    if path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("*vocab*")):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise UserError(f"{name}: there is no tokenizer in this folder; expected tokenizer.json (found {found})")
    if not path.exists() and is_local(name):
        raise missing(name)
    with opening(path if path.exists() else name, "a tokenizer"):
        tokenizer = load_auto("AutoTokenizer", path.parent if path.is_file() else path if path.is_dir() else name)
    if not tokenizer.is_fast:
        raise UserError(f"{name}: this tokenizer has no tokenizer.json (the fast form), which llmlab needs")
    return tokenizer


def _load_tokenizer_json(path: Path) -> "PreTrainedTokenizerFast":
    """Loads a tokenizer.json that has no configuration beside it, and guesses which tokens are eos and padding."""
    from transformers import PreTrainedTokenizerFast

    with reading(path, "a tokenizer.json"):
        backend = Tokenizer.from_file(str(path))
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    eos = next((token for token in KNOWN_EOS if token in special), None)
    pad = next((token for token in (PAD, "<pad>", "[PAD]") if token in special), None)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)


def stop_token_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Returns the ids at which generation stops: the tokenizer's eos, and the end of a turn where it has one."""
    vocabulary = tokenizer.get_vocab()
    stops = [tokenizer.eos_token_id, vocabulary.get(END_OF_TURN)]
    return list(dict.fromkeys(stop for stop in stops if stop is not None))


def learn_bpe(
    sources: Sequence[DataSource],
    vocab_size: int,
    output_dir: str | Path,
    *,
    max_bytes: int = 200_000_000,
    allow_dropped: float = 0.05,
    show_progress: bool = True,
) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE on `max_bytes` of text and saves it, with the ChatML template, as Transformers does."""
    from transformers import PreTrainedTokenizerFast

    folder = expand(output_dir)
    if vocab_size < SMALLEST:
        parts = f"256 bytes, {len(SPECIAL_TOKENS)} special tokens and {len(TOOL_TAGS)} tool tags"
        raise UserError(f"vocab_size = {vocab_size}: expected at least {SMALLEST}: {parts}")
    if folder.is_file():
        raise UserError(f"output_dir = {folder}: this is a file; expected a folder")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES) if folder.is_dir() else []
    if others:
        found = f"it holds more than a tokenizer ({', '.join(others[:3])})"
        raise UserError(f"output_dir = {folder}: {found}; choose another")
    backend = _train_bpe(_sample(sources, max_bytes, allow_dropped), vocab_size, show_progress)
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached < vocab_size:
        names = ", ".join(source.name for source in sources)
        problem = f"{names} has enough merges for {reached} entries only"
        raise UserError(f"vocab_size = {vocab_size}: {problem}; give more text, or vocab_size {reached}")
    special = {"eos_token": EOS, "bos_token": BOS, "pad_token": PAD, "extra_special_tokens": [END_OF_TURN]}
    options = {"clean_up_tokenization_spaces": False, "chat_template": TEMPLATE.read_text(encoding="utf-8")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)
    try:  # into a temporary folder first, so that no half-written tokenizer is left behind
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            tokenizer.save_pretrained(temporary)
            for path in sorted(Path(temporary).iterdir()):
                os.replace(path, folder / path.name)
    except Exception as error:  # the library raises nothing narrower where the disk is full
        raise UserError(f"output_dir = {folder}: cannot be written: {reason_of(error)}") from None
    return tokenizer


def _train_bpe(texts: Iterator[str], vocab_size: int, show_progress: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TOOL_TAGS),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TOOL_TAGS])
    return backend


def _sample(sources: Sequence[DataSource], max_bytes: int, allow_dropped: float) -> Iterator[str]:
    """Yields text from the start of each source, up to its share of the bytes."""
    from llmlab.data.sources import Tally, load_text  # not for those who only load one

    weights = sum(source.weight for source in sources)
    for source in sources:
        left, tally = max_bytes * source.weight / weights, Tally()
        for text in load_text(source, streaming=True).texts(tally, allow_dropped):
            yield text if len(text) <= left else text[: int(left)]
            left -= len(text.encode())
            if left <= 0:
                break
        tally.check(source.name, allow_dropped)
