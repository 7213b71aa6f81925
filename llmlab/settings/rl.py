"""Settings of the stages that learn from their own completions, GRPO and PPO; nothing here samples. Source: seed,
LLM-Lab document, "PPO-Specific Parameters" and "Common RLHF Parameters"; RL guide, section 4."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Help, Resume, Trl, When
from llmlab.settings.data import Datasets, DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rewards import IN_EPISODES, SIMULATOR, CompletionSettings
from llmlab.settings.training import FineTuningSettings

INTERVALS = {"log_interval": "log_every", "save_interval": "save_every", "eval_interval": "eval_every"}
"""The RL guide counts these in completions ("episodes"), the LLM-Lab document in optimizer steps."""

NO_VALUES = "GRPO compares completions with each other, and has no value function"

Temperature = Annotated[float, Gt(0), Trl("temperature"), Help("Sampling temperature.")]
Interval = Annotated[int | None, Gt(0), Resume.FREE]


class Rollout(NamedTuple):
    """Over all processes: completions of a rollout and of one optimizer step, and the optimizer steps of a rollout."""

    completions: int
    per_update: int
    updates: int


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
        rollout, steps = self.rollout(processes), {}
        for interval, name in INTERVALS.items():
            if (completions := getattr(self, interval)) is not None:
                steps[name] = max(round(completions / rollout.completions * rollout.updates), 1)
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
