"""Loads environments by name."""

import importlib.util
from typing import Any


def load_environment(spec: str, *, allow_code: bool = False, reward_config: Any = None) -> Any:
    if ".py:" in spec:
        file, _, name = spec.rpartition(":")
        module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("stub", file))
        found.loader.exec_module(module)
        return getattr(module, name)
    from llmlab.simulator.world import Simulator

    return lambda: Simulator(reward_config=reward_config)
