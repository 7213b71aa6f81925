"""`auto_batch`: a step that does not fit into memory is taken again from its start, with each micro-batch in parts, as
a run would that was started with the smaller batch and as much more accumulation."""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from llmlab.runs.failures import phase_of
from llmlab.runs.start import smaller_batch
from llmlab.settings.errors import is_out_of_memory

T = TypeVar("T")
# what TRL's trainers and ours count while they take a step, and the rollout that they take it on
COUNTS = {"_metrics", "_stored_metrics", "_total_train_tokens", "_logs", "_step", "divergences"}
ROLLOUT = {"_buffered_inputs", "prepared"}


class DivisibleBatches:
    """Mixin for a Trainer of one process: with `auto_batch` in its settings it takes a step in `parts` where memory
    runs out. `on_division` is called with the changed settings and the phase that ran out."""

    parts = 1
    rows_per_example = 1  # in a collated batch: of pairs all first rows, then all second ones
    on_division: Callable[[dict[str, Any], str], None] = staticmethod(lambda changes, phase: None)
    start: tuple[Any, ...] | None = None  # of this step, until it is over

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self.start, self.taken = None, []
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: torch.nn.Module, batch: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        take = super().training_step  # type: ignore[misc]
        if not self.settings.auto_batch:
            return take(model, batch, num_items_in_batch)
        self.taken.append(batch)
        is_last, accumulation = self.accelerator.sync_gradients, self.args.gradient_accumulation_steps

        def take_parts() -> torch.Tensor:
            self.args.gradient_accumulation_steps = accumulation * self.parts
            try:
                # after a division the whole step, whose gradients are gone
                for each in self.taken if self.divided else [batch]:
                    parts = self.parts_of(each)
                    total = torch.zeros((), device=self.args.device)
                    for number, part in enumerate(parts, start=1):
                        self.accelerator.sync_gradients = is_last and each is batch and number == len(parts)
                        total += take(model, part, num_items_in_batch)
            finally:
                self.args.gradient_accumulation_steps = accumulation
            return total  # of this batch

        return self.in_parts(take_parts)

    def in_parts(self, action: Callable[[], T]) -> T:
        """Returns what a part of a training step returns; out of memory, it is taken again in smaller parts."""
        self.start = self.start or self.moment()
        self.divided = False
        while True:
            try:
                return action()
            except (RuntimeError, MemoryError) as error:
                phase, changes = phase_of(error), smaller_batch(self.settings)
                if changes is None or phase == "sampling" or not self.may_divide(error):
                    raise
            # here the exception is gone, and with it the step's tensors
            self.model.zero_grad()
            self.go_back(self.start)
            rows = self.settings.rows_per_pass
            self.divide(getattr(self.settings, rows) // changes[rows])
            self.settings = self.settings.model_copy(update=changes)
            self.start, self.divided = self.moment(), True
            self.on_division(changes, phase)

    def evaluate_in_parts(self, evaluate: Callable[[], T]) -> T:
        """Returns what an evaluation returns, with smaller batches where memory runs out; rows and losses stay."""
        while True:
            start, rows = self.moment(), self.args.per_device_eval_batch_size
            try:
                return evaluate()
            except (RuntimeError, MemoryError) as error:
                if rows == 1 or not self.may_divide(error):
                    raise
            self.go_back(start)
            self.args.per_device_eval_batch_size = rows // 2

    def may_divide(self, error: BaseException) -> bool:
        """Whether memory ran out where smaller batches are allowed and possible."""
        return self.settings.auto_batch and self.accelerator.num_processes == 1 and is_out_of_memory(error)

    def parts_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns a collated batch as batches of fewer rows of the data."""
        if self.parts == 1:
            return [batch]
        rows = len(next(value for name, value in batch.items() if name.endswith("input_ids"))) // self.rows_per_example
        size = getattr(self.settings, self.settings.rows_per_pass)

        def part(value: Any, first: int) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim:
                return value.reshape(-1, rows, *value.shape[1:])[:, first : first + size].flatten(0, 1)
            return value[first : first + size] if isinstance(value, list) else value

        return [{name: part(value, first) for name, value in batch.items()} for first in range(0, rows, size)]

    def divide(self, factor: int) -> None:
        """Makes micro-batches smaller by a factor, from the present step on."""
        self.parts *= factor
        self.args.per_device_eval_batch_size = max(self.args.per_device_eval_batch_size // factor, 1)

    def moment(self) -> tuple[Any, ...]:
        """Returns what a step changes before its weights; `go_back` takes it once."""
        mine = vars(self)
        counts = {name: deepcopy(mine[name]) for name in COUNTS & mine.keys()}
        rollout = {name: mine[name] for name in ROLLOUT & mine.keys()}
        return random_states(self.args.device), counts | rollout, self.state.num_input_tokens_seen

    def go_back(self, moment: tuple[Any, ...]) -> None:
        """Frees what a step left, and restores what `moment` returned."""
        clear_device_cache(garbage_collection=True)
        restore, values, self.state.num_input_tokens_seen = moment
        restore()
        vars(self).update(values)


def random_states(device: torch.device) -> Callable[[], None]:
    """Returns a function that restores the present random states of Python, NumPy, torch and the device."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    on_device = module.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        module.set_rng_state(on_device)

    return restore
