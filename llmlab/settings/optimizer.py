"""Optimizer and learning-rate schedule of every training stage; `llmlab.optim` builds them."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from llmlab.settings.base import Alias, Resume, Settings, When

HUGGING_FACE = {  # Transformers' names of these optimizers: implementations differ, the update rule is the same
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
}
ADAMW = When("optimizer", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
LION = When("optimizer", "lion", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit")
SOPHIA = When("optimizer", "sophia")
MUON = When("optimizer", "muon")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sophia", "muon", *ADAMW.values[1:], *LION.values[1:])
Beta = Annotated[float, Ge(0), Lt(1)]


class OptimizerSettings(Settings):
    """Source: seed, LLM-Lab document, "Optimizer"; `sophia_update_every` from Liu et al. 2023 (arXiv:2305.14342)."""

    panel: ClassVar[str] = "Optimizer"
    resume: ClassVar[Resume] = Resume.NEW_OPTIMIZER

    optimizer: Literal[OPTIMIZERS] = "adamw"  # type: ignore[valid-type]
    """Optimizer. muon updates 2-D hidden weights, AdamW at 0.1 x the rate all others; 8-bit and paged ones need
    bitsandbytes."""
    adamw_beta1: Annotated[Beta, ADAMW] = 0.9
    """AdamW's beta1: decay of the first moment."""
    adamw_beta2: Annotated[Beta, ADAMW] = 0.999
    """AdamW's beta2: decay of the second moment."""
    adamw_eps: Annotated[float, Gt(0), ADAMW] = 1e-8
    """AdamW's epsilon, added to the denominator."""
    lion_beta1: Annotated[Beta, LION] = 0.9
    """Lion's beta1: weight of the momentum in the update."""
    lion_beta2: Annotated[Beta, LION] = 0.99
    """Lion's beta2: decay of the momentum."""
    sophia_beta1: Annotated[Beta, SOPHIA] = 0.965
    """Sophia's beta1: decay of the momentum."""
    sophia_beta2: Annotated[Beta, SOPHIA] = 0.99
    """Sophia's beta2: decay of the Hessian diagonal."""
    sophia_rho: Annotated[float, Gt(0), SOPHIA] = 0.04
    """Sophia's rho: clipping threshold of the update."""
    sophia_update_every: Annotated[int, Gt(0), SOPHIA] = 10
    """Steps between Sophia's estimates of the Hessian diagonal."""
    muon_momentum: Annotated[Beta, MUON] = 0.95
    """Muon's momentum."""
    muon_nesterov: Annotated[bool, MUON] = True
    """Nesterov momentum in Muon."""
    scheduler: Annotated[Literal["none", "cosine", "linear", "polynomial"], Alias("lr_scheduler_type")] = "cosine"
    """Decay of the learning rate after warmup; none keeps it constant."""

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Reads Transformers' `optim`, which the RL guide gives, as the optimizer with the same update rule."""
        if "optim" in values and "optimizer" not in values:
            name = values.pop("optim")
            values["optimizer"] = HUGGING_FACE.get(str(name), name)
        super().translate(values, warn)
