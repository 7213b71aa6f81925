"""What every trainer of llmlab's shares, whatever its loss: our optimizers, and Sophia's estimates between steps."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llmlab.optim.build import build_optimizer
from llmlab.optim.sophia import estimate_hessian_if_due, estimate_is_due
from llmlab.settings.errors import UserError
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.training._trl import SwitchableOptimizer
from llmlab.training.arguments import trying


class OurOptimizers(SwitchableOptimizer):
    """Mixin for a trainer of Transformers' or TRL's; rate, decay and seed are those of the trainer's arguments.

    Args:
        settings: the stage's settings, which name the optimizer.
        load_optimizer: when resuming, whether to restore the optimizer's state.
        kwargs: of the trainer.
    """

    def __init__(self, settings: OptimizerSettings, *, load_optimizer: bool = True, **kwargs: Any):
        self.settings = settings
        self.load_optimizer = load_optimizer
        try:
            with trying(settings, "arguments of the trainer"):
                super().__init__(**kwargs)
        except UserError:
            with suppress(OSError):  # it was made for nothing, unless a run is in it
                Path(kwargs["args"].output_dir).rmdir()
            raise

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except (TypeError, ValueError, ImportError) as error:
            if isinstance(error, UserError) or not self.settings.trainer_args:
                raise
            with trying(self.settings, "arguments of the trainer"):
                raise

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = {"learning_rate": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            self.optimizer = build_optimizer(model or self.model, self.settings, **rates)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        # before the micro-batches, which other processes do not see until the last one of a step
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches and estimate_is_due(self.optimizer):
            inputs = self.estimated_from(batches[0])
            estimate_hessian_if_due(self.model_wrapped, inputs, self.optimizer, self.args.seed)
        return batches, items

    def estimated_from(self, batch: Any) -> dict[str, torch.Tensor]:
        """Returns what the model is shown for Sophia's estimate, of a batch as it comes from the data."""
        return self._prepare_inputs(batch)
