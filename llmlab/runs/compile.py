"""Decides whether compiling a decoder pays for a run, and compiles its layers, which share one compilation.

The decision rests on times measured once (benchmarks/train_step.py), not on a trial in every run.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch._functorch import config as partitioning

from llmlab.settings.errors import UserError
from llmlab.terminal import duration

WARM_UP = 40.0  # seconds until compiled steps of training (25) and evaluation, from an empty cache
SAVED = {"cpu": 0.1, "cuda": 0.2}  # share of a step that compiling saves
SAVED_DYNAMIC = 0.5  # of that, where batches vary in length
SPEED = {"cpu": 1e11, "cuda": 2e14}  # eager training FLOP/s (a CPU's for each core), rather over- than underrated
MARGIN = 2.0  # a machine may be slower to compile than ours, and an interrupted run pays again


def decide_compile(
    setting: Literal["auto"] | bool,
    *,
    device_type: str,
    steps: int,
    tokens_per_step: float,
    parameters: int,
    dynamic: bool = False,
) -> tuple[bool, str]:
    """Returns whether to compile, and why, for so many steps of this process; dynamic: batches vary in length."""
    if setting is False:
        return False, "off, as asked"
    missing = missing_tool(device_type)
    if setting is True:
        if missing:
            raise UserError(
                f"compile = true: torch.compile needs {missing}, not found here; install it or leave it off"
            )
        return True, "on, as asked"
    if device_type not in SAVED:
        return False, f"off: not measured on {device_type}"
    if missing:
        return False, f"off: it needs {missing}, not found here"
    speed = SPEED[device_type] * (os.cpu_count() or 1 if device_type == "cpu" else 1)
    share = SAVED[device_type] * (SAVED_DYNAMIC if dynamic else 1)
    saved = share * steps * tokens_per_step * 6 * parameters / speed  # 6: arXiv 2001.08361, section 2.1
    if saved < MARGIN * WARM_UP:
        return False, f"off: this run would save about {duration(saved)} and wait up to {duration(WARM_UP)} for it"
    return True, f"on: saves about {duration(saved)} for up to {duration(WARM_UP)} of waiting at the start"


def missing_tool(device_type: str) -> str | None:
    """Returns what torch.compile needs and this machine lacks, or None."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", default) if device_type == "cpu" else os.environ.get("CC", "gcc")
    if sys.platform != "win32" and shutil.which(compiler) is None:
        return f"a {'C++' if device_type == 'cpu' else 'C'} compiler ({compiler})"
    if not any((Path(sysconfig.get_path(name)) / "Python.h").is_file() for name in ("include", "platinclude")):
        return "Python's C headers (on Debian the package python3-dev)"
    return None


def compile_layers(model: torch.nn.Module, *, dynamic: bool = False) -> bool:
    """Compiles each layer of a decoder in place; returns False where its architecture has no list of layers."""
    layers = next((part for name, part in model.named_modules() if name.endswith("layers")), None)
    for layer in layers.children() if layers is not None else ():
        layer.compile(dynamic=dynamic, **({} if dynamic else {"backend": recompute_elementwise}))
    return layers is not None


def compile_if_worth(model: torch.nn.Module, setting: Literal["auto"] | bool, *, dynamic: bool, **run: Any) -> str:
    """Compiles a decoder's layers where `decide_compile` says so of the run; returns why."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compiled, reason = decide_compile(setting, parameters=parameters, dynamic=dynamic, **run)
    if compiled and not compile_layers(model, dynamic=dynamic):
        reason = "this architecture has no list of 'layers' to compile"
        if setting is True:
            raise UserError(f"compile = true: {reason}; leave it off")
        return f"off: {reason}"
    return reason


def recompute_elementwise(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a graph as `inductor` does, but saves only products and attention for the backward pass.

    What lies between them (norms, rotary embeddings, activations, bf16 copies of weights) is recomputed, which takes
    no longer than reading it back and halves the activations' memory.
    """
    # the second flag is for attention, an operator that is not torch's own
    with partitioning.patch(aggressive_recomputation=True, is_non_builtin_to_include=True):
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)
