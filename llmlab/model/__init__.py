"""The decoder, loading models and adapters, conversion between architectures, and what a model costs.

Public names are imported when they are first used, since they bring torch and Transformers with them.
"""

from importlib import import_module
from typing import Any

_LOADING = ("ADAPTER_CONFIG", "Adapter", "load_classifier", "load_config", "load_model", "read_adapter")
_MAKING = ("build_config", "fit_context", "fit_vocabulary", "new_model", "save_model")
_HOMES = {
    "LLMLabConfig": "configuration",
    **dict.fromkeys(("LLMLabModel", "LLMLabForCausalLM", "LLMLabForSequenceClassification"), "modeling"),
    **dict.fromkeys((*_LOADING, *_MAKING), "build"),
    **dict.fromkeys(("from_llmlab", "to_llmlab"), "convert"),
    **dict.fromkeys(("ModelSize", "measure"), "size"),
    "opening": "auto",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab.model' has no attribute '{name}'")
    return getattr(import_module(f"llmlab.model.{_HOMES[name]}"), name)
