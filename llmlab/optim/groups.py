"""Sorts a model's trainable parameters by what an optimizer may do to them.

It goes by the type of the module that owns a parameter and by where that module sits, so that it holds for every
Transformers architecture and under PEFT.  Learning rates and decay values are not decided here.
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
    """Returns the trainable parameters of a model by kind.

    A linear layer is "hidden" when it lies in the backbone (`base_model`), which is how Transformers tells it from
    language-model, classification and value heads.  GPT-2's `Conv1D` is a linear layer with a transposed weight, and
    LoRA's A and B are linear layers of their own.
    """
    transformer = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = set(transformer.base_model.parameters())
    # A LoRA wrapper around the embedding is no nn.Embedding itself, but what it adds is one.
    embeddings = set(transformer.get_input_embeddings().parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embeddings.update(module.parameters())

    kinds, seen = ParameterKinds([], [], []), set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()  # LayerNorm, LlamaRMSNorm, CohereLayerNorm (whose is 2-D)
        is_linear = isinstance(module, (nn.Linear, Conv1D))
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
