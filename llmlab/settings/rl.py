"""What the stages that learn from their own completions share: GRPO and PPO.

How prompts, completions, gradient steps and devices hang together is here too (`Rollout`); nothing here samples.

Source: seed, LLM-Lab document, "PPO-Specific Parameters" and "Common RLHF Parameters"; RL guide, section 4.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, Field, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl, When
from llmlab.settings.data import Datasets, DataSettings, DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.hardware import HardwareSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rewards import RewardSettings, RewardsSettings, as_list
from llmlab.settings.rhythm import RhythmSettings

RHYTHM = {"log_interval": "log_every", "save_interval": "save_every", "eval_interval": "eval_every"}
"""The RL guide counts in episodes, the LLM-Lab document in steps."""

SIMULATOR = (  # the RL guide's `reward_config`, but for its kl_weight
    *("task_complete", "task_failed", "correct_tool", "wrong_tool", "schema_pass", "schema_fail", "style_pass"),
    *("guardrail_violation", "step_penalty", "redundant_action"),
)
SEED_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"

Temperature = Annotated[
    float, Gt(0), Trl("temperature"), Field(description="Sharpness of sampling: higher is more diverse.")
]
EpisodesBetween = Annotated[int | None, Gt(0)]
RewardList = Annotated[
    list[RewardSettings] | None,
    BeforeValidator(as_list),
    Field(
        description="What completions are rewarded for, one an entry: name | weight (optional), or a mapping "
        "{name: weight}. None is the reward model alone."
    ),
    Alias("reward_funcs", "reward_functions", "reward_weights"),
]


class Rollout(NamedTuple):
    """The sizes of a rollout: what is sampled at once, and the gradient steps that learn from it.

    Attributes:
        completions: sampled at once, over all processes.
        per_update: completions of one gradient step, over all processes.
        updates: gradient steps until the next rollout, over all passes.
    """

    completions: int
    per_update: int
    updates: int

    def updates_for(self, episodes: int) -> int:
        """Returns the gradient steps in which so many completions are sampled, at least one."""
        return max(round(episodes / self.completions * self.updates), 1)


class OnlineSettings(RhythmSettings, HardwareSettings, LoraSettings, OptimizerSettings, DataSettings, RewardsSettings):
    """Learn from the rewards of one's own completions."""

    panel: ClassVar[str] = "Training"
    inapplicable: ClassVar[dict[str, str]] = {
        **dict.fromkeys(SIMULATOR, "rewards of the steps of an episode with tools, which this stage does not have"),
        **dict.fromkeys(("max_possible", "min_possible"), "the bounds of the rewards follow from their weights"),
        "streaming": "every prompt is measured before the first step, so rows are made before it",
        "metric_for_best_model": "the best checkpoint is the one with the highest reward on the validation prompts",
        "max_episode_length": "there are no tools in this stage: an episode is one completion, of max_new_tokens",
    }
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("max_steps", "epochs", "num_episodes"),
        *RHYTHM.items(),
    )
    relatives: ClassVar[tuple[str, ...]] = v.RLHF

    policy_checkpoint: v.PolicyCheckpoint = "sft_checkpoints"
    reference_checkpoint: Annotated[PathName | None, Reads("model"), Alias("ref_model")] = Field(
        None,
        description="Frozen reference: a run folder or hub id; none is the starting policy, with LoRA at no memory.",
    )
    datasets: Datasets = [DataSource(name="Anthropic/hh-rlhf")]
    max_samples: v.MaxSamples = None
    chat_template: v.ChatTemplate = None
    max_prompt_length: Annotated[int | None, Gt(0)] = Field(
        1024, description="Longest prompt in tokens; longer ones are left out, counted and reported."
    )
    max_seq_len: Annotated[int | None, Gt(1), Alias("max_seq_length", "max_length")] = Field(
        None,
        description="Longest prompt and completion together, in tokens; a prompt gets what max_new_tokens leaves.",
    )

    rewards: RewardList = None  # type: ignore[assignment]  # here the reward model may stand alone
    reward_model: Annotated[PathName | None, Reads("model"), Alias("reward_model_name", "reward_model_path")] = Field(
        None,
        description="A model that scores completions, beside the other rewards: a run folder of llmlab reward or a "
        f"hub id. None where no rewards are named is {SEED_REWARD_MODEL}.",
    )
    allow_code: bool = Field(
        False, description="Run reward functions from Python files (path/to/file.py:function); never set in a file."
    )

    batch_size: Annotated[int, Gt(0)] = Field(128, description="Prompts of one rollout, over all processes.")
    mini_batch_size: Annotated[int, Gt(0), Trl("per_device_train_batch_size"), Alias("per_device_batch_size")] = Field(
        32, description="Completions in one forward pass, on each device."
    )
    gradient_accumulation_steps: Annotated[int, Gt(0), Trl("gradient_accumulation_steps")] = Field(
        1, description="Forward passes of one gradient step, which learns from mini_batch_size times this."
    )
    ppo_epochs: Annotated[int, Gt(0), Trl("num_iterations")] = Field(
        4, description="Passes over each rollout before the next one is sampled."
    )
    clip_range: Annotated[float, Gt(0), Trl("epsilon"), Alias("cliprange")] = Field(
        0.2, description="How far a token's probability may move from that at sampling before its gradient stops."
    )
    ent_coef: Annotated[float, Ge(0), Trl("entropy_coef")] = Field(
        0.0, description="Weight of the bonus for entropy, which keeps exploration alive."
    )

    init_kl_coef: Annotated[float, Ge(0), Trl("beta"), Alias("kl_weight", "kl_coef")] = Field(
        0.05, description="Weight of the KL penalty towards the reference, at first; 0 does without a reference."
    )
    kl_penalty: Literal["kl", "abs"] = Field(
        "kl", description="What is charged a token: an estimate of the divergence, or the size of the log ratio."
    )
    adaptive_kl: bool = Field(False, description="Steer the weight of the KL penalty towards target_kl.")
    target_kl: Annotated[float, Gt(0), Alias("target")] = Field(
        0.1, description="Wanted KL divergence from the reference, in nats a token."
    )
    kl_horizon: Annotated[int, Gt(0), Alias("horizon"), When("adaptive_kl", True)] = Field(
        10000, description="Completions over which the weight of the KL penalty may change by a fifth."
    )

    max_new_tokens: Annotated[int, Gt(0), Trl("max_completion_length")] = Field(
        128, description="Longest completion in tokens."
    )
    top_k: Annotated[int, Ge(0), Trl("top_k")] = Field(0, description="Sample among this many tokens; 0 is all.")
    top_p: Annotated[float, Gt(0), Le(1), Trl("top_p")] = Field(
        1.0, description="Sample among the tokens that hold this probability."
    )
    use_vllm: Annotated[bool, Trl("use_vllm")] = Field(False, description="Sample with vLLM, where it is installed.")
    vllm_mode: Annotated[Literal["colocate", "server"], Trl("vllm_mode"), When("use_vllm", True)] = Field(
        "colocate", description="vLLM in the training processes, or a server (trl vllm-serve)."
    )

    max_steps: v.MaxSteps = 10000
    epochs: Annotated[v.Epochs, Field(description="Passes over the prompts, instead of max_steps.")] = None
    num_episodes: Annotated[int | None, Gt(0), Alias("total_episodes")] = Field(
        None, description="Completions to sample in all, rounded up to whole rollouts, instead of max_steps."
    )
    learning_rate: v.LearningRate = 1.4e-5
    weight_decay: v.WeightDecay = 0.0
    max_grad_norm: v.MaxGradNorm = 1.0
    warmup_steps: v.WarmupSteps = 0.1
    log_every: v.LogEvery = 10
    save_every: Annotated[int, Gt(0), Alias("save_steps")] = Field(
        500, description="Gradient steps between two checkpoints to resume from, beside those of the best evaluations."
    )
    eval_every: Annotated[int, Gt(0), Alias("eval_steps")] = Field(
        500, description="Gradient steps between two evaluations on the validation prompts."
    )
    log_interval: EpisodesBetween = Field(None, description="Completions between two logged lines: for log_every.")
    save_interval: EpisodesBetween = Field(None, description="Completions between two checkpoints: for save_every.")
    eval_interval: EpisodesBetween = Field(None, description="Completions between two evaluations: for eval_every.")
    eval_batches: v.EvalBatches = 4
    save_best_only: Annotated[bool, Alias("load_best_model_at_end")] = Field(
        False, description="End with the weights of the highest validation reward, not the last ones."
    )
    save_total_limit: v.SaveTotalLimit = 2
    stop_patience: Annotated[int | None, Gt(0)] = Field(
        20, description="Logged lines with nothing to learn from before the run stops with advice; none never stops."
    )
    seed: v.Seed = 42
    trainer_args: v.TrainerArgs = Field(default_factory=dict)

    @property
    def completions_per_prompt(self) -> int:
        """How many completions of each prompt are sampled."""
        return 1

    @model_validator(mode="after")
    def check_sizes(self) -> "OnlineSettings":
        lengths = [name for name in ("num_episodes", "epochs") if getattr(self, name) is not None]
        lengths += ["max_steps"] if "max_steps" in self.model_fields_set else []
        if lengths[1:]:
            raise v.conflict(f"{lengths[0]} and {lengths[1]} both say how long to train; keep one", *lengths[:2])
        if self.max_seq_len is not None and self.max_seq_len <= self.max_new_tokens:
            raise v.conflict(
                f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt in max_seq_len = "
                f"{self.max_seq_len}",
                "max_seq_len",
                "max_new_tokens",
            )
        for episodes, steps in RHYTHM.items():
            if getattr(self, episodes) is not None and steps in self.model_fields_set:
                raise v.conflict(f"{episodes} and {steps} are one thing in two units; keep one", episodes, steps)
        if self.adaptive_kl and self.init_kl_coef == 0:
            raise v.conflict(
                "adaptive_kl needs init_kl_coef above 0: what is 0 stays 0 when it is scaled",
                "adaptive_kl",
                "init_kl_coef",
            )
        if self.reference_checkpoint is not None and self.init_kl_coef == 0:
            raise v.conflict(
                "reference_checkpoint needs init_kl_coef above 0: where it is 0 there is no reference",
                "reference_checkpoint",
                "init_kl_coef",
            )
        if self.rewards is not None and not self.rewards and self.reward_model is None:
            raise v.conflict("rewards: expected at least one", "rewards")
        try:
            self.rollout(1)
        except UserError as error:
            raise v.conflict(str(error), "mini_batch_size", "batch_size") from None
        return self

    def rollout(self, processes: int) -> Rollout:
        """Returns the sizes of a rollout on so many processes.

        Raises:
            UserError: it is no whole number of gradient steps.
        """
        group = self.completions_per_prompt
        completions = self.batch_size * group
        per_update = self.mini_batch_size * self.gradient_accumulation_steps * processes
        if completions % per_update:
            unit = math.lcm(per_update, group) // group  # prompts
            nearest = max(round(self.batch_size / unit), 1) * unit
            of_each = f" x {group} completions" if group > 1 else ""
            accumulated = f" x gradient_accumulation_steps = {self.gradient_accumulation_steps}"
            raise UserError(
                f"batch_size = {self.batch_size}{of_each} is no multiple of mini_batch_size = {self.mini_batch_size}"
                f"{accumulated if self.gradient_accumulation_steps > 1 else ''}"
                f"{f' on {processes} processes' if processes > 1 else ''}; the nearest is {nearest}"
            )
        return Rollout(completions, per_update, self.ppo_epochs * completions // per_update)

    def in_steps(self, processes: int) -> Self:
        """Returns these settings with everything that is given in episodes told in gradient steps as well.

        Raises:
            UserError: a rollout is no whole number of gradient steps on so many processes.
        """
        rollout = self.rollout(processes)
        told = {
            steps: rollout.updates_for(getattr(self, episodes))
            for episodes, steps in RHYTHM.items()
            if getattr(self, episodes) is not None
        }
        if self.num_episodes is not None:
            told["max_steps"] = math.ceil(self.num_episodes / rollout.completions) * rollout.updates
        return self.model_copy(update=told)

    @property
    def prompt_limit(self) -> int | None:
        """The longest prompt in tokens, by either of the limits; None where there is none."""
        room = self.max_seq_len and self.max_seq_len - self.max_new_tokens
        return min((limit for limit in (self.max_prompt_length, room) if limit is not None), default=None)

    def steps_for(self, prompts: int, processes: int) -> int:
        """Returns the gradient steps of the run, where so many prompts are there to pass over."""
        if self.epochs is None:
            return self.max_steps
        return math.ceil(self.epochs * prompts / self.batch_size) * self.rollout(processes).updates

    def all_rewards(self) -> list[RewardSettings]:
        """Returns the rewards with the reward model among them."""
        rewards = list(self.rewards or [])
        model = self.reward_model or (None if rewards else SEED_REWARD_MODEL)
        if model is not None:
            rewards.append(RewardSettings(name="reward_model", parameters={"model": model}))
        return rewards

    def recorded(self) -> dict[str, Any]:
        """Leaves out what follows from other settings, and the leave to run code, which is given each time."""
        decided = {steps for episodes, steps in RHYTHM.items() if getattr(self, episodes) is not None}
        decided |= {"max_steps"} if self.num_episodes is not None or self.epochs is not None else set()
        return {k: value for k, value in super().recorded().items() if k not in decided | {"allow_code"}}
