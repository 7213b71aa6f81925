"""llmlab: from an architecture to a language model you can chat with.

Public names are imported when they are first used, so that `import llmlab` costs nothing.
"""

from importlib import import_module
from typing import Any

from llmlab.settings import CLASSES
from llmlab.stages import STAGES

__version__ = "0.1.0"

# the settings and the function of each stage, and what is of no stage
_PATHS = [f"settings.{path}" for name, path in CLASSES.items() if name != "sample"]  # which is for pipelines alone
_PATHS += [f"training.{stage.path}" for stage in STAGES.values() if stage.name != "sample"]
_PATHS += ["settings.model:ModelSettings", "settings.sources:load"]
_PATHS += ["inference:generate_text", "inference:load_for_inference"]
_HOMES = {name: f"llmlab.{module}" for module, _, name in (path.partition(":") for path in _PATHS)}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
