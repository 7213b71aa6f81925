"""What the stages that learn from their own completions share, GRPO and PPO; nothing here samples. Source: seed,
LLM-Lab document, "PPO-Specific Parameters" and "Common RLHF Parameters"; RL guide, section 4."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt
from pydantic import BeforeValidator, Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Help, Resume, Trl, When
from llmlab.settings.data import Datasets, DataSource
from llmlab.settings.environment import IN_EPISODES, SIMULATOR, EnvironmentSettings
from llmlab.settings.errors import UserError
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rewards import SPELLINGS, RewardSettings, RewardsSettings, as_list
from llmlab.settings.training import FineTuningSettings

INTERVALS = {"log_interval": "log_every", "save_interval": "save_every", "eval_interval": "eval_every"}
"""The RL guide counts these in completions ("episodes"), the LLM-Lab document in optimizer steps."""

SEED_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"

Temperature = Annotated[float, Gt(0), Trl("temperature"), Help("Sampling temperature.")]
Interval = Annotated[int | None, Gt(0), Resume.FREE]


class Rollout(NamedTuple):
    """Over all processes: completions of a rollout and of one optimizer step, and the optimizer steps of a rollout."""

    completions: int
    per_update: int
    updates: int

    def updates_for(self, episodes: int) -> int:
        """Returns the optimizer steps in which so many completions are sampled, at least one."""
        return max(round(episodes / self.completions * self.updates), 1)


class CompletionSettings(EnvironmentSettings, RewardsSettings, panel="Training"):
    """Prompts, and the rewards of their completions or episodes: also of RS-SFT and AWR."""

    max_new_tokens: v.MaxNewTokens = 256
    max_prompt_length: Annotated[int | None, Gt(0)] = 1024
    """Longest prompt in tokens; rows with longer ones are dropped, counted and reported."""
    max_seq_len: Annotated[int | None, Gt(1), Alias("max_seq_length", "max_length")] = None
    """Longest prompt and completion or episode together, in tokens: limits prompts to what max_new_tokens leaves."""

    rewards: Annotated[list[RewardSettings] | None, BeforeValidator(as_list), SPELLINGS] = None  # type: ignore[assignment]
    """Rewards, one an entry: name | weight (optional), or a mapping {name: weight}. None uses the reward model alone,
    or the environment's."""
    reward_model: Annotated[PathName | None, Reads("model"), Alias("reward_model_name", "reward_model_path")] = None
    """Reward model, in addition to the other rewards: a run folder of llmlab reward, or a hub id. None without other
    rewards is OpenAssistant/reward-model-deberta-v3-large-v2."""
    allow_code: Annotated[bool, Resume.FREE, Field(exclude=True)] = False
    """Run reward functions from Python files (path/to/file.py:function); never set in a file."""

    def contradictions(self) -> Iterator[str]:
        if self.max_seq_len is not None and self.max_seq_len <= self.max_new_tokens:
            no_room = f"leaves no room for a prompt in max_seq_len = {self.max_seq_len}"
            yield f"max_new_tokens = {self.max_new_tokens} {no_room}"
        if self.rewards == [] and self.reward_model is None and self.environment is None:
            yield "rewards: expected at least one"

    @property
    def prompt_limit(self) -> int | None:
        """The longest prompt in tokens, by either of the limits; None where there is none."""
        room = self.max_seq_len and self.max_seq_len - self.max_new_tokens
        return min((limit for limit in (self.max_prompt_length, room) if limit is not None), default=None)

    def all_rewards(self) -> list[RewardSettings]:
        """Returns the rewards with the reward model among them."""
        rewards = list(self.rewards or [])
        model = self.reward_model or (None if rewards or self.environment else SEED_REWARD_MODEL)
        if model is not None:
            rewards.append(RewardSettings(name="reward_model", parameters={"model": model}))
        return rewards


