"""What stands between a bad number and the weights: updates that are refused or left out before the optimizer."""

import math
from collections import deque
from collections.abc import Callable, Collection
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from llmlab.health.checks import SPIKE_FEWEST, SPIKE_WINDOW
from llmlab.health.symptoms import Event
from llmlab.runs._trl import GradientNorms

SPIKES = {"grad_norm": "gradient_norm_exploding", "loss": "loss_spike"}


class Guard(GradientNorms):
    """Mixin for a Trainer: no update with a loss or gradient norm that is not finite or beyond `skip_spikes` standard
    deviations of the last 128 steps, nor on the batches of steps in `passed_over`. On a GPU with a fused optimizer its
    kernel leaves the update out, and the numbers are read one step later, so that nothing waits for them."""

    passed_over: Collection[int] = ()
    on_event: Callable[[Event], None] = staticmethod(lambda event: None)
    judges_loss = True
    step_loss: Tensor | None = None
    unread: tuple[int, Tensor] | None = None  # step, [gradient norm, loss]
    left_out = 0  # updates since the last log event

    def __init__(self, **kwargs: Any):
        self.usual = {name: deque[float](maxlen=SPIKE_WINDOW) for name in SPIKES}
        super().__init__(**kwargs)

    @property
    def passes_over(self) -> bool:
        """Whether the coming update is one that an earlier attempt failed on."""
        return self.state.global_step + 1 in self.passed_over  # type: ignore[attr-defined]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self.step_loss = None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.passes_over:  # the logged loss is the one before
            logged = (line["loss"] for line in reversed(self.state.log_history) if "loss" in line)  # type: ignore[attr-defined]
            loss = self.usual["loss"][-1] if self.usual["loss"] else next(logged, 0.0)
            loss = torch.tensor(loss / self.current_gradient_accumulation_steps, device=self.args.device)  # type: ignore[attr-defined]
            if (scaler := self.accelerator.scaler) is not None:  # type: ignore[attr-defined]  # it refuses to have none
                scaler.scale(loss)
                parameter = self.optimizer.param_groups[0]["params"][0]  # type: ignore[attr-defined]
                parameter.grad = torch.zeros_like(parameter)
            return loss
        loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def before_update(self, norm: Tensor | float | None) -> None:
        if self.passes_over:
            self.left_out += 1
            return self.drop_update()
        if norm is None:  # DeepSpeed has none before its first update
            return None
        args = self.args  # type: ignore[attr-defined]
        norm = torch.as_tensor(norm, device=args.device)
        loss = norm if self.step_loss is None else self.step_loss.detach()
        numbers = torch.stack([each.float().reshape(()) for each in (norm, loss)])
        if args.world_size > 1:  # all processes decide alike, to the last bit
            numbers = self.accelerator.reduce(numbers, reduction="mean")  # type: ignore[attr-defined]
        self.read_numbers()
        self.unread = (self.state.global_step + 1, numbers)  # type: ignore[attr-defined]
        if (optimizer := self.skipping_optimizer()) is not None:
            highest = self.highest()
            good = numbers < numbers.new_tensor([highest[name] for name in SPIKES])  # NaN and infinity are not
            optimizer.found_inf = (~good.all()).to(torch.float32)
        elif not self.read_numbers():
            self.drop_update()
        return None

    def skipping_optimizer(self) -> Any:
        """Returns torch's fused optimizer on a GPU, which leaves an update out where its `found_inf` is 1, or None."""
        on_gpu = self.args.device.type == "cuda"  # type: ignore[attr-defined]
        if not on_gpu or self.is_deepspeed_enabled or self.accelerator.scaler is not None:  # type: ignore[attr-defined]
            return None
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[attr-defined]
        return optimizer if optimizer.defaults.get("fused") else None

    def read_numbers(self) -> bool:
        """Judges the last numbers that were not read; returns whether their update was, or is to be, made."""
        if self.unread is None:
            return True
        (step, values), self.unread = self.unread, None
        numbers, highest = dict(zip(SPIKES, values.tolist(), strict=True)), self.highest()
        for name, value in numbers.items():
            if not math.isfinite(value):
                self.on_nonfinite(name, value)
                return True  # left out by the loss scaler
        for name, value in numbers.items():
            if value >= highest[name]:
                self.left_out += 1
                usual = f"{fmean(self.usual[name]):.4g} +- {pstdev(self.usual[name]):.2g}"
                message = f"spike ({name}): {value:.4g} at step {step}, {usual} before"
                self.on_event(Event(step, SPIKES[name], name, value, message, action="update left out", since=step))
                return False
        for name, value in numbers.items():
            self.usual[name].append(value)
        return True

    def highest(self) -> dict[str, float]:
        """Returns the values from which on an update is left out."""
        deviations, found = self.settings.skip_spikes, dict.fromkeys(SPIKES, math.inf)  # type: ignore[attr-defined]
        if deviations is not None and len(self.usual["loss"]) >= SPIKE_FEWEST:
            names = SPIKES if self.judges_loss else ("grad_norm",)
            found |= {name: fmean(self.usual[name]) + deviations * pstdev(self.usual[name]) for name in names}
        return found

    def on_nonfinite(self, name: str, value: float) -> None:
        """Ends training at a number that is not finite, or returns where a loss scaler leaves the update out."""

    def drop_update(self) -> None:
        """Takes the gradients away, without which an optimizer changes neither weights nor state."""
        self.optimizer.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
