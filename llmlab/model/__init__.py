"""The decoder: configuration, model, conversion to and from its relatives, and what it costs.

Public names are imported when they are first used, since they bring torch and Transformers with them.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ADAPTER_CONFIG": "build",
    "Adapter": "build",
    "LLMLabConfig": "configuration",
    "LLMLabModel": "modeling",
    "LLMLabForCausalLM": "modeling",
    "LLMLabForSequenceClassification": "modeling",
    "register": "modeling",
    "build_config": "build",
    "check_folder": "build",
    "fit_context": "build",
    "fit_vocabulary": "build",
    "load_classifier": "build",
    "load_config": "build",
    "load_model": "build",
    "new_model": "build",
    "opening": "build",
    "read_adapter": "build",
    "from_llmlab": "convert",
    "to_llmlab": "convert",
    "ModelSize": "size",
    "TrainingMemory": "size",
    "measure": "size",
    "linear_cross_entropy": "loss",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab.model' has no attribute '{name}'")
    return getattr(import_module(f"llmlab.model.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
