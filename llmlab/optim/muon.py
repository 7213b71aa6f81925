"""pytorch-optimizer's Muon, with torch's fused AdamW for the parameters beside its matrices."""

from typing import Any

from pytorch_optimizer import Muon
from torch import Tensor, tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


class MuonAndAdamW(Muon):
    """Muon for groups with `use_muon`, for others AdamW: the same update as Muon's own, in one pass over memory."""

    def _step_foreach(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state: dict[str, Any],
        *corrections: Any,
    ) -> None:
        if group["use_muon"] or isinstance(params[0], DTensor):
            return super()._step_foreach(group, params, grads, state, *corrections)
        adamw(
            params,
            grads,
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            [tensor(group["step"] - 1.0, device=each.device) for each in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=self.maximize,
        )
