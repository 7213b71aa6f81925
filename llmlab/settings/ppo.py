"""Settings of `llmlab ppo`. Source: seed, LLM-Lab document, "PPO"; RL guide, section 4; arXiv:1707.06347."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl, When
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rl import OnlineSettings, Temperature


class PPOSettings(OnlineSettings):
    """Sample completions, and make those likelier that earn more than a value function foresaw."""

    panel: ClassVar[str] = "PPO"

    output_dir: v.OutputDir = "ppo_checkpoints"
    temperature: Temperature = 1.0
    value_model: Annotated[Literal["separate", "shared"], Trl("value_model")] = Field(
        "separate",
        description="A critic of its own (with LoRA, adapters of its own on the same base), or a head on the policy.",
    )
    value_checkpoint: Annotated[PathName | None, Reads("model"), When("value_model", "separate")] = Field(
        None,
        description="A reward model of the same vocabulary that the critic starts from; none is the policy itself.",
    )
    vf_coef: Annotated[float, Ge(0), Trl("vf_coef")] = Field(0.1, description="Weight of the value loss.")
    cliprange_value: Annotated[float | None, Gt(0), Alias("clip_range_vf")] = Field(
        0.2, description="How far a value may move in the passes over a rollout; none does not clip."
    )
    gamma: Annotated[float, Ge(0), Le(1), Trl("gamma")] = Field(
        1.0, description="Discount of later rewards, for each token."
    )
    gae_lambda: Annotated[float, Ge(0), Le(1), Trl("gae_lambda"), Alias("lam")] = Field(
        0.95, description="Whom advantages trust: 0 the values, 1 the rewards alone."
    )
    whiten_advantages: Annotated[bool, Trl("whiten_advantages"), Alias("normalize_advantage")] = Field(
        True, description="Scale the advantages of a rollout to mean 0 and variance 1."
    )
    lora_dropout: Annotated[float, Ge(0), Le(0), When("use_lora", True)] = Field(
        0.0, description="None here: the policy that is updated must be the one that sampled."
    )
    early_stop: bool = Field(
        True,
        description="End the passes over a rollout when the policy is 1.5 target_kl away from the one that sampled.",
    )

    @classmethod
    def translate(cls, values: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Leaves out the dropout of a LoRA block that is written for every stage."""
        dropout = values.get("lora_dropout")
        if isinstance(dropout, float) and 0 < dropout < 1:
            say(f"lora_dropout = {dropout:g}: PPO uses 0, so that what is updated is what sampled")
            values = {**values, "lora_dropout": 0.0}
        return super().translate(values, say)
