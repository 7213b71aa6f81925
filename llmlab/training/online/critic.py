"""The value function of PPO: a value head on the policy's hidden states or on a backbone of its own. What it learns
from, and its loss, are in `ppo.py`; how it is saved and restored is in `critic_file.py`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmlab.training.online.critic_file import PolicyPart


class Critic(PolicyPart):
    """Value function: predicts the return at each token, via hooks on the policy's forward passes.

    It is a submodule of the policy, so that one optimizer and one DDP/FSDP wrapper cover both. A `separate` critic has
    a copy of the policy's backbone, which shares frozen tensors if it may (with LoRA a second set of adapters), or
    backbone and head (`score`) of the classifier `scorer`.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        *,
        separate: bool,
        scorer: PreTrainedModel | PeftModel | None = None,
        shares_frozen: bool = True,
    ):
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
        self.attach(policy)

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
