"""What every trainer shares, whatever its loss: llmlab's optimizers, updates that are refused or left out for a bad
number, losses of single validation rows, evaluation that leaves the random states alone, and checkpoints marked as
incomplete while they are written."""

import heapq
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, set_seed

from llmlab.health.checks import SPIKE_FEWEST, SPIKE_WINDOW, not_finite
from llmlab.health.symptoms import Event
from llmlab.optim.build import build_optimizer
from llmlab.optim.sophia import estimate_hessian_if_due, estimate_is_due, next_token_logits
from llmlab.runs import checkpoints
from llmlab.runs._trl import ResumableCheckpoint
from llmlab.runs.arguments import blame_trainer_args
from llmlab.runs.failures import DivisibleBatches, random_states
from llmlab.runs.record import HARDEST_ROWS
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import Diverged, UserError
from llmlab.settings.files import write_atomically
from llmlab.settings.optimizer import OptimizerSettings

MOST = 20  # hardest rows that are recorded
BEGINNING, CHARACTERS = 96, 240  # of a row's text that is recorded: tokens, characters
LOSSES = {"loss": "loss", "eval_loss": "validation loss", "grad_norm": "gradient norm"}
SPIKES = {"grad_norm": "gradient_norm_exploding", "loss": "loss_spike"}


