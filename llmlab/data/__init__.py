"""Data sources, corpora and tokenizers.  Public names are imported when they are first used."""

from importlib import import_module
from typing import Any

_HOMES = {
    **dict.fromkeys(("Corpus", "CorpusReport", "build_corpus"), "text.corpus"),
    **dict.fromkeys(("learn_bpe", "load_tokenizer", "stop_token_ids"), "tokenizer"),
    "load_text": "sources",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab.data' has no attribute '{name}'")
    return getattr(import_module(f"llmlab.data.{_HOMES[name]}"), name)