class OnlineSettings(CompletionSettings, FineTuningSettings, panel="Training"):
    """Learning from rewards of the policy's own completions."""

    inapplicable = {
        **dict.fromkeys(("max_possible", "min_possible"), "the bounds of the rewards follow from their weights"),
        "streaming": "prompts are tokenized and measured before the first step",
    }
    best_metrics = ("eval_reward", "reward")
    alternatives = (
        ("max_steps", "epochs", "num_episodes"),
        *((steps, episodes) for episodes, steps in INTERVALS.items()),
    )
    sibling_classes = v.RLHF
    rows_per_pass = "mini_batch_size"

    reference_checkpoint: v.ReferenceCheckpoint = None
    datasets: Datasets = [DataSource.model_construct(name="Anthropic/hh-rlhf")]
    curriculum: Annotated[Literal["none", "episodes", "success"], IN_EPISODES] = "none"
    """Difficulty of the simulator's tasks: that of the data, or rising with episodes or with the success rate."""

    batch_size: Annotated[int, Gt(0)] = 128
    """Prompts of one rollout, over all devices."""
    mini_batch_size: v.BatchSize = 32
    """Completions of one forward pass, per device."""
    gradient_accumulation_steps: v.Accumulation = 1
    """Forward passes of one optimizer step, each on mini_batch_size completions per device."""
    ppo_epochs: Annotated[int, Gt(0), Trl("num_iterations")] = 4
    """Optimization epochs over each rollout."""
    clip_range: Annotated[float, Gt(0), Trl("epsilon"), Alias("cliprange")] = 0.2
    """PPO clip range of the probability ratio to the sampling policy."""
    ent_coef: Annotated[float, Ge(0), Trl("entropy_coef")] = 0.0
    """Weight of the entropy bonus."""

    init_kl_coef: Annotated[float, Ge(0), Trl("beta"), Alias("kl_weight", "kl_coef")] = 0.05
    """Initial weight of the KL penalty to the reference model; 0 trains without a reference model."""
    kl_penalty: Literal["kl", "abs"] = "kl"
    """Per-token KL penalty: an estimate of the KL divergence, or the absolute log-ratio."""
    adaptive_kl: bool = False
    """Adapt the weight of the KL penalty to reach target_kl."""
    target_kl: Annotated[float, Gt(0), Alias("target")] = 0.1
    """Target KL divergence to the reference model, in nats per token."""
    kl_horizon: Annotated[int, Gt(0), Alias("horizon"), When("adaptive_kl", True)] = 10000
    """Completions over which the weight of the KL penalty changes by at most 20 %."""

    max_new_tokens: Annotated[v.MaxNewTokens, Trl("max_completion_length")] = 128
    top_k: Annotated[v.TopK, Trl("top_k")] = 0
    top_p: Annotated[v.TopP, Trl("top_p")] = 1.0
    use_vllm: Annotated[bool, Trl("use_vllm")] = False
    """Sample with vLLM, which must be installed."""
    vllm_mode: Annotated[Literal["colocate", "server"], Trl("vllm_mode"), When("use_vllm", True)] = "colocate"
    """vLLM inside the training processes, or on a server (trl vllm-serve)."""

    num_episodes: Annotated[int | None, Gt(0), Alias("total_episodes"), Resume.FREE] = None
    """Completions to sample in all, rounded up to whole rollouts, instead of max_steps."""
    log_interval: Interval = None
    """Completions between logged lines, instead of log_every."""
    save_interval: Interval = None
    """Completions between checkpoints, instead of save_every."""
    eval_interval: Interval = None
    """Completions between evaluations, instead of eval_every."""
    eval_batches: v.EvalBatches = 4
    stop_patience: Annotated[int | None, Gt(0), Resume.FREE] = 20
    """Stop after this many logged lines in a row in which all groups have equal rewards, or almost all completions are
    truncated; none never stops."""

    @property
    def completions_per_prompt(self) -> int:
        """Completions of each prompt in a rollout."""
        return 1

    def contradictions(self) -> Iterator[str]:
        if self.adaptive_kl and self.init_kl_coef == 0:
            yield "adaptive_kl needs init_kl_coef above 0: it scales the coefficient"
        if self.reference_checkpoint is not None and self.init_kl_coef == 0:
            yield "reference_checkpoint needs init_kl_coef above 0: without a KL penalty it is not used"
        if self.curriculum != "none" and set(self.environments.values()) != {SIMULATOR}:
            yield f"curriculum = {self.curriculum}: only the simulator has tasks of several difficulties"
        self.rollout(1)

    def rollout(self, processes: int) -> Rollout:
        """Returns the sizes of a rollout on so many processes, which must be whole optimizer steps."""
        group, passes = self.completions_per_prompt, self.gradient_accumulation_steps
        completions = self.batch_size * group
        per_update = self.mini_batch_size * passes * processes
        if completions % per_update:
            unit = math.lcm(per_update, group) // group  # prompts
            raise UserError(
                f"batch_size = {self.batch_size}{f' x {group} completions' if group > 1 else ''} is not a multiple of "
                f"mini_batch_size = {self.mini_batch_size}"
                f"{f' x gradient_accumulation_steps = {passes}' if passes > 1 else ''}"
                f"{f' on {processes} processes' if processes > 1 else ''}; "
                f"the nearest is {max(round(self.batch_size / unit), 1) * unit}"
            )
        return Rollout(completions, per_update, self.ppo_epochs * completions // per_update)

    def in_steps(self, processes: int) -> "OnlineSettings":
        """Returns these settings with what is set in completions converted to optimizer steps."""
        rollout = self.rollout(processes)
        steps = {
            name: rollout.updates_for(getattr(self, interval))
            for interval, name in INTERVALS.items()
            if getattr(self, interval) is not None
        }
        if self.num_episodes is not None:
            steps["max_steps"] = math.ceil(self.num_episodes / rollout.completions) * rollout.updates
        return self.model_copy(update=steps)

    def in_completions(self, context: int | None) -> "OnlineSettings":
        """Returns these settings with completions as long as the longest episode in this context, for plans."""
        prompt = self.prompt_limit or self.max_new_tokens
        most = prompt + 2 * self.max_episode_length * self.max_new_tokens  # results as long as what is sampled
        longest = min(self.max_seq_len or most, context or most)
        prompt = min(prompt, longest // 2)
        changes = {"max_prompt_length": prompt, "max_new_tokens": longest - prompt, "max_seq_len": None}
        return self.model_copy(update=changes)

    def steps_for(self, prompts: int, processes: int) -> int:
        """Returns the optimizer steps of the run, given the number of training prompts."""
        if self.epochs is None:
            return self.max_steps
        return math.ceil(self.epochs * prompts / self.batch_size) * self.rollout(processes).updates
