"""The value function of PPO: a value head on the policy's hidden states or on a backbone of its own. What it learns
from, and its loss, are in `ppo.py`. Nothing of it is in the policy's files: checkpoints have a file of its own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlab.inference import Model
from llmlab.runs._trl import gather, scatter

FILE = "critic.safetensors"


class Critic(nn.Module):
    """Value function: predicts the return at each token, via hooks on the policy's forward passes.

    It is a submodule of the policy, so that one optimizer and one DDP/FSDP wrapper cover both. A `separate` critic has
    a copy of the policy's backbone, which shares frozen tensors if it may (with LoRA a second set of adapters), or
    backbone and head (`score`) of the classifier `scorer`.
    """

    def __init__(self, policy: Model, *, separate: bool, scorer: Model | None = None, shares_frozen: bool = True):
        super().__init__()
        base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        self.backbone = None
        if separate and scorer is not None:
            self.backbone = (scorer.get_base_model() if isinstance(scorer, PeftModel) else scorer).base_model
        elif separate:
            frozen = [p for p in base.base_model.parameters() if shares_frozen and not p.requires_grad]
            self.backbone = copy.deepcopy(base.base_model, {id(p): p for p in frozen})
        width = (base.config if self.backbone is None else self.backbone.config).get_text_config().hidden_size
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # initial values are 0, not noise
        nn.init.zeros_(self.head.bias)
        if separate and scorer is not None:
            with torch.no_grad():
                self.head.weight.copy_(scorer.score.weight)
        self.to(next(base.parameters()).device)
        self.collected: list[Tensor] | None = None
        base.base_model.register_forward_hook(self._collect, with_kwargs=True)
        self.register_load_state_dict_post_hook(_forgive)
        policy.critic = self
        object.__setattr__(self, "policy", policy)  # outside the module tree: a parent reference would be a cycle
        if isinstance(policy, PeftModel):  # PEFT would look for the critic's adapters in the policy's files
            policy.save_pretrained = self.detached()(policy.save_pretrained)
            policy.load_adapter = self.detached()(policy.load_adapter)

    @contextmanager
    def collect_values(self) -> Iterator[list[Tensor]]:
        """Collects the values, (batch, time), of every forward pass of the policy's backbone within."""
        self.collected = []
        try:
            yield self.collected
        finally:
            self.collected = None

    def _collect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.collected is None:
            return
        output = output if self.backbone is None else self.backbone(*args, **kwargs)
        hidden = output.last_hidden_state  # (batch, time, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            self.collected.append(self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float())

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Removes the critic from the policy's modules within, or within each call of a method it decorates."""
        del self.policy.critic
        try:
            yield
        finally:
            self.policy.critic = self

    def trained(self) -> dict[str, Tensor]:
        """Returns the trainable parameters by name; frozen ones are restored from their source."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path | None) -> None:
        """Saves the trainable parameters, on the process that has a folder; all call it, as they may be sharded."""
        whole = gather(self.trained(), keep=folder is not None)
        if folder is not None:
            save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        saved, mine = load_file(folder / FILE), self.trained()
        if saved.keys() != mine.keys():
            others = sorted(saved.keys() ^ mine.keys())
            raise ValueError(f"{folder / FILE}: a critic with other parameters: {others[:3]} ...")
        for name, tensor in mine.items():
            tensor.copy_(scatter(saved[name], tensor))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Is empty, so that no export of the policy has a part of the critic in it."""
        return kwargs.get("destination", args[0] if args else {})


def _forgive(critic: Critic, keys: Any) -> None:
    """Lets a strict load, which DeepSpeed's is, go without the critic's weights: they have a file of their own."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "critic." not in key]
