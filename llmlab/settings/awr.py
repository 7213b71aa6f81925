"""Settings of `llmlab awr`."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt

from llmlab.settings import vocabulary as v
from llmlab.settings.offline import OfflineSettings

USUAL_BETA = (1.0, 10.0)  # seed: RL guide, section 3, "Tuning Guide: Advantage Beta"


class AWRSettings(OfflineSettings):
    """Advantage-weighted regression. Source: seed, RL guide, section 3; Peng et al. 2019 (arXiv:1910.00177)."""

    panel: ClassVar[str] = "AWR"

    output_dir: v.OutputDir = "awr_checkpoints"
    num_samples_per_prompt: Annotated[int, Gt(1)] = 8
    top_p: v.TopP = 1.0
    advantage_beta: Annotated[float, Ge(0)] = 5.0
    """Weights are exp(advantage_beta x advantage): 1 to 3 weak, 3 to 5 moderate, 5 to 10 strong; 0 is SFT."""
    normalize_advantage: bool = True
    """Divide the advantages by their standard deviation over all samples."""
    clip_advantage: Annotated[float, Gt(0)] = 10.0
    """Largest weight of a sample, before the weights of an optimizer step are scaled to mean 1."""

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Warns of a beta outside of the guide's table."""
        beta = values.get("advantage_beta")
        if isinstance(beta, (int, float)) and beta > USUAL_BETA[1]:
            warn(f"advantage_beta = {beta:g}: above 10 there is a risk of overfitting to outliers; start with 5")
        elif isinstance(beta, (int, float)) and beta < USUAL_BETA[0]:
            warn(f"advantage_beta = {beta:g}: below 1 rewards hardly weigh the samples, and 0 is SFT on all of them")
        super().translate(values, warn)
