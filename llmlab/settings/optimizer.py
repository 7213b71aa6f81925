"""Optimizer and learning-rate schedule of every training stage; building them is the business of `llmlab.optim`."""

from collections.abc import Callable
from typing import Any, ClassVar

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Settings

HUGGING_FACE = {  # Transformers' names of these optimizers: implementations differ, the rule is the same
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
}


class OptimizerSettings(Settings):
    """Source: seed, LLM-Lab document, "Optimizer"; `sophia_update_every` from Liu et al. 2023 (arXiv:2305.14342)."""

    panel: ClassVar[str] = "Optimizer"

    optimizer: v.OptimizerName = "adamw"
    adamw_beta1: v.AdamwBeta1 = 0.9
    adamw_beta2: v.AdamwBeta2 = 0.999
    adamw_eps: v.AdamwEps = 1e-8
    lion_beta1: v.LionBeta1 = 0.9
    lion_beta2: v.LionBeta2 = 0.99
    sophia_beta1: v.SophiaBeta1 = 0.965
    sophia_beta2: v.SophiaBeta2 = 0.99
    sophia_rho: v.SophiaRho = 0.04
    sophia_update_every: v.SophiaUpdateEvery = 10
    muon_momentum: v.MuonMomentum = 0.95
    muon_nesterov: v.MuonNesterov = True
    scheduler: v.Scheduler = "cosine"

    @classmethod
    def translate(cls, values: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Reads Transformers' `optim`, which the RL guide gives, as an optimizer of this name or of the same rule."""
        if "optim" not in values or "optimizer" in values:
            return super().translate(values, say)
        rest = {key: value for key, value in values.items() if key != "optim"}
        return super().translate({**rest, "optimizer": HUGGING_FACE.get(str(values["optim"]), values["optim"])}, say)
