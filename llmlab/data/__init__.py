"""Text corpora and tokenizers: from sources to packed rows.  Public names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.data.sources import load_text as load_text
    from llmlab.data.text.corpus import Corpus as Corpus
    from llmlab.data.text.corpus import CorpusReport as CorpusReport
    from llmlab.data.text.corpus import build_corpus as build_corpus
    from llmlab.data.tokenizer import load_tokenizer as load_tokenizer
    from llmlab.data.tokenizer import stop_token_ids as stop_token_ids
    from llmlab.data.tokenizer import train_tokenizer as train_tokenizer

_HOMES = {
    "Corpus": "text.corpus",
    "CorpusReport": "text.corpus",
    "build_corpus": "text.corpus",
    "load_text": "sources",
    "load_tokenizer": "tokenizer",
    "stop_token_ids": "tokenizer",
    "train_tokenizer": "tokenizer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab.data' has no attribute '{name}'")
    return getattr(import_module(f"llmlab.data.{_HOMES[name]}"), name)
