"""The only place that touches private names of TRL's and Transformers' trainers; a contract test guards each.

A name is here because no public one serves; what it is for stands beside it.
"""

from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper

PRIVATE_NAMES = {
    # restoring only weights and step count when a run switches its optimizer
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}


def show_head_bias(model: PeftModel) -> None:
    """Lets TRL's loss, which reads weight and bias off the output head, read PEFT's wrapper of trained rows too."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # not a second parameter of the module


class SwitchableOptimizer:
    """Mixin for a Trainer: resumes without the optimizer's state where `load_optimizer` is False."""

    load_optimizer: bool = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.load_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
