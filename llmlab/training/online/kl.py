"""The adaptive KL coefficient: a proportional controller, and the callback that runs it.

Which estimate of the divergence is penalized, and where, is the trainer's business.
"""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback


class KLController:
    """The KL coefficient: grows while the KL is above its target, and shrinks while it is below.

    Args:
        coefficient: the first one.
        target: wanted divergence, in the unit of `update`.
        horizon: samples over which the coefficient changes by at most a fifth.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    def __init__(self, coefficient: float, *, target: float, horizon: float):
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, samples: float) -> float:
        """Returns the coefficient after a measured divergence, `samples` completions after the last call."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        whole, rest = divmod(samples, self.horizon)  # with many samples at once it still never reaches 0
        self.coefficient *= (1 + error) ** whole * (1 + error * rest / self.horizon)
        return self.coefficient


@dataclass(eq=False)
class AdaptiveKL(TrainerCallback):
    """Sets a trainer's `beta` each time that `kl` is logged; a resumed run continues from the last logged values.

    `samples_per_step` counts the completions sampled for one gradient step, over all processes.
    """

    trainer: Any
    controller: KLController
    samples_per_step: float
    step: int = 0  # of the last update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = [line for line in state.log_history if "loss" in line and line.get("kl") is not None]
        if logged and "kl_coef" in logged[-1]:
            self.step = logged[-2]["step"] if len(logged) > 1 else 0
            self.controller.coefficient = logged[-1]["kl_coef"]
            self._update(logged[-1]["step"], logged[-1]["kl"])
        self.trainer.beta = self.controller.coefficient

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs and logs.get("kl") is not None:
            # the coefficient used since the last log
            logs["kl_coef"] = state.log_history[-1]["kl_coef"] = self.trainer.beta
            self._update(state.global_step, logs["kl"])

    def _update(self, step: int, kl: float) -> None:
        self.trainer.beta = self.controller.update(kl, (step - self.step) * self.samples_per_step)
        self.step = step
