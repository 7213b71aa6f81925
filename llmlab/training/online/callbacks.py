"""Callbacks of GRPO and PPO: names of metrics, when to stop, what resuming needs."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llmlab.settings.errors import UserError, reading

ROLLOUT_STATE = "rollout.pt"
NAMES = {  # TRL's metrics: their names here
    "completions/clipped_ratio": "clipped_share",
    "completions/mean_length": "completion_length",
    "clip_ratio/region_mean": "ratio_clipped_share",
}
DUPLICATES = ("rewards/reward/mean", "rewards/reward/std", "frac_reward_zero_std")  # logged under better names
MOST_CLIPPED = 0.9


class OnlineMetrics(TrainerCallback):
    """Gives TRL's metrics the names used here; `reward/NAME` is the mean of a component."""

    def __init__(self) -> None:
        self.tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for name in list(logs):
            theirs = name.removeprefix(prefix)
            if theirs in DUPLICATES or logs[name] is None:
                del logs[name]
            elif theirs in NAMES:
                logs[prefix + NAMES[theirs]] = logs.pop(name)
            elif theirs.startswith("reward_components/"):
                logs[f"{prefix}reward/{theirs.split('/')[1]}"] = logs.pop(name)
        if "loss" in logs:
            # present only in logs of steps that sampled
            logs["num_tokens"] = state.num_input_tokens_seen - self.tokens_before
        state.log_history[-1] = {**logs, "step": state.global_step}  # the trainer kept a copy under its own names


class StopWithoutSignal(TrainerCallback):
    """Stops a run, with advice, when its completions give no learning signal.

    That is when in `patience` logged lines in a row no group had completions of different rewards, or over 90 % of the
    completions were cut off; None never ends a run.
    """

    def __init__(self, patience: int | None, *, max_new_tokens: int):
        self.patience, self.max_new_tokens = patience, max_new_tokens
        self.equal = 0
        self.cut = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.patience is None or "loss" not in logs or "clipped_share" not in logs:
            return
        self.cut = self.cut + 1 if logs["clipped_share"] > MOST_CLIPPED else 0
        self.equal = self.equal + 1 if logs.get("zero_variance_share") == 1 else 0
        lines = f"in each of the last {self.patience} logged lines"
        if self.equal >= self.patience:
            raise UserError(
                f"step {state.global_step}: {lines} all completions of a prompt had the same reward (mean "
                f"{logs['reward']:.3g}), so nothing can be learned: look at the rewards with llmlab reward-check, "
                "raise the temperature or group_size, or start from a policy that sometimes succeeds (llmlab sft); "
                "stop_patience=none disables this check"
            )
        if self.cut >= self.patience:
            raise UserError(
                f"step {state.global_step}: {lines} over {MOST_CLIPPED:.0%} of the completions were cut off at "
                f"max_new_tokens = {self.max_new_tokens}, so rewards see truncated completions only: raise it, or "
                "fine-tune first, so that the model ends its turns (llmlab sft); stop_patience=none disables it"
            )


class RolloutState(TrainerCallback):
    """Saves the current rollout with each checkpoint, so that a run resumes in the middle of it."""

    def __init__(self, trainer: Any, checkpoint: Path | None):
        self.trainer, self.checkpoint = trainer, checkpoint

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.trainer.accelerator.process_index}-{ROLLOUT_STATE}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint is not None and self._file(self.checkpoint).is_file():
            # the device type only: torch.load has no map_location `cpu:0`
            device = self.trainer.accelerator.device.type
            with reading(self._file(self.checkpoint), "a rollout"):
                self.trainer.load_rollout_state(torch.load(self._file(self.checkpoint), map_location=device))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.trainer.rollout_state(), self._file(folder))
