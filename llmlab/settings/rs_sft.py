"""Settings of `llmlab rs-sft`."""

from typing import Annotated, ClassVar

from annotated_types import Gt

from llmlab.settings import vocabulary as v
from llmlab.settings.offline import OfflineSettings


class RSSFTSettings(OfflineSettings):
    """Rejection-sampled fine-tuning. Source: seed, RL guide, section 3, "Rejection-Sampled SFT"; arXiv:2308.01825."""

    panel: ClassVar[str] = "RS-SFT"

    output_dir: v.OutputDir = "rs_sft_checkpoints"
    top_p: v.TopP = 0.9
    reward_threshold: float = 0.6
    """Train on the best sample of each prompt, where its reward is above this and it ended by itself."""
    max_samples: Annotated[int | None, Gt(0)] = 20000
