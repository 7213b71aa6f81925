"""Settings of `llmlab grpo`. Source: seed, LLM-Lab document, "GRPO"; Shao et al. 2024 (arXiv:2402.03300)."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl, When
from llmlab.settings.rl import OnlineSettings, Temperature

NO_VALUES = "GRPO compares completions with each other, and has no value function"


class GRPOSettings(OnlineSettings):
    """Sample a group of completions of each prompt, and make the better ones of a group likelier."""

    panel: ClassVar[str] = "GRPO"
    inapplicable: ClassVar[dict[str, str]] = {
        "vf_coef": NO_VALUES,
        "gamma": "a completion has one reward, at its end, for all of its tokens",
        **dict.fromkeys(("lam", "gae_lambda"), NO_VALUES),
    }

    output_dir: v.OutputDir = "grpo_checkpoints"
    group_size: Annotated[int, Ge(2), Trl("num_generations")] = Field(
        4, description="Completions of each prompt, which are compared with each other."
    )
    grpo_temperature: Temperature = 1.0
    baseline_mode: Literal["group_mean", "global_mean"] = Field(
        "group_mean",
        description="What a completion's reward is compared with: the mean of its group, or of the whole rollout "
        "(then also scaled by the deviation in the rollout).",
    )

    target_kl: Annotated[float, Gt(0), Alias("target"), When("adaptive_kl", True)] = Field(
        0.1, description="Wanted KL divergence from the reference, in nats a token."
    )

    @property
    def completions_per_prompt(self) -> int:
        return self.group_size
