"""Sorts a model's trainable parameters into an optimizer's groups, by the type and place of their modules.

That holds for every Transformers architecture and under PEFT.
"""

from typing import NamedTuple

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Parameters = list[nn.Parameter]


class ParameterKinds(NamedTuple):
    """Three disjoint lists that together hold every trainable parameter once, tied weights included."""

    hidden: Parameters
    """2-D weights of linear layers in the backbone, LoRA factors among them: decayed, and orthogonalized by Muon."""

    other_weights: Parameters
    """Untied output heads, expert stacks, routers: decayed, never orthogonalized."""

    undecayed: Parameters
    """Embeddings, norms, biases and other vectors."""


def sort_parameters(model: PreTrainedModel | PeftModel) -> ParameterKinds:
    """Returns the trainable parameters of a model by kind; a linear layer is hidden if it is in the `base_model`."""
    transformer = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = set(transformer.base_model.parameters())
    # a LoRA wrapper around the embedding is no nn.Embedding itself, but what it adds is one
    embeddings = set(transformer.get_input_embeddings().parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embeddings.update(module.parameters())

    kinds, seen = ParameterKinds([], [], []), set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()  # LayerNorm, LlamaRMSNorm, CohereLayerNorm (whose is 2-D)
        is_linear = isinstance(module, (nn.Linear, Conv1D))  # the second is GPT-2's, with a transposed weight
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            is_vector = parameter.ndim < 2 or name.endswith("bias")  # an expert stack's biases are 2-D
            if is_vector or is_norm or parameter in embeddings:
                kinds.undecayed.append(parameter)
            elif is_linear and parameter in backbone:
                kinds.hidden.append(parameter)
            else:
                kinds.other_weights.append(parameter)
    return kinds
