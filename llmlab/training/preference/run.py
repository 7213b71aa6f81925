"""What the stages that learn from preference pairs share: their rows, their batches, and what is logged of them."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlab.data.chat.makers import PreferenceMaker
from llmlab.data.chat.rows import Rows, build_rows
from llmlab.hardware import Hardware
from llmlab.runs.arguments import build_arguments, rhythm_arguments
from llmlab.runs.callbacks import perplexity
from llmlab.runs.policy import Policy
from llmlab.runs.progress import ProgressLine
from llmlab.runs.run import Run, describe_evaluation, describe_optimizer, total_steps
from llmlab.settings.preference import PreferenceSettings

NAMES = {  # the trainers' words for what people ask for
    "rewards/accuracies": "win_rate",
    "rewards/margins": "margin",
    "accuracy": "win_rate",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
}
ADVICE = (
    "the probability of the better answers falls together with that of the worse: the policy is drifting away from "
    "both; lower learning_rate, raise beta, or fine-tune on the better answers first (llmlab sft)"
)


def read_pairs(run: Run[Any], policy: Policy, *, max_prompt_length: int | None) -> Rows:
    """Returns the pairs of a stage's sources as tokens."""
    settings, processes = run.settings, run.process.num_processes
    length = policy.fit(settings.max_length)
    if max_prompt_length is not None and max_prompt_length >= length:
        max_prompt_length = length // 2  # a short context has room for an answer too
    maker = PreferenceMaker(
        policy.tokenizer, max_length=length, max_prompt_length=max_prompt_length, stops=policy.stops
    )
    with run.process.main_process_first(), run.reading():
        return build_rows(
            settings,
            maker,
            seed=settings.seed,
            allow_truncated=settings.allow_truncated,
            validation_rows=settings.eval_batches * settings.mini_batch_size * processes,
            max_samples=settings.max_samples,
            **run.extent(settings.mini_batch_size * processes * settings.accumulation(processes)),
        )


def preference_arguments(
    config: type, settings: PreferenceSettings, hardware: Hardware, *, evaluates: bool, processes: int, **fixed: Any
) -> Any:
    """Returns the arguments of a TRL preference trainer for these settings on this machine."""
    return build_arguments(
        config,
        settings,
        hardware,
        per_device_eval_batch_size=settings.mini_batch_size,
        prediction_loss_only=True,
        gradient_accumulation_steps=settings.accumulation(processes),
        **({} if settings.epochs is None else {"max_steps": -1}),
        **rhythm_arguments(settings, evaluates=evaluates),
        **fixed,
    )


def count_steps(run: Run[Any], data: Rows, train: Dataset) -> tuple[int, list[tuple[str, str]]]:
    """Returns the updates of a run, and the lines about data and batches for its plan."""
    settings, processes = run.settings, run.process.num_processes
    rows_per_batch = settings.mini_batch_size * processes
    accumulation = settings.accumulation(processes)
    steps = total_steps(settings, len(train), rows_per_batch=rows_per_batch, accumulation=accumulation)
    passes = steps * rows_per_batch * accumulation / len(train)
    data.set_epochs(passes)
    return steps, [
        ("data", data.summary()),
        ("steps", f"{steps:,} ({passes:.2g} passes over the training pairs)"),
        (
            "batch",
            f"{rows_per_batch * accumulation} pairs ({settings.mini_batch_size} x {accumulation} x {processes})",
        ),
        describe_evaluation(settings, settings.eval_batches, evaluates=data.validation is not None),
        describe_optimizer(settings, steps),
        *run.hardware.rows(),
    ]


class WholeBatches:
    """Mixin for a trainer of pairs: its loss is a mean over the pairs of an update, however these are split.

    TRL averages the means of forward passes, which have fewer pairs where the data ends.
    """

    sizes: Tensor  # what `measure` says of a forward pass, a mean over those of the update on all processes

    def measure(self, batch: dict[str, Any]) -> list[int]:
        """Returns the number of pairs of a forward pass, perhaps times a constant, and whatever else is counted."""
        return [len(next(value for name, value in batch.items() if name.endswith("input_ids")))]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches:
            sizes = torch.tensor([self.measure(batch) for batch in batches], dtype=torch.float64).mean(0).float()
            self.sizes = self.accelerator.reduce(sizes.to(self.args.device), reduction="mean")  # type: ignore[attr-defined]
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not model.training:
            return loss  # evaluation counts each loss once for each of its rows
        return loss * self.measure(inputs)[0] / self.sizes[0]


class PreferenceMetrics(TrainerCallback):
    """Gives the trainers' metrics names that people ask for, and warns of the known way in which DPO fails.

    `win_rate` is the share of pairs whose better answer has the higher reward, `margin` the mean difference of the
    two, `chosen_logp` and `rejected_logp` the log-probabilities of whole answers in nats.  Where there is a reference,
    `kl` is the mean log ratio of policy and reference over the tokens of both answers, in nats a token: 0 before the
    first step, and an estimate of their divergence while the data resembles what the policy would say (it may be
    negative).

    Args:
        progress: where to warn.
        beta: of the loss; None where there is no reference.
        patience: logged lines in a row with both probabilities lower than at first, before the warning.
    """

    def __init__(self, progress: ProgressLine, *, beta: float | None, patience: int = 5):
        self.progress = progress
        self.beta = beta
        self.patience = patience
        self.first: tuple[float, float] | None = None
        self.fallen = 0
        self.warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for theirs, ours in NAMES.items():
            if prefix + theirs in logs:
                logs[prefix + ours] = logs.pop(prefix + theirs)
        if logs.get(f"{prefix}margin") == 0 and logs.get(f"{prefix}win_rate") == 0:
            logs[f"{prefix}win_rate"] = 0.5  # policy and reference are one yet: every pair is a tie
        if self.beta is not None and f"{prefix}rewards/chosen" in logs:
            sides = logs[f"{prefix}rewards/chosen"] + logs[f"{prefix}rewards/rejected"]
            logs[f"{prefix}kl"] = sides / (2 * self.beta * logs[f"{prefix}completion_length"])
        if "eval_nll_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_nll_loss"])
        state.log_history[-1] = {**logs, "step": state.global_step}  # the trainer kept a copy under its own names
        if not prefix and "chosen_logp" in logs:
            self._watch((logs["chosen_logp"], logs["rejected_logp"]))

    def _watch(self, now: tuple[float, float]) -> None:
        """Warns once when both sides stay at least 5 % below where they began."""
        if self.first is None:
            self.first = now
        falls = all(value < start - 0.05 * abs(start) for value, start in zip(now, self.first, strict=True))
        self.fallen = self.fallen + 1 if falls else 0
        if self.fallen >= self.patience and not self.warned:
            self.warned = True
            self.progress.say(f"[yellow]warning[/yellow] {ADVICE}")
