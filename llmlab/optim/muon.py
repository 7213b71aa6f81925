"""torch's Muon for the hidden matrices and AdamW for the rest, joined in one `torch.optim.Optimizer`.

`groups` sorts the parameters.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from llmlab.settings.errors import UserError

ADAMW_RATE = 0.1  # AdamW's learning rate over Muon's. Source: seed, LLM-Lab document, "Optimizer"


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) on matrices, and AdamW at a tenth of the rate on everything else.

    Muon's step is scaled by `0.2 * sqrt(max(rows, columns))` (Liu et al. 2025, arXiv:2502.16982), which gives it the
    size of an AdamW step: learning rates tuned for AdamW carry over, and a transposed weight gets the same step.

    Args:
        matrices: parameter groups with 2-D parameters only, each with its `weight_decay`.
        others: parameter groups for AdamW, each with its `weight_decay`.
        lr: Muon's learning rate.
        momentum: decay of Muon's momentum.
        nesterov: whether to use Nesterov momentum.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        muon = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"lr": ADAMW_RATE * lr, "betas": betas, "eps": eps, "fused": True}
        groups = [{**group, **muon, "part": "muon"} for group in matrices if group["params"]]
        if not groups:
            raise UserError("optimizer = muon: no hidden 2-D weight is trainable; expected adamw, adafactor or lion")
        if not nesterov and any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            # torch 2.13 normalizes a bf16 momentum buffer in place, losing its norm
            raise UserError("muon_nesterov = false: needs fp32 weights, and these are bf16; expected true")
        groups += [{**group, **adamw, "part": "adamw"} for group in others if group["params"]]
        super().__init__(groups, {"lr": lr})
        self._join()

    def _join(self) -> None:
        """Makes the two optimizers share this one's groups and state."""
        muon, adamw = ([group for group in self.param_groups if group["part"] == part] for part in ("muon", "adamw"))
        self._optimizers = [Muon(muon), *([AdamW(adamw, fused=True)] if adamw else [])]
        for optimizer in self._optimizers:
            optimizer.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called at the end of load_state_dict too
        self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss
