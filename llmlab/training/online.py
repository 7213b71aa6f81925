"""What stages that learn from their own completions share: prompts, rewards, arguments, what is logged, when to stop.

How a completion's reward becomes a gradient is each trainer's own business.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlab.data.prompts import PromptMaker, as_read
from llmlab.data.rows import Rows, build_rows
from llmlab.hardware import Hardware
from llmlab.rewards.compose import ComposedReward, compose
from llmlab.settings.errors import UserError
from llmlab.settings.rl import OnlineSettings
from llmlab.settings.sources import Resolved
from llmlab.training.arguments import build_arguments, rhythm_arguments
from llmlab.training.kl import AdaptiveKL, KLController
from llmlab.training.policy import Policy
from llmlab.training.running import Run, describe_optimizer

ROLLOUT_STATE = "rollout.pt"
NAMES = {  # the trainer's words for what people ask for
    "completions/clipped_ratio": "clipped_share",
    "completions/mean_length": "completion_length",
    "clip_ratio/region_mean": "ratio_clipped_share",
}
TWICE = ("rewards/reward/mean", "rewards/reward/std", "frac_reward_zero_std")  # under better names already
CUT_OFF = 0.9


def read_prompts(run: Run[Any], policy: Policy) -> Rows:
    """Returns the prompts of a stage's sources, as the trainer and rewards read them.

    Raises:
        UserError: a source cannot be used, or there are fewer prompts than a rollout takes.
    """
    settings, processes = run.settings, run.process.num_processes
    maker = PromptMaker(policy.tokenizer, max_prompt_length=settings.max_prompt_length)
    with run.process.main_process_first(), run.reading():
        rows = build_rows(
            settings,
            maker,
            seed=settings.seed,
            validation_rows=settings.eval_batches * settings.mini_batch_size * processes,
            max_samples=settings.max_samples,
        )
        if len(rows.train) < settings.batch_size:
            raise UserError(
                f"batch_size = {settings.batch_size}: there are only {len(rows.train)} prompts to train on; "
                "give more, or a smaller batch_size"
            )
        validation = None if rows.validation is None else as_read(rows.validation)
        return Rows(as_read(rows.train), validation, rows.reports)


def locate_rewards(settings: OnlineSettings | Resolved[Any]) -> Resolved[Any]:
    """Returns settings whose reward functions of the user's own have whole paths, so that a resumed run finds them.

    Paths start at the folder of the file that names them, or at the working directory.
    """
    resolved = settings if isinstance(settings, Resolved) else Resolved(settings, {})
    named_in = Path(resolved.sources.get("rewards", "").partition(":")[0])
    folder = named_in.parent if named_in.suffix and named_in.is_file() else Path()
    rewards = [
        reward.model_copy(update={"name": str((folder / Path(reward.name).expanduser()).resolve())})
        if ".py:" in reward.name
        else reward
        for reward in resolved.settings.rewards or ()
    ]
    if not rewards:
        return resolved
    return replace(resolved, settings=resolved.settings.model_copy(update={"rewards": rewards}))


def make_reward(run: Run[Any]) -> ComposedReward:
    """Returns what completions are rewarded for.

    Raises:
        UserError: there is no such reward, a parameter is wrong, or code would run that nobody allowed by hand.
    """
    settings = run.settings
    allowed_by = run.resolved.sources.get("allow_code", "arguments")
    if settings.allow_code and allowed_by not in ("arguments", "command line"):
        raise UserError(f"{allowed_by}: allow_code cannot be set in a file; give --allow-code, having read the code")
    return compose(settings.all_rewards(), normalize=settings.normalize_rewards, allow_code=settings.allow_code)


def check_vllm(settings: OnlineSettings) -> None:
    """Raises UserError where vLLM is asked for and not there."""
    if settings.use_vllm and find_spec("vllm") is None:
        raise UserError("use_vllm = true: vLLM is not installed: pip install vllm (it needs a GPU)")


def online_arguments(
    config: type, settings: OnlineSettings, hardware: Hardware, *, evaluates: bool, processes: int, **fixed: Any
) -> Any:
    """Returns the arguments of a TRL online trainer for these settings, told in steps, on this machine.

    Validation prompts get one completion each, and the best checkpoint is the one with the highest reward on them.
    """
    best = {"metric_for_best_model": "eval_reward", "greater_is_better": True} if evaluates else {}
    return build_arguments(
        config,
        settings,
        hardware,
        generation_batch_size=settings.rollout(processes).completions,
        per_device_eval_batch_size=settings.mini_batch_size,
        num_generations_eval=1,
        **{**rhythm_arguments(settings, evaluates=evaluates), **best},
        **fixed,
    )


def plan_rows(run: Run[Any], data: Rows, reward: ComposedReward, *, temperature: float) -> list[tuple[str, str]]:
    """Returns the lines about prompts, rewards, rollouts and steps for the plan of a run."""
    settings, rollout = run.settings, run.settings.rollout(run.process.num_processes)
    rollouts = settings.max_steps / rollout.updates
    for report in data.reports:
        report.passes = round(rollouts * settings.batch_size / len(data.train), 3)
    sampling = f"temperature {temperature:g}, top_p {settings.top_p:g}, top_k {settings.top_k}"
    if settings.top_p < 1 or settings.top_k:
        # the loss counts the probabilities of the whole distribution
        sampling += " [yellow](top_p and top_k other than 1 and 0 bias the gradient)[/yellow]"
    weights = ", ".join(f"{name} x {part.weight:g}" for name, part in reward.components.items())
    return [
        ("data", data.summary()),
        ("rewards", weights + (", to [0, 1]" if reward.normalize else "")),
        (
            "rollout",
            f"{settings.batch_size} prompts, {rollout.completions} completions of up to {settings.max_new_tokens} "
            f"tokens; {sampling}",
        ),
        (
            "steps",
            f"{settings.max_steps:,}: {rollout.updates} for each rollout ({settings.ppo_epochs} passes, "
            f"{rollout.per_update} completions a step)",
        ),
        describe_optimizer(settings, settings.max_steps),
        *run.hardware.rows(),
    ]


def online_callbacks(run: Run[Any], trainer: Any) -> list[TrainerCallback]:
    """Returns the callbacks of a stage's trainer; the last is the first that is called."""
    settings = run.settings
    callbacks: list[TrainerCallback] = [
        RolloutState(trainer, run.checkpoint),
        NothingToLearn(settings.stop_patience, max_new_tokens=settings.max_new_tokens),
    ]
    if settings.adaptive_kl:
        controller = KLController(settings.init_kl_coef, target=settings.target_kl, horizon=settings.kl_horizon)
        sampled = settings.rollout(run.process.num_processes)
        per_step = sampled.completions / sampled.updates
        callbacks.append(AdaptiveKL(trainer, controller, samples_per_step=per_step, checkpoint=run.checkpoint))
    return [*callbacks, OnlineMetrics()]


class OnlineMetrics(TrainerCallback):
    """Gives the trainer's metrics names that people ask for; `reward/NAME` is the mean of a component."""

    def __init__(self) -> None:
        self.tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens_before = state.num_input_tokens_seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for name in list(logs):
            theirs = name.removeprefix(prefix)
            if theirs in TWICE or logs[name] is None:
                del logs[name]
            elif theirs in NAMES:
                logs[prefix + NAMES[theirs]] = logs.pop(name)
            elif theirs.startswith("reward_components/"):
                logs[f"{prefix}reward/{theirs.split('/')[1]}"] = logs.pop(name)
        if "loss" in logs:
            # the trainer logs it for the lines in which it sampled, and goes on counting when it is resumed
            logs["num_tokens"] = state.num_input_tokens_seen - self.tokens_before
        state.log_history[-1] = {**logs, "step": state.global_step}  # the trainer kept a copy under its own names


class NothingToLearn(TrainerCallback):
    """Ends a run with advice when its completions give nothing to learn from.

    Args:
        patience: logged lines in a row, of those in which completions were sampled; None never ends a run.
        max_new_tokens: for the advice.

    Raises:
        UserError: in each of so many lines no group had completions of different rewards, or over 90 % of the
            completions were cut off.
    """

    def __init__(self, patience: int | None, *, max_new_tokens: int):
        self.patience, self.max_new_tokens = patience, max_new_tokens
        self.equal = 0
        self.cut = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if self.patience is None or "loss" not in logs or "clipped_share" not in logs:
            return
        self.cut = self.cut + 1 if logs["clipped_share"] > CUT_OFF else 0
        self.equal = self.equal + 1 if logs.get("zero_variance_share") == 1 else 0
        lines = f"in each of the last {self.patience} logged lines"
        if self.equal >= self.patience:
            raise UserError(
                f"step {state.global_step}: {lines} all completions of a prompt had the same reward (on average "
                f"{logs['reward']:.3g}), so nothing can be learned: look at the rewards with llmlab reward-check, "
                "raise the temperature or group_size, or start from a policy that succeeds now and then (llmlab sft); "
                "stop_patience=none goes on all the same"
            )
        if self.cut >= self.patience:
            raise UserError(
                f"step {state.global_step}: {lines} over {CUT_OFF:.0%} of the completions were cut off at "
                f"max_new_tokens = {self.max_new_tokens}, so that rewards see no endings: raise it, or fine-tune "
                "first, so that the model ends its turns (llmlab sft); stop_patience=none goes on all the same"
            )


class RolloutState(TrainerCallback):
    """Keeps the rollout that is learned from with the checkpoints, so that a resumed run goes on in its middle.

    Args:
        trainer: with `rollout_state` and `load_rollout_state`.
        checkpoint: to go on from.
    """

    def __init__(self, trainer: Any, checkpoint: Path | None):
        self.trainer, self.checkpoint = trainer, checkpoint

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.trainer.accelerator.process_index}-{ROLLOUT_STATE}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpoint is not None and self._file(self.checkpoint).is_file():
            # the type alone, which is this process' device: torch has no place of the name `cpu:0`
            kept = torch.load(self._file(self.checkpoint), map_location=self.trainer.accelerator.device.type)
            self.trainer.load_rollout_state(kept)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.trainer.rollout_state(), self._file(folder))
