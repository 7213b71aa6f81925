"""Settings of `llmlab grpo`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl, When
from llmlab.settings.rl import OnlineSettings, Temperature

NO_VALUES = "GRPO compares completions with each other, and has no value function"


class GRPOSettings(OnlineSettings, panel="GRPO"):
    """Group relative policy optimization. Source: seed, LLM-Lab document, "GRPO"; arXiv:2402.03300."""

    inapplicable = {
        "vf_coef": NO_VALUES,
        "gamma": "a completion has one reward, at its end, for all of its tokens",
        **dict.fromkeys(("lam", "gae_lambda"), NO_VALUES),
    }

    output_dir: v.OutputDir = "grpo_checkpoints"
    group_size: Annotated[int, Ge(2), Trl("num_generations")] = 4
    """Completions of each prompt, which form a group."""
    grpo_temperature: Temperature = 1.0
    baseline_mode: Literal["group_mean", "global_mean"] = "group_mean"
    """Baseline of the advantages: the mean reward of the group, or of the whole rollout (then also divided by the
    rollout's standard deviation)."""
    target_kl: Annotated[float, Gt(0), Alias("target"), When("adaptive_kl", True)] = 0.1

    @property
    def completions_per_prompt(self) -> int:
        return self.group_size

    def contradictions(self) -> Iterator[str]:
        loss = self.trainer_args.get("loss_type", "dapo"), self.trainer_args.get("importance_sampling_level", "token")
        if self.kl_penalty == "abs" and self.init_kl_coef > 0 and loss != ("dapo", "token"):
            yield (
                f"kl_penalty = abs: not supported with trainer_args loss_type = {loss[0]} and "
                f"importance_sampling_level = {loss[1]}; expected dapo and token, TRL's defaults"
            )
