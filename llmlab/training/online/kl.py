"""The weight of a KL penalty, steered towards a target: a proportional controller, and the callback that runs it.

Which estimate of the divergence is charged, and where, is the trainer's business.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlab.settings.errors import reading
from llmlab.settings.files import read_json, write_atomically

KL_STATE = "kl_state.json"


class KLController:
    """A weight that grows while the divergence is above its target, and shrinks while it is below.

    Args:
        coefficient: the weight to begin with.
        target: wanted divergence, in the unit of what `update` is told.
        horizon: samples over which the weight changes by at most a fifth.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    def __init__(self, coefficient: float, *, target: float, horizon: float):
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, samples: float) -> float:
        """Moves the weight and returns it.

        Args:
            kl: the measured divergence.
            samples: completions that were sampled since the last call.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        whole, rest = divmod(samples, self.horizon)  # told of many at once, the weight still never reaches 0
        self.coefficient *= (1 + error) ** whole * (1 + error * rest / self.horizon)
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """Returns what a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up what a checkpoint kept."""
        self.coefficient = float(state["coefficient"])


def save_controller(controller: KLController, folder: Path) -> None:
    """Writes a controller's state into a checkpoint."""
    write_atomically(folder / KL_STATE, json.dumps(controller.state_dict()))


def restore_controller(controller: KLController, folder: Path) -> None:
    """Reads a controller's state from a checkpoint; one of a run that did not adapt has none."""
    if (folder / KL_STATE).is_file():
        with reading(folder / KL_STATE, "the state of a KL controller"):
            controller.load_state_dict(read_json(folder / KL_STATE))


class AdaptiveKL(TrainerCallback):
    """Sets a trainer's `beta` by a controller each time that `kl` is logged, and keeps it with the checkpoints.

    Args:
        trainer: with `beta`.
        controller: of that weight.
        samples_per_step: completions sampled for one gradient step, over all processes.
        checkpoint: to go on from.
    """

    def __init__(
        self, trainer: Any, controller: KLController, *, samples_per_step: float, checkpoint: Path | None = None
    ):
        self.trainer, self.controller, self.samples_per_step = trainer, controller, samples_per_step
        self.checkpoint = checkpoint
        self.step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logged = [line["step"] for line in state.log_history if "loss" in line and line.get("kl") is not None]
        self.step = logged[-1] if logged else state.global_step
        if self.checkpoint is not None:
            restore_controller(self.controller, self.checkpoint)
        self.trainer.beta = self.controller.coefficient

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs or logs.get("kl") is None:
            return
        logs["kl_coef"] = self.trainer.beta  # what these steps were charged with
        samples = (state.global_step - self.step) * self.samples_per_step
        self.step = state.global_step
        self.trainer.beta = self.controller.update(logs["kl"], samples)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_controller(self.controller, Path(args.output_dir) / f"checkpoint-{state.global_step}")