class Guard:
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

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        self.before_update(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return norm

    def before_update(self, norm: Tensor | float | None) -> None:
        """Refuses an update that would follow a loss or a gradient that is not finite or leaps: without gradients, or
        with `found_inf`, neither weights nor optimizer states change."""
        if self.passes_over:
            self.left_out += 1
            return self.optimizer.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
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
            self.optimizer.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
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
                self.on_nonfinite(name, value)  # type: ignore[attr-defined]
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


class StageTrainer(Guard, DivisibleBatches, ResumableCheckpoint):
    """Mixin for a trainer of Transformers or TRL: optimizers of the settings, and an end at numbers that are not
    finite. With `has_all_steps` it takes no step: the checkpoint has them all, and only the end is left."""

    has_all_steps = False
    on_cpu = True  # whether losses may use what is faster there
    gate_metrics: dict[str, float] = {}  # the gate that decides about the best checkpoint, at this step

    def __init__(self, settings: OptimizerSettings, *, load_optimizer: bool = True, **kwargs: Any):
        self.settings = settings
        self.load_optimizer = load_optimizer
        with blame_trainer_args(settings, "arguments of the trainer"):
            super().__init__(**kwargs)
        if self.is_fsdp_enabled:  # else checkpoints hold shards alone
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if self.is_deepspeed_enabled:
            zero = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
                raise UserError(
                    "DeepSpeed ZeRO-3: the run folder would have no weights; set zero3_save_16bit_model: true "
                    "(stage3_gather_16bit_weights_on_model_save in a JSON file)"
                )
        self.estimate_from: Any = None  # the coming step's first batch, where a Hessian estimate is due
        if settings.optimizer == "sophia":
            self.add_callback(EstimateFirst(self))  # type: ignore[attr-defined]

    def newest_completions(self, count: int) -> list[dict[str, Any]]:
        """Returns some of the last rollout's prompts, completions and rewards; none where no step samples."""
        return []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.weights_are_finite():
            source = spellings_of(type(self.settings))["policy_checkpoint"]
            first = next(name for name, p in self.model.named_parameters() if not p.isfinite().all())
            raise UserError(
                f"{source.key} = {source.of(self.settings)}: its weights are not finite (the first is in {first}); "
                "start from another checkpoint"
            )
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except (TypeError, ValueError, ImportError):
            with blame_trainer_args(self.settings, "arguments of the trainer"):
                raise

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = {"learning_rate": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            self.optimizer = build_optimizer(model or self.model, self.settings, **rates)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.settings.scheduler == "wsd":
            after_warmup = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            decay = min(math.ceil(self.settings.decay_share * num_training_steps), after_warmup)
            self.args.lr_scheduler_kwargs = {**self.args.lr_scheduler_kwargs, "num_decay_steps": decay}
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        run = super().evaluate  # type: ignore[misc]

        def evaluate() -> dict[str, float]:
            set_seed(self.args.seed + self.args.process_index)  # equal weights get equal scores at every step
            return run(*args, **kwargs)

        with ExitStack() as stack:
            stack.callback(random_states(self.args.device))
            return self.evaluate_in_parts(evaluate)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        due = estimate_is_due(self.optimizer) and not self.passes_over
        self.estimate_from = batches[0] if batches and due else None
        return batches, items

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> Any:
        if batches:
            self.leave_out_repeated(batches[-1], self.args.train_batch_size)
        return super()._get_num_items_in_batch(batches, device)  # type: ignore[misc]

    def leave_out_repeated(self, batch: dict[str, Any], rows: int) -> None:
        """Takes out of the loss the rows with which Accelerate fills up the last batches of an epoch, so that every
        process has as many; in rows flattened into one they stay."""
        state, processes = self.accelerator.gradient_state, self.args.world_size
        if processes == 1 or not state.end_of_dataloader or len(batch.get("labels", ())) != rows:
            return
        left = len(state.active_dataloader.dataset) % (rows * processes)
        if left:
            batch["labels"][max(left - rows * self.args.process_index, 0) :] = -100

    def set_initial_training_values(self, *args: Any) -> tuple[Any, ...]:
        epochs, *others = super().set_initial_training_values(*args)  # type: ignore[misc]
        return (0 if self.has_all_steps else epochs, *others)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.read_numbers()
        if not self.weights_are_finite():
            raise self.diverged("norm of the weights", math.inf)
        if _internal_call and output_dir is not None:  # the first file of a checkpoint
            if self.args.should_save:
                checkpoints.begin(Path(output_dir))
            self.accelerator.wait_for_everyone()
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def on_nonfinite(self, name: str, value: float) -> None:
        """Ends training at a number that is not finite, or returns where a loss scaler leaves the update out."""
        scaler = self.accelerator.scaler
        if self.args.fp16 and (scaler is None or scaler.get_scale() >= 1):
            return  # the loss scaler (DeepSpeed has its own) skips this update and lowers a scale that may be too high
        raise self.diverged(LOSSES[name], value, update=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.read_numbers()
        if "loss" in logs and self.left_out:
            logs["updates_left_out"], self.left_out = self.left_out, 0
        if "eval_runtime" in logs:
            logs.update(self.gate_metrics)
        super().log(logs, start_time)  # type: ignore[misc]  # first, so that the record has the line
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise self.diverged(LOSSES[name], logs[name])

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Returns, on every process alike, whether the norm of the weights is finite."""
        weights = (p for p in self.model.parameters() if p.is_floating_point())
        # this process's shards under FSDP2 and ZeRO-3
        local = [p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for p in weights]
        norm = get_total_norm(local)
        return bool(self.accelerator.gather(norm.float().reshape(1)).isfinite().all())

    def diverged(self, what: str, value: float, *, update: int = 0) -> Diverged:
        """Reports a number that is not finite, of the coming step where `update` is 1, and returns the error."""
        self.on_event(not_finite(self.state.global_step + update, what, value))
        rate = spellings_of(type(self.settings))["learning_rate"]
        return Diverged(
            f"step {self.state.global_step}: the {what} is {value}: the run diverged and saved nothing of it; "
            f"lower {rate.key} = {rate.of(self.settings):g}, warm up longer or clip gradients more"
        )

    def estimated_from(self, batch: Any) -> dict[str, torch.Tensor]:
        """Returns the model inputs for Sophia's Hessian estimate from a batch of the data loader."""
        return self._prepare_inputs(batch)

    predict = staticmethod(next_token_logits)
    """The logits of the choices that the loss scores, (choices, alternatives)."""


class RowLosses:
    """Sums of the losses of validation rows, by source, and the hardest ones, from what evaluation computes anyway.
    `origins` yields rows as (ids, name of the source, number there). A row is known by its tokens, so packing,
    shuffling and several processes do not matter; one of pretraining has the text of several documents."""

    def __init__(self, origins: Callable[[], Iterable[tuple[np.ndarray, str, int]]], decode: Callable[[Any], str]):
        self.decode = decode
        self.places = {_key(ids): (source, row) for ids, source, row in origins()}
        self.sources = list(dict.fromkeys(source for source, _ in self.places.values()))

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Sees what an evaluation's forward passes return: `log_probs` of TRL's loss, or what llmlab's head keeps."""
        self.sums = np.zeros((len(self.sources), 2))  # losses and tokens
        self.hardest: list[tuple[float, int, int, str, list[int]]] = []

        def look(module: Any, args: Any, output: Any) -> None:
            scores = getattr(output, "log_probs", None)
            self.last = module.get_output_embeddings().token_losses if scores is None else -scores

        handle = model.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()
            self.last = None

    def add(self, inputs: dict[str, Any]) -> None:
        """Counts the rows of the last forward pass; its token losses are (batch, time - 1) or (batch, time)."""
        names = ("input_ids", "labels", "position_ids", "attention_mask")
        ids, labels, positions, mask = (inputs[name].cpu().numpy() if name in inputs else None for name in names)
        losses = np.zeros(labels.shape)
        losses[:, 1:] = self.last.float().cpu().numpy()[:, -(labels.shape[1] - 1) :]
        counted = labels != -100
        counted[:, 0] = False
        for row in range(len(ids)):
            tokens = np.arange(ids.shape[1]) if mask is None else np.flatnonzero(mask[row])
            starts = [0] if positions is None else np.flatnonzero(positions[row][tokens] == 0)
            for part in np.split(tokens, starts[1:]):
                number = int(counted[row][part].sum())
                place = self.places.get(_key(ids[row][part])) if number else None
                if place is None:
                    continue
                total = float(losses[row][part][counted[row][part]].sum())
                self.sums[self.sources.index(place[0])] += total, number
                entry = (total / number, -place[1], number, place[0], ids[row][part][:BEGINNING].tolist())
                if all(entry[1::2] != each[1::2] for each in self.hardest):  # a mixture may repeat rows
                    (heapq.heappush if len(self.hardest) < MOST else heapq.heappushpop)(self.hardest, entry)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns `eval_loss/SOURCE`, means over the tokens of each source, where there are several."""
        sums = accelerator.reduce(torch.tensor(self.sums, device=accelerator.device).float(), reduction="sum").tolist()
        if len(self.sources) < 2:
            return {}
        return {f"eval_loss/{name}": total / n for name, (total, n) in zip(self.sources, sums, strict=True) if n}

    def write(self, folder: Path, step: int, accelerator: Accelerator) -> None:
        """Writes the hardest rows of all processes into a run folder, in place of those of an earlier evaluation."""
        distinct = {entry[1::2]: entry for entry in sorted(gather_object(self.hardest))}.values()
        if not accelerator.is_main_process:
            return
        lines = [
            {"step": step, "source": source, "row": -row, "loss": loss, "tokens": tokens}
            | {"text": self.decode(ids)[:CHARACTERS]}
            for loss, row, tokens, source, ids in sorted(distinct, reverse=True)[:MOST]
        ]
        write_atomically(folder / HARDEST_ROWS, "".join(json.dumps(line) + "\n" for line in lines))


def _key(ids: np.ndarray) -> int:
    return hash(np.ascontiguousarray(ids, np.int64).tobytes())


class TokenMeanEvaluation:
    """Mixin for a trainer of next tokens: its validation loss is a mean over all tokens, however they are batched."""

    eval_sums: torch.Tensor  # [sum of token losses, number of tokens] of this evaluation
    origins: Callable[[], Any] | None = None  # of the validation rows, as `RowLosses` takes them
    rows: RowLosses | None = None

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.leave_out_repeated(inputs, self.args.eval_batch_size)
        inputs = self._prepare_inputs(inputs)
        tokens = (inputs["labels"][..., 1:] != -100).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.eval_sums += torch.stack([torch.where(tokens > 0, loss * tokens, 0), tokens])
        if self.rows is not None:
            self.rows.add(inputs)
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.eval_sums = torch.zeros(2, device=self.args.device)
        if self.origins is not None and self.rows is None:
            self.rows = RowLosses(self.origins, partial(self.processing_class.decode, skip_special_tokens=True))
        with nullcontext() if self.rows is None else self.rows.watch(self.model):  # type: ignore[attr-defined]
            output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        total, tokens = self.accelerator.reduce(self.eval_sums, reduction="sum").tolist()
        output.metrics["eval_loss"] = total / max(tokens, 1)  # the trainer's is a mean over rows
        if self.rows is not None:
            output.metrics.update(self.rows.metrics(self.accelerator))
            self.rows.write(Path(self.args.output_dir), self.state.global_step, self.accelerator)
        return output


@dataclass(eq=False)
class EstimateFirst(TrainerCallback):
    """Runs a due Hessian estimate (Sophia's) before a step has gradients; the random states are restored."""

    trainer: StageTrainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer, batch = self.trainer, self.trainer.estimate_from

        def estimate() -> None:
            inputs, seed = trainer.estimated_from(trainer.parts_of(batch)[0]), trainer.args.seed
            estimate_hessian_if_due(trainer.model_wrapped, inputs, trainer.optimizer, seed, trainer.predict)

        if batch is not None:
            trainer.estimate_from = None
            trainer.in_parts(estimate)
