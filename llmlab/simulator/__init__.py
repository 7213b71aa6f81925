"""Environments in which a policy acts by calling tools: the contract, llmlab's own tool world, wrappers of others.
Public names are imported when they are first used."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Environment": "environment",
    "Simulator": "world",
    **dict.fromkeys(("from_gymnasium", "from_openenv"), "environment"),
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab.simulator' has no attribute '{name}'")
    return getattr(import_module(f"llmlab.simulator.{_HOMES[name]}"), name)
