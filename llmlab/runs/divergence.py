"""Ends a run whose gradients, losses or weights are NaN or infinite, before it saves or reports any of them.

Every process sees the same numbers, so all of them stop.
"""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from llmlab.runs._trl import GradientNorms
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import Diverged, UserError

LOSSES = {"loss": "loss", "eval_loss": "validation loss"}


class FiniteNumbers(GradientNorms):
    """Mixin for a Trainer with `settings` that raises `Diverged`: gradients are checked before each update, losses when
    they are logged, weights before the first step and before they are saved.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.weights_are_finite():
            source = spellings_of(type(self.settings))["policy_checkpoint"]
            first = next(name for name, p in self.model.named_parameters() if not p.isfinite().all())
            raise UserError(
                f"{source.key} = {source.of(self.settings)}: {first} holds weights that are NaN or infinite; "
                "start from another checkpoint"
            )
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def on_gradients(self, norm: float) -> None:
        scaler = self.accelerator.scaler
        if self.args.fp16 and (scaler is None or scaler.get_scale() >= 1):
            return  # the loss scaler (DeepSpeed has its own) skips this update and lowers a scale that may be too high
        raise self.diverged("gradient norm", norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]  # first, so that the record has the line
        for name, words in LOSSES.items():
            if not math.isfinite(logs.get(name, 0.0)):
                raise self.diverged(words, logs[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_weights()
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def check_weights(self) -> None:
        """Raises `Diverged` where a weight is not finite; every process must call it."""
        if not self.weights_are_finite():
            raise self.diverged("norm of the weights", math.inf)

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Returns, on every process alike, whether the norm of the weights is finite."""
        norm = get_total_norm([_local(p) for p in self.model.parameters() if p.is_floating_point()])
        return bool(self.accelerator.gather(norm.float().reshape(1)).isfinite().all())

    def diverged(self, what: str, value: float) -> Diverged:
        """Returns the error for a number that is not finite."""
        rate = spellings_of(type(self.settings))["learning_rate"]
        return Diverged(
            f"step {self.state.global_step}: the {what} is {value}: the run diverged and saved nothing of it; "
            f"lower {rate.key} = {rate.of(self.settings):g}, warm up longer or clip gradients more"
        )


def _local(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns a parameter, or this process's shard of it under FSDP2 or ZeRO-3."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
