"""Imports Transformers' model classes 0.8 s faster in a process that only samples.

They import torch's sharded tensors (for sharded weights), its compiler (for compiled kernels) and SciPy (for losses of
object detection). Sharded tensors and SciPy are left out, as on machines that lack them; the compiler is imported once
something asks for more than its decorators. Not for a process that also trains.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from llmlab.stages import import_heavy

PROBES = ("is_torch_distributed_available", "is_scipy_available")
COMPILER = "torch._dynamo"
TRACED_MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"


def import_model_classes() -> None:
    """Imports Transformers' model classes, where nothing has yet."""
    if "transformers.modeling_utils" in sys.modules or COMPILER in sys.modules:
        return
    import_heavy("torch")
    utils = import_heavy("transformers.utils")
    masks = ModuleType(TRACED_MASKS)
    masks.TransformGetItemToIndex = _index_by_tensors  # type: ignore[attr-defined]
    sys.modules |= {COMPILER: _Compiler(COMPILER), TRACED_MASKS: masks}
    originals = [(owner, name, getattr(owner, name)) for owner in (utils, utils.import_utils) for name in PROBES]
    for owner, name, _ in originals:
        setattr(owner, name, lambda: False)
    try:
        import_heavy("transformers.modeling_utils")
        import_heavy("transformers.generation.utils")
    finally:
        for original in originals:
            setattr(*original)


def _unchanged(function: Any = None, *_: Any, **options: Any) -> Any:
    """Stands for the compiler's decorators, with and without arguments."""
    return (lambda each: each) if function is None else function


class _Compiler(ModuleType):
    """torch's compiler as long as only its decorators are used; what else is asked for imports it."""

    disable = allow_in_graph = assume_constant_result = staticmethod(_unchanged)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # of its modules
            raise AttributeError(name)
        for module in (COMPILER, TRACED_MASKS):
            sys.modules.pop(module, None)
        return getattr(import_module(COMPILER), name)


def _index_by_tensors() -> Any:
    """Returns the mode in which masks of several conditions are traced, by the compiler itself."""
    return sys.modules[COMPILER]._trace_wrapped_higher_order_op.TransformGetItemToIndex()
