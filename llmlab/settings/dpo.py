"""Settings of `llmlab dpo`."""

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl
from llmlab.settings.preference import PreferenceSettings


class DPOSettings(PreferenceSettings):
    """Direct preference optimization. Source: seed, LLM-Lab document, "DPO"; arXiv:2305.18290."""

    panel: ClassVar[str] = "DPO"

    output_dir: v.OutputDir = "dpo_checkpoints"
    beta: Annotated[float, Gt(0), Trl("beta"), Alias("clip_range")] = 0.2
    """Strength of the KL constraint: the implicit reward is beta times the log-ratio to the reference model."""
    reference_checkpoint: v.ReferenceCheckpoint = None
    label_smoothing: Annotated[float, Ge(0), Lt(0.5), Trl("label_smoothing")] = 0.0
    """Assumed probability that a pair's labels are swapped (conservative DPO); try 0.1 when overfitting."""
