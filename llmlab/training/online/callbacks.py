"""Callbacks of GRPO and PPO: names of metrics, when to stop, the adaptive KL coefficient."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from llmlab.runs.callbacks import StageMetrics
from llmlab.settings.errors import UserError

DUPLICATES = ("rewards/reward/mean", "rewards/reward/std", "frac_reward_zero_std")  # logged under better names
MOST_CLIPPED = 0.9


class OnlineMetrics(StageMetrics):
    """Gives TRL's metrics the names used here; `reward/NAME` is the mean of a component."""

    names = {
        "completions/clipped_ratio": "clipped_share",
        "completions/mean_length": "completion_length",
        "clip_ratio/region_mean": "ratio_clipped_share",
    }
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


@dataclass(eq=False)
class StopWithoutSignal(TrainerCallback):
    """Stops a run when for `patience` logged lines no group's rewards differed, or nearly all completions were cut
    off."""

    patience: int | None
    max_new_tokens: int
    equal: int = 0
    cut: int = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.patience is None or "loss" not in logs or "clipped_share" not in logs:
            return
        self.cut = self.cut + 1 if logs["clipped_share"] > MOST_CLIPPED else 0
        self.equal = self.equal + 1 if logs.get("zero_variance_share") == 1 else 0
        if max(self.cut, self.equal) < self.patience:
            return
        where = f"step {state.global_step}: in each of the last {self.patience} logged lines"
        if self.equal >= self.patience:
            raise UserError(
                f"{where} all completions of a prompt had the same reward (mean {logs['reward']:.3g}), so nothing can "
                "be learned: look at the rewards with llmlab reward-check, raise the temperature or group_size, or "
                "start from a policy that sometimes succeeds (llmlab sft); stop_patience=none disables this check"
            )
        raise UserError(
            f"{where} over {MOST_CLIPPED:.0%} of the completions were cut off at max_new_tokens = "
            f"{self.max_new_tokens}, so rewards see truncated completions only: raise it, or fine-tune first, so that "
            "the model ends its turns (llmlab sft); stop_patience=none disables it"
        )


@dataclass(eq=False)
class AdaptiveKL(TrainerCallback):
    """Adapts a trainer's KL coefficient, `beta`, each time that `kl` is logged: it grows while the KL is above its
    target, and shrinks while it is below, by at most a fifth in `horizon` samples.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    trainer: Any
    target: float
    horizon: float
    samples_per_step: float
    step: int = 0  # of the last update
    factor: float = 1.0  # of a rollback, on the restored coefficient

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continues a resumed run from its last logged values."""
        logged = [line for line in state.log_history if "loss" in line and line.get("kl") is not None]
        if logged and "kl_coef" in logged[-1]:
            self.step = logged[-2]["step"] if len(logged) > 1 else 0
            self.trainer.beta = logged[-1]["kl_coef"]
            self.update(logged[-1]["step"], logged[-1]["kl"])
            self.trainer.beta *= self.factor

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs and logs.get("kl") is not None:
            # the coefficient used since the last log
            logs["kl_coef"] = state.log_history[-1]["kl_coef"] = self.trainer.beta
            self.update(state.global_step, logs["kl"])

    def update(self, step: int, kl: float) -> None:
        """Sets the coefficient after a KL measured up to this step."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # with many samples at once it still never reaches 0
        whole, rest = divmod((step - self.step) * self.samples_per_step, self.horizon)
        self.trainer.beta *= (1 + error) ** whole * (1 + error * rest / self.horizon)
        self.step = step
