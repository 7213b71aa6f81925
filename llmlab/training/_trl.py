"""The only place that touches private names of TRL's and Transformers' trainers; a contract test guards each.

A name is here because no public one serves; what it is for stands beside it.
"""

from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper

PRIVATE_NAMES = {  # where it is: its parameters
    # DPOTrainer tokenizes by itself, without a limit for prompts and without saying what it drops
    "trl.DPOTrainer._prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    # restoring only weights and step count when a run switches its optimizer
    "transformers.Trainer._load_optimizer_and_scheduler": ("self", "checkpoint"),
}


def show_head_bias(model: PeftModel) -> None:
    """Lets TRL's loss, which reads weight and bias off the output head, read PEFT's wrapper of trained rows too."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # not a second parameter of the module


class PairsReady:
    """Mixin for a DPOTrainer: its datasets hold `prompt_ids`, `chosen_ids` and `rejected_ids` already."""

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
    """Mixin for a Trainer: resumes without the optimizer's state where `load_optimizer` is False."""

    load_optimizer: bool = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.load_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
