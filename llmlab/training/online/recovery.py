"""What runs of GRPO and PPO need beside their algorithm: rollouts that survive a kill, that a smaller batch can take
over, that reports can look at, that Sophia's estimate can share, and that say so when the policy diverged."""

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from llmlab.runs.trainer import StageTrainer
from llmlab.training.online._trl import RolloutSteps
from llmlab.training.online.passes import policy_mask

# how torch refuses to sample from probabilities that are not finite, on a CPU and on CUDA
NO_DISTRIBUTION = ("probability tensor contains either", "device-side assert triggered")


class ResumableRollouts(StageTrainer, RolloutSteps):
    """A GRPOTrainer with llmlab's optimizers and checks, which resumes in the middle of a rollout."""

    judges_loss = False  # its size says nothing

    def __init__(self, **kwargs: Any):
        self.prepared: dict[str, Any] | None = None
        super().__init__(**kwargs)

    def rollout_state(self, step: int) -> dict[str, Any]:
        """Returns the current rollout, its position and unlogged metrics, for a checkpoint."""
        waiting = {name: list(values) for name, values in self._metrics["train"].items()}
        return {"step": self._step, "rollout": self._buffered_inputs, "metrics": waiting, "split": self._split}

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Restores `rollout_state`; where the batch is split otherwise now, a new rollout goes on at that step."""
        split = state.get("split", self._split)
        if split != self._split:
            self._step = state["step"] // split[1] * self._split[1]
            return
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        for name, values in state["metrics"].items():
            self._metrics["train"][name].extend(values)

    @property
    def _split(self) -> tuple[int, int]:
        return self.args.world_size, self.args.gradient_accumulation_steps * self.parts

    def parts_of(self, batch: Any) -> list[Any]:
        """Returns the same prompts for each part: its rows are the next ones of the rollout."""
        # the loop sets it anew at each step
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        return [batch] * self.parts

    def divide(self, factor: int) -> None:
        super().divide(factor)
        self._step *= factor
        self.args.steps_per_generation *= factor
        self.args.per_device_train_batch_size //= factor  # in scoring
        rollout = self._buffered_inputs
        self._buffered_inputs = rollout and [part for whole in rollout for part in split_tensor_dict(whole, factor)]

    def newest_completions(self, count: int) -> list[dict[str, Any]]:
        """Returns the first ones of TRL's logged table, with the rewards by function."""
        rows = islice(zip(self._logs["prompt"], self._logs["completion"], strict=True), count)
        scores = {name: list(values) for name, values in self._logs["rewards"].items()}
        return [
            {"prompt": prompt, "completion": completion, "rewards": {name: scores[name][row] for name in scores}}
            for row, (prompt, completion) in enumerate(rows)
        ]

    def estimated_from(self, batch: Any) -> dict[str, Tensor]:
        """Returns the model inputs of Sophia's Hessian estimate: the next micro-batch, labelled at the policy's
        tokens."""
        self.model.train()  # as the step will: in evaluation it samples otherwise
        part = self._prepare_inputs(batch)
        self.prepared = part  # the training step reuses these inputs instead of sampling again
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        scored = torch.cat([torch.zeros_like(part["prompt_mask"]), policy_mask(part)], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1),
            "labels": ids.masked_fill(scored == 0, -100),
        }

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.prepared is not None:
            part, self.prepared = self.prepared, None
            return part
        return super()._prepare_inputs(generation_batch)

    def _generate(self, prompts: list[Any]) -> Any:
        try:
            return super()._generate(prompts)
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_DISTRIBUTION):
                raise
            raise self.diverged("sum of a next token's probabilities", math.nan) from error
