"""Settings of `llmlab dpo`. Source: seed, LLM-Lab document, "DPO"; Rafailov et al. 2023 (arXiv:2305.18290)."""

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.preference import PreferenceSettings


class DPOSettings(PreferenceSettings):
    """Make a model prefer the better of two answers, held to a reference by beta."""

    panel: ClassVar[str] = "DPO"

    output_dir: v.OutputDir = "dpo_checkpoints"
    beta: Annotated[float, Gt(0), Trl("beta"), Alias("clip_range")] = Field(
        0.2, description="Strength of the tie to the reference model: the implicit reward is beta times the log ratio."
    )
    reference_checkpoint: Annotated[PathName | None, Reads("model"), Alias("ref_model")] = Field(
        None,
        description="Frozen reference: a run folder or hub id; none is the starting policy, with LoRA at no memory.",
    )
    label_smoothing: Annotated[float, Ge(0), Lt(0.5), Trl("label_smoothing")] = Field(
        0.0, description="Probability that a pair is the wrong way round (conservative DPO); try 0.1 when overfitting."
    )
