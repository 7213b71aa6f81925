"""Optimizer and learning-rate schedule of every training stage; `llmlab.optim` builds them."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

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
ADAMW_VARIANTS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
ADAMW = When("optimizer", "adamw", *ADAMW_VARIANTS, "muon")
LION = When("optimizer", "lion", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit")
SOPHIA = When("optimizer", "sophia")
MUON = When("optimizer", "muon")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sophia", "muon", *ADAMW_VARIANTS, *LION.values[1:])
SCHEDULERS = ("none", "cosine", "linear", "polynomial", "wsd")
OWN_RATES = ("embedding_lr", "head_lr")  # what changes the learning rate changes them alike
Beta = Annotated[float, Ge(0), Lt(1)]


class OptimizerSettings(Settings, panel="Optimizer", resume=Resume.NEW_OPTIMIZER):
    """Source: seed, LLM-Lab document, "Optimizer"; `sophia_update_every` from Liu et al. 2023 (arXiv:2305.14342)."""

    optimizer: Literal[OPTIMIZERS] = "adamw"  # type: ignore[valid-type]
    """Optimizer. muon updates 2-D hidden weights, AdamW at 0.1 x the rate all others; 8-bit and paged ones need
    bitsandbytes."""
    embedding_lr: Annotated[float | None, Gt(0)] = None
    """Peak learning rate of the token and value embeddings; none is that of the other weights, with muon 0.1 x."""
    head_lr: Annotated[float | None, Gt(0)] = None
    """Peak learning rate of an untied output head (in llmlab reward, of the score); none is as for embedding_lr."""
    adamw_beta1: Annotated[Beta, ADAMW] = 0.9
    """AdamW's beta1: decay of the first moment. Beside muon too, for what AdamW updates there."""
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
    scheduler: Annotated[Literal[SCHEDULERS], Alias("lr_scheduler_type")] = "cosine"  # type: ignore[valid-type]
    """Decay of the learning rate after warmup; none keeps it constant, wsd does so before a linear decay to 0."""
    decay_share: Annotated[float, Gt(0), Le(1), When("scheduler", "wsd")] = 0.2
    """Share of all steps in which wsd decays the learning rate. Source of the default: arXiv:2405.18392."""

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Reads Transformers' `optim`, which the RL guide gives, as the optimizer with the same update rule."""
        if "optim" in values and "optimizer" not in values:
            name = values.pop("optim")
            values["optimizer"] = HUGGING_FACE.get(str(name), name)
        super().translate(values, warn)
