"""Whole tensors of a model and an optimizer that FSDP2 shards: checkpoints hold what one process would write. So any
number of processes, sharded or not, goes on from any of them. Tensors that are no DTensors are copied as usual."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llmlab.settings.files import read_json


def gather(tree: Any, *, keep: bool) -> Any:
    """Returns nested values with sharded tensors whole on the CPU, or None on processes that do not `keep` them."""

    def whole(shards: DTensor) -> Tensor | None:
        tensor = shards.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map_only(DTensor, whole, tree)


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor, or this process's shards of it where `like` is sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def scatter_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimizer's whole state dict with this process's shards of what has its parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(value: Any, parameter: Tensor) -> Any:
        has_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        return scatter(value, parameter) if has_shape else value

    shards = {
        index: {name: part(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": shards}


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copies the weights or adapters in a folder into a model, of which each process may have its shards."""
    if isinstance(model, PeftModel):
        whole, mine = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(model)
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        whole = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
        mine = model.state_dict()
    for name in mine.keys() & whole.keys():  # the other names of tied weights are not saved
        mine[name].copy_(scatter(whole[name], mine[name]))
