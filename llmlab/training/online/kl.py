"""The adaptive KL coefficient: a proportional controller, and the callback that runs it.

Which estimate of the divergence is penalized, and where, is the trainer's business.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmlab.settings.errors import reading
from llmlab.settings.files import read_json, write_atomically

KL_STATE = "kl_state.json"


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

    def save(self, folder: Path) -> None:
        """Writes its state into a checkpoint."""
        write_atomically(folder / KL_STATE, json.dumps({"coefficient": self.coefficient}))

    def load(self, folder: Path) -> None:
        """Reads its state from a checkpoint; absent when the earlier run had a fixed coefficient."""
        if (folder / KL_STATE).is_file():
            with reading(folder / KL_STATE, "the state of a KL controller"):
                self.coefficient = float(read_json(folder / KL_STATE)["coefficient"])


class AdaptiveKL(TrainerCallback):
    """Sets a trainer's `beta` each time that `kl` is logged, and saves the controller with the checkpoints.

    `samples_per_step` counts the completions sampled for one gradient step, over all processes.
    """

    def __init__(
        self, trainer: Any, controller: KLController, *, samples_per_step: float, checkpoint: Path | None = None
    ):
        self.trainer, self.controller, self.samples_per_step = trainer, controller, samples_per_step
        self.checkpoint = checkpoint
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = [line["step"] for line in state.log_history if "loss" in line and line.get("kl") is not None]
        self.step = logged[-1] if logged else state.global_step
        if self.checkpoint is not None:
            self.controller.load(self.checkpoint)
        self.trainer.beta = self.controller.coefficient

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs or logs.get("kl") is None:
            return
        logs["kl_coef"] = self.trainer.beta  # the coefficient used since the last log
        samples = (state.global_step - self.step) * self.samples_per_step
        self.step = state.global_step
        self.trainer.beta = self.controller.update(logs["kl"], samples)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.controller.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
