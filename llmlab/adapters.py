"""LoRA adapters: resolves presets to target modules for any architecture, and the PEFT configuration. Reading adapters
is in `model/build.py`, merging them in `training/merge.py`."""

import re
from collections.abc import Iterable

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.files import read_table
from llmlab.settings.lora import LoraSettings

NAMES = read_table("llmlab", "adapters")


def find_targets(model: nn.Module, preset: str, custom: Iterable[str] | None = None) -> list[str]:
    """Returns the module-name endings of a preset in this model, with the parent's name where layers of another role
    have the same (GPT-2's `mlp.c_proj`). Source: seed, LLM-Lab document, "LoRA Parameters"."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    roles = {
        name: _role(name)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and "." in name
    }
    leaves = sorted({_leaf(name) for name in roles})
    if preset == "custom":
        endings = list(custom or ())
        for ending in endings:
            if not any(f".{name}".endswith(f".{ending}") for name in roles):
                problem = f"no linear module ends in '{ending}'{did_you_mean(ending, leaves)}"
                raise UserError(f"lora_target_modules: {problem}; expected some of {', '.join(leaves)}")
        return endings
    attention, ffn = {"attention"}, {"ffn"}
    adapts = {"minimal": attention, "attention_only": attention, "ffn_only": ffn, "all": attention | ffn}[preset]
    targets = {name for name, role in roles.items() if role in adapts}
    if preset == "minimal":
        targets = {name for name in targets if _leaf(name) in (*NAMES["query_or_value"], *NAMES["fused"])}
    if not targets:
        raise UserError(
            f"lora_preset = {preset}: it matches no module of this architecture; set lora_preset=custom and "
            f"lora_target_modules to some of {', '.join(leaves)}"
        )
    others = {_leaf(name) for name in roles.keys() - targets}
    return sorted({".".join(name.split(".")[-2:]) if _leaf(name) in others else _leaf(name) for name in targets})


def _role(name: str) -> str | None:
    *parents, leaf = name.split(".")
    patterns = NAMES["parents"].items()
    roles = (
        role for part in reversed(parents) for role, pattern in patterns if re.search(pattern, part, re.IGNORECASE)
    )
    return next(roles, "ffn" if leaf in NAMES["ffn"] else None)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def lora_config(
    model: PreTrainedModel, settings: LoraSettings, new_tokens: Iterable[int] = (), *, task: str = "CAUSAL_LM"
) -> LoraConfig:
    """Returns the PEFT configuration of these settings for this model. The embedding rows (and output rows) of
    `new_tokens` are trained beside the adapter."""
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = {_leaf(name) for name in modules}
    whole = set(settings.modules_to_save or ())
    if unknown := sorted(whole - leaves):
        expected = ", ".join(leaf for leaf in sorted(leaves) if not leaf.isdigit())
        problem = f"no module is called '{unknown[0]}'{did_you_mean(unknown[0], sorted(leaves))}"
        raise UserError(f"modules_to_save: {problem}; expected some of {expected}")
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = outputs is None or outputs.weight is inputs.weight  # a classifier has no output embedding
    embeddings = [_leaf(name) for name, module in modules.items() if module is inputs]
    embeddings += [_leaf(name) for name, module in modules.items() if module is outputs and not is_tied]
    rows = {leaf: list(new_tokens) for leaf in embeddings if new_tokens and leaf not in whole}
    options = {name: getattr(settings, name) for name in ("lora_dropout", "use_dora", "use_rslora", "modules_to_save")}
    options |= {"r": settings.lora_r, "lora_alpha": settings.alpha, "bias": settings.lora_bias}
    targets = find_targets(model, settings.lora_preset, settings.lora_target_modules)
    return LoraConfig(task_type=task, target_modules=targets, trainable_token_indices=rows or None, **options)


def trainable_share(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Returns (trainable parameters, all parameters) of a model; a 4-bit weight counts as one parameter."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return model.num_parameters(only_trainable=True), model.num_parameters()
