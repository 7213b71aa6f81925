"""Callbacks of GRPO and PPO: names of metrics, and when to stop."""

from typing import Any

from transformers import TrainerCallback

from llmlab.runs.callbacks import StageMetrics
from llmlab.settings.errors import UserError

NAMES = {  # TRL's metrics: their names here
    "completions/clipped_ratio": "clipped_share",
    "completions/mean_length": "completion_length",
    "clip_ratio/region_mean": "ratio_clipped_share",
}
DUPLICATES = ("rewards/reward/mean", "rewards/reward/std", "frac_reward_zero_std")  # logged under better names
MOST_CLIPPED = 0.9


class OnlineMetrics(StageMetrics):
    """Gives TRL's metrics the names used here; `reward/NAME` is the mean of a component."""

    names = NAMES
    tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen

    def add_metrics(self, logs: dict[str, Any], prefix: str, state: Any) -> None:
        for name in list(logs):
            if name.removeprefix(prefix) in DUPLICATES or logs[name] is None:
                del logs[name]
            elif name.startswith(f"{prefix}reward_components/"):
                logs[f"{prefix}reward/{name.split('/')[1]}"] = logs.pop(name)
        if "loss" in logs:
            # present only in logs of steps that sampled
            logs["num_tokens"] = state.num_input_tokens_seen - self.tokens_before


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
