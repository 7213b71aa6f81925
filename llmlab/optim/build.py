"""Builds the optimizer that a stage's settings name, over parameter groups that hold for every architecture. The
schedule belongs to the trainer's arguments."""

from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Adafactor, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmlab.optim.sophia import Sophia
from llmlab.settings.errors import UserError
from llmlab.settings.optimizer import OptimizerSettings

Parameters = list[nn.Parameter]
Group = dict[str, Any]
ADAMW_RATE = 0.1  # AdamW's learning rate over Muon's. Source: seed, LLM-Lab document, "Optimizer"
BATCHED_SIZE = 2**19  # elements of the largest matrix up to which Muon's products are batched


class ParameterKinds(NamedTuple):
    """Three disjoint lists that together hold every trainable parameter once, tied weights included."""

    hidden: Parameters  # 2-D weights of linear layers in the backbone, LoRA factors among them: orthogonalized by Muon
    other_weights: Parameters  # untied output heads, expert stacks, routers: decayed, never orthogonalized
    undecayed: Parameters  # embeddings, norms, biases and other vectors


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


def build_optimizer(
    model: PreTrainedModel | PeftModel, settings: OptimizerSettings, *, learning_rate: float, weight_decay: float
) -> Optimizer:
    """Returns the optimizer over the model's trainable parameters; weight decay spares norms, biases and embeddings.

    Source: seed, LLM-Lab document, "Optimizer".
    """
    kinds = sort_parameters(model)
    if not any(kinds):
        raise UserError("the model has no trainable parameter: every weight is frozen")
    hidden: Group = {"params": kinds.hidden, "weight_decay": weight_decay}
    other_weights: Group = {"params": kinds.other_weights, "weight_decay": weight_decay}
    undecayed: Group = {"params": kinds.undecayed, "weight_decay": 0.0}
    own_rates = _split_off(model, settings, other_weights, undecayed)
    adam = {"betas": (settings.adamw_beta1, settings.adamw_beta2), "eps": settings.adamw_eps}
    lion = {"betas": (settings.lion_beta1, settings.lion_beta2)}

    if settings.optimizer == "muon":
        from llmlab.optim.muon import MuonAndAdamW  # a second of import, for those who use it

        if not kinds.hidden:
            raise UserError("optimizer = muon: no hidden 2-D weight is trainable; expected adamw, adafactor or lion")
        # steps have the size of AdamW's (Liu et al. 2025, arXiv:2502.16982): learning rates carry over
        muon = {"lr": learning_rate, "use_muon": True, "use_adjusted_lr": True}
        muon |= {"momentum": settings.muon_momentum, "nesterov": settings.muon_nesterov}
        adamw = {"lr": ADAMW_RATE * learning_rate, "use_muon": False, "foreach": True, **adam}
        groups = [hidden | muon, *(adamw | group for group in (other_weights, undecayed, *own_rates))]
        # large matrices keep all cores busy one by one, with less memory
        batched = max(weight.numel() for weight in kinds.hidden) <= BATCHED_SIZE
        optimizer = MuonAndAdamW([group for group in groups if group["params"]], foreach=batched)
        optimizer.defaults["lr"] = learning_rate  # which some schedules read
        return optimizer
    decayed = {"params": kinds.hidden + other_weights["params"], "weight_decay": weight_decay}
    groups = [group for group in (decayed, undecayed, *own_rates) if group["params"]]
    if settings.optimizer.endswith("bit"):
        own = lion if "lion" in settings.optimizer else adam
        return _from_bitsandbytes(model, groups, settings.optimizer, lr=learning_rate, **own)
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=learning_rate, fused=True, **adam)
    if settings.optimizer == "adafactor":
        # as Transformers' Trainer sets it up: the learning rate comes from the schedule, not from the step count
        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    if settings.optimizer == "lion":
        from pytorch_optimizer import Lion  # a second of import, for those who use it

        return Lion(groups, lr=learning_rate, **lion)
    betas, every = (settings.sophia_beta1, settings.sophia_beta2), settings.sophia_update_every
    return Sophia(groups, lr=learning_rate, betas=betas, rho=settings.sophia_rho, update_every=every)


def _split_off(model: Any, settings: OptimizerSettings, other_weights: Group, undecayed: Group) -> list[Group]:
    """Moves the embeddings and the output head out of these groups where they have learning rates of their own."""
    transformer = model.get_base_model() if isinstance(model, PeftModel) else model
    output = transformer.get_output_embeddings() or getattr(transformer, "score", None)
    head = set() if output is None else set(output.parameters())
    embeddings = set(transformer.get_input_embeddings().parameters())
    values = getattr(transformer.base_model, "value_embeddings", None)  # of llmlab's decoder
    embeddings |= set() if values is None else set(values.parameters())
    groups = []
    for key, chosen, group in (("embedding_lr", embeddings, undecayed), ("head_lr", head, other_weights)):
        if (rate := getattr(settings, key)) is None:
            continue
        own = [parameter for parameter in group["params"] if parameter in chosen]
        if not own:
            tied = ": it is tied to the embeddings, whose rate is embedding_lr" if head & embeddings else ""
            what = "embedding" if key == "embedding_lr" else "output head of its own"
            raise UserError(f"{key} = {rate:g}: no {what} is trained{tied}; expected none")
        group["params"] = [parameter for parameter in group["params"] if parameter not in chosen]
        groups.append({**group, "params": own, "lr": rate})
    return groups


def _from_bitsandbytes(model: nn.Module, groups: list[Group], name: str, **options: Any) -> Optimizer:
    """Returns an optimizer with 8-bit states, or with states that are paged between GPU and CPU memory."""
    from bitsandbytes import optim  # an extra; and a second or two, for those who use it

    # on a CPU there is nothing to page to, and bitsandbytes warns for each weight
    paged = name.startswith("paged") and next(model.parameters()).device.type != "cpu"
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # as in Transformers: 8-bit states of embeddings are unstable
            optim.GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    kind = optim.Lion if "lion" in name else optim.AdamW
    return kind(groups, optim_bits=8 if "8bit" in name else 32, is_paged=paged, **options)


def check_supported(optimizer: str, distributed_type: str) -> None:
    """Refuses an optimizer that does not work under Accelerate's distributed type, such as `DEEPSPEED` or `FSDP`."""
    if optimizer in ("sophia", "muon") and distributed_type == "DEEPSPEED":
        problem = f"DeepSpeed ZeRO flattens weights and gradients, which {optimizer} cannot use"
        expected = "expected adamw, adafactor or lion, or FSDP2 instead of DeepSpeed"
        raise UserError(f"optimizer = {optimizer}: {problem}; {expected}")
    if (optimizer == "adafactor" or optimizer.endswith("bit")) and distributed_type == "FSDP":
        problem = "it cannot update weights that FSDP shards"
        raise UserError(f"optimizer = {optimizer}: {problem}; expected adamw, lion, sophia or muon")
