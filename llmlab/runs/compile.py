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
from transformers import PreTrainedModel

from llmlab.settings.errors import UserError

WARM_UP = 40.0  # seconds until the first compiled step, training and evaluation together, from an empty cache
SAVED = {"cpu": 0.3, "cuda": 0.2}  # share of a step that compiling saves
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
        return False, f"off: this run would save about {_duration(saved)} and wait up to {_duration(WARM_UP)} for it"
    return True, f"on: saves about {_duration(saved)} for up to {_duration(WARM_UP)} of waiting at the start"


def missing_tool(device_type: str) -> str | None:
    """Returns what torch.compile needs and this machine lacks, or None."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", default) if device_type == "cpu" else os.environ.get("CC", "gcc")
    if sys.platform != "win32" and shutil.which(compiler) is None:
        return f"a {'C++' if device_type == 'cpu' else 'C'} compiler ({compiler})"
    if not any((Path(sysconfig.get_path(name)) / "Python.h").is_file() for name in ("include", "platinclude")):
        return "Python's C headers (on Debian the package python3-dev)"
    return None


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each layer of llmlab's decoder in place, for batches of one length."""
    for layer in model.model.layers:
        layer.compile(backend=keep_products_only, dynamic=False)


def compile_if_worth(
    model: torch.nn.Module, setting: Literal["auto"] | bool, *, device_type: str, steps: int, tokens_per_step: float
) -> str:
    """Compiles each layer of any decoder in place, for batches of varying length, where it pays; returns why."""
    compiled, reason = decide_compile(
        setting,
        device_type=device_type,
        steps=steps,
        tokens_per_step=tokens_per_step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dynamic=True,
    )
    if not compiled:
        return reason
    layers = next((part for name, part in model.named_modules() if name.endswith("layers")), None)
    if layers is None:
        if setting is True:
            raise UserError("compile = true: this architecture has no list of 'layers' to compile; leave it off")
        return "off: this architecture has no list of 'layers' to compile"
    for layer in layers.children():
        layer.compile(dynamic=True)
    return reason


def keep_products_only(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a graph as `inductor` does, but saves only products and attention for the backward pass.

    What lies between them (norms, rotary embeddings, activations, bf16 copies of weights) is recomputed, which takes
    no longer than reading it back and halves the activations' memory.
    """
    # the second flag is for attention, an operator that is not torch's own
    with partitioning.patch(aggressive_recomputation=True, is_non_builtin_to_include=True):
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
