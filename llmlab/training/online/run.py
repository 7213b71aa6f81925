"""What GRPO and PPO share around their trainers: rewards, policy and reference model, prompts, the plan of a run. How
rewards become advantages and a loss is each trainer's own business."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from llmlab.data.chat.makers import PromptEncoder, decode_prompts
from llmlab.data.chat.rows import Rows
from llmlab.episodes import check_template
from llmlab.rewards.compose import ComposedReward, compose, environment_reward
from llmlab.rewards.function import Reward
from llmlab.rewards.loading import may_run_code
from llmlab.runs.callbacks import ProcessState
from llmlab.runs.policy import load_reference
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run
from llmlab.runs.start import S, changed_by
from llmlab.settings.errors import UserError
from llmlab.simulator.environment import load_environment
from llmlab.training.online.callbacks import AdaptiveKL, OnlineMetrics, StopWithoutSignal

RewardFunction = Reward | Callable[..., Any]


class RewardedRun(Run[S]):
    """A run with rewards of completions or episodes."""

    def compose_rewards(self, rewards: Sequence[RewardFunction]) -> ComposedReward:
        """Returns the rewards of the settings and these."""
        settings = self.settings
        named = settings.all_rewards() if settings.rewards or settings.reward_model or not rewards else []
        if settings.environment is not None:
            rewards = [*rewards, environment_reward(normalize=settings.normalize_rewards)]
        options = {"normalize": settings.normalize_rewards, "allow_code": may_run_code(self.resolved)}
        return compose([*named, *rewards], **options)

    def load_environments(self) -> dict[str | None, Callable[[], Any]]:
        """Returns the environments' factories by name."""
        options = {"allow_code": may_run_code(self.resolved), "reward_config": self.settings.reward_config}
        return {name: load_environment(spec, **options) for name, spec in self.settings.environments.items()}


class OnlineRun(RewardedRun[S]):
    """A run of GRPO or PPO: settings converted to optimizer steps, rewards, policy and reference model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = settings = self.settings.in_steps(self.process.num_processes)
        self.rollout = settings.rollout(self.process.num_processes)
        if settings.use_vllm and find_spec("vllm") is None:
            raise UserError("use_vllm = true: vLLM is not installed: pip install vllm (it needs a GPU)")

    def load(self, rewards: Sequence[RewardFunction]) -> None:
        """Loads rewards (from the settings and passed functions), policy and reference model."""
        settings = self.settings
        self.reward, self.environments = self.compose_rewards(rewards), self.load_environments()
        self.policy = self.load_policy(attach=False)
        if self.environments:
            check_template(self.policy.tokenizer)
        self.reference, self.reference_name = None, "none, since init_kl_coef is 0"
        if settings.init_kl_coef > 0:
            self.reference, self.reference_name = load_reference(settings, self.policy)
        self.with_adapters = settings.use_lora or isinstance(self.policy.model, PeftModel)
        if self.with_adapters and self.reference is not None:
            named = f"reference_checkpoint = {settings.reference_checkpoint}"
            problem = "not supported with LoRA, whose reference is the policy with its adapters disabled"
            raise UserError(f"{named}: {problem}; leave it out, or set use_lora=false")

    def make_online_trainer(self, trainer: type, config: type, *, arguments: dict[str, Any], **options: Any) -> Any:
        """Reads the prompts and returns the trainer; validation prompts get one completion each, and their reward is
        the best."""
        settings = self.settings
        encoder = PromptEncoder(self.policy.tokenizer, max_prompt_length=settings.prompt_limit)
        rows = self.build_rows(encoder, rows_per_step=settings.batch_size / self.rollout.updates)
        if len(rows.train) < settings.batch_size:
            problem = f"there are only {len(rows.train)} prompts to train on"
            raise UserError(f"batch_size = {settings.batch_size}: {problem}; give more, or a smaller batch_size")
        validation = rows.validation and decode_prompts(rows.validation)
        self.prompts = Rows(decode_prompts(rows.train), validation, rows.reports)
        steps = settings.steps_for(len(rows.train), self.process.num_processes)
        self.settings = settings.model_copy(update={"max_steps": steps})
        arguments = {
            "generation_batch_size": self.rollout.completions,
            "per_device_eval_batch_size": settings.mini_batch_size,
            "num_generations_eval": 1,
            "eval_on_start": validation is not None and self.checkpoint is None,
            **arguments,
        }
        options |= {"reference": self.reference, "reward_funcs": self.reward, "best_metric": "reward"}
        options |= {"arguments": arguments, "peft_config": self.policy.new_adapters(settings)}
        model, tokenizer = self.policy.model, self.policy.tokenizer
        made = self.make_trainer(trainer, config, model, tokenizer, self.prompts, **options)
        if self.environments:
            made.play_episodes(self)
        return made

    def train_online(
        self, trainer: Any, *, temperature: float, plan: Sequence[tuple[str, str]] = (), parents: Sequence[str] = ()
    ) -> RunResult:
        """Trains; `plan` and `parents` are added to the common ones."""
        settings, prompts, rollout = self.settings, self.prompts, self.rollout
        state = (trainer.rollout_state, trainer.load_rollout_state)
        callbacks: list[TrainerCallback] = [  # in reverse order of execution
            ProcessState("rollout.pt", self.checkpoint, *state, required=False),
            StopWithoutSignal(settings.stop_patience, settings.max_new_tokens),
        ]
        if settings.adaptive_kl:
            samples, factor = rollout.completions / rollout.updates, changed_by(self.folder, "init_kl_coef", self.done)
            callbacks.append(AdaptiveKL(trainer, settings.target_kl, settings.kl_horizon, samples, factor=factor))
        prompts.set_epochs(settings.max_steps / rollout.updates * settings.batch_size / len(prompts.train))
        what = f"completions of up to {settings.max_new_tokens} tokens"
        if self.environments:
            what = f"episodes of up to {settings.max_episode_length} calls and {settings.max_new_tokens} tokens a turn"
        sampling = f"temperature {temperature:g}, top_p {settings.top_p:g}, top_k {settings.top_k}"
        if settings.top_p < 1 or settings.top_k:
            # the loss takes the log-probabilities of the whole distribution
            sampling += " (top_p and top_k other than 1 and 0 bias the gradient)"
        weights = {name: part.weight for name, part in self.reward.components.items()}
        shares = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
        passes = f"{settings.ppo_epochs} passes, {rollout.per_update} completions a step"
        plan = [
            *self.policy.rows(trainer.model),
            ("reference", self.reference_name),
            *plan,
            ("data", prompts.summary()),
            ("rewards", shares + (", to [0, 1]" if self.reward.normalize else "")),
            ("rollout", f"{settings.batch_size} prompts, {rollout.completions} {what}; {sampling}"),
            ("steps", f"{settings.max_steps:,}: {rollout.updates} for each rollout ({passes})"),
        ]
        options = {"parents": [*self.policy.parents, *parents], "callbacks": [*callbacks, OnlineMetrics()]}
        data = {**prompts.record(), "rewards": weights}
        return self.train(trainer, steps=settings.max_steps, plan=plan, data=data, **options)
