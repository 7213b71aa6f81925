"""Data sources, corpora and tokenizers.  Public names are imported when they are first used."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Corpus": "text.corpus",
    "CorpusReport": "text.corpus",
    "build_corpus": "text.corpus",
    "load_text": "sources",
    "load_tokenizer": "tokenizer",
    "stop_token_ids": "tokenizer",
    "learn_bpe": "tokenizer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab.data' has no attribute '{name}'")
    return getattr(import_module(f"llmlab.data.{_HOMES[name]}"), name)
