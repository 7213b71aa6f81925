"""Private names of TRL's and Transformers' trainers that every stage or a preference stage needs; contract-tested.

A name is here because no public one serves; what it is for stands beside it.
"""

import math
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmlab.settings.errors import reading

PRIVATE_NAMES = {  # where it is: its parameters
    # DPOTrainer tokenizes by itself, without a limit for prompts and without saying what it drops
    "trl.DPOTrainer._prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    # restoring only weights and step count when a run switches its optimizer
    "transformers.Trainer._load_optimizer_and_scheduler": ("self", "checkpoint"),
    # stopping before an update whose gradients are not finite: no callback is told their norm
    "transformers.Trainer._get_grad_norm": ("self", "model", "grad_norm"),
    # no step where a killed run had them all: its first value is the number of epochs
    "transformers.Trainer.set_initial_training_values": ("self", "args", "dataloader"),
    # one sentence for a damaged checkpoint
    "transformers.Trainer._load_rng_state": ("self", "checkpoint"),
    # the same for its weights
    "transformers.Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
}


def show_head_bias(model: PeftModel) -> None:
    """Lets TRL's loss, which reads weight and bias off the output head, read PEFT's wrapper of trained rows too."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # not a second parameter of the module


class PairsReady:
    """Mixin for a DPOTrainer: its datasets hold `prompt_ids`, `chosen_ids` and `rejected_ids` already.

    It also logs `completion_length`, the mean number of tokens of an answer.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        lengths = self.accelerator.gather(inputs["completion_mask"].sum(1).float())  # type: ignore[attr-defined]
        metrics = self._metrics["train" if model.training else "eval"]  # type: ignore[attr-defined]
        metrics["completion_length"].append(lengths.mean().item())
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class AnswerTokens:
    """Mixin for an ORPOTrainer: the same, for its public `tokenize_row`, whose columns these become."""

    def __init__(self, *args: Any, **kwargs: Any):
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                # it looks for texts before it tokenizes
                kwargs[name] = kwargs[name].map(lambda row: {"prompt": "", "chosen": "", "rejected": ""})
        super().__init__(*args, **kwargs)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return row


class SwitchableOptimizer:
    """Mixin for a Trainer: one sentence for a damaged checkpoint; resumes without the optimizer's state if asked."""

    load_optimizer: bool = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.load_optimizer:
            with reading(checkpoint or "", "a checkpoint's optimizer"):
                super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint, "a checkpoint"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or "", "a checkpoint's random state"):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


class GradientNorms:
    """Mixin for a Trainer: `on_gradients` gets the norm of an update's gradients before the update, if not finite."""

    def on_gradients(self, norm: float) -> None:
        pass

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        value = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if value is not None and not math.isfinite(value):  # DeepSpeed has none before its first update
            self.on_gradients(float(value))
        return norm
