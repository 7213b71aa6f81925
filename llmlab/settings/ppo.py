"""Settings of `llmlab ppo`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl, When
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rl import OnlineSettings, Temperature


class PPOSettings(OnlineSettings, panel="PPO"):
    """Proximal policy optimization. Source: seed, LLM-Lab document, "PPO"; RL guide, section 4; arXiv:1707.06347."""

    output_dir: v.OutputDir = "ppo_checkpoints"
    temperature: Temperature = 1.0
    value_model: Annotated[Literal["separate", "shared"], Trl("value_model")] = "separate"
    """Critic: a separate model (with LoRA, its own adapters on the same base), or a value head on the policy."""
    value_checkpoint: Annotated[PathName | None, Reads("model"), When("value_model", "separate")] = None
    """Reward model of the same vocabulary to initialize the critic from; none initializes it from the policy."""
    vf_coef: Annotated[float, Ge(0), Trl("vf_coef")] = 0.1
    """Weight of the value loss."""
    cliprange_value: Annotated[float | None, Gt(0), Alias("clip_range_vf")] = 0.2
    """Clip range of the value function around its values at sampling; none does not clip."""
    gamma: Annotated[float, Ge(0), Le(1), Trl("gamma")] = 1.0
    """Discount factor per token; in episodes per turn, which is a tool call and its result."""
    gae_lambda: Annotated[float, Ge(0), Le(1), Trl("gae_lambda"), Alias("lam")] = 0.95
    """GAE lambda: 0 is one-step TD (low variance, biased by the critic), 1 is Monte Carlo returns."""
    whiten_advantages: Annotated[bool, Trl("whiten_advantages"), Alias("normalize_advantage")] = True
    """Normalize the advantages of a rollout to mean 0 and variance 1."""
    lora_dropout: Annotated[float, Ge(0), Le(0), When("use_lora", True)] = 0.0
    """Always 0 in PPO: with dropout the updated policy would not be the one that sampled."""
    early_stop: bool = True
    """End the epochs over a rollout where the KL divergence to the sampling policy exceeds 1.5 x target_kl."""

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Ignores the dropout of a LoRA block that is written for every stage."""
        dropout = values.get("lora_dropout")
        if isinstance(dropout, float) and 0 < dropout < 1:
            warn(f"lora_dropout = {dropout:g}: PPO uses 0, so that the updated policy is the one that sampled")
            values["lora_dropout"] = 0.0
        super().translate(values, warn)
