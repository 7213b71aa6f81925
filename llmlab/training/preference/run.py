"""What the stages that learn from preference pairs share: reading pairs, training, and the metrics of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments

from llmlab.data.chat.makers import PreferenceEncoder
from llmlab.data.chat.rows import Rows
from llmlab.runs.callbacks import StageMetrics, perplexity
from llmlab.runs.policy import Policy
from llmlab.runs.progress import ProgressLine
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run
from llmlab.runs.start import S

ADVICE = (
    "the log-probabilities of the chosen answers fall together with those of the rejected ones: the policy drifts "
    "away from both; lower learning_rate, raise beta, or fine-tune on the chosen answers first (llmlab sft)"
)


class PreferenceRun(Run[S]):
    """A run of DPO, ORPO or a reward model: shared reading of pairs, trainer construction and training."""

    def read_pairs(self, policy: Policy) -> Rows:
        """Returns the pairs of the stage's sources as token ids."""
        settings = self.settings
        length, prompt_length = policy.cap_length(settings.max_length), settings.max_prompt_length
        if prompt_length is not None and prompt_length >= length:
            prompt_length = length // 2  # leave room for a completion in a short context
        encoder = PreferenceEncoder(policy.tokenizer, length, prompt_length, policy.stops)
        return self.build_rows(encoder, rows_per_step=self.batch.rows)

    def train_pairs(
        self,
        trainer: type[Trainer],
        config: type[TrainingArguments],
        policy: Policy,
        data: Rows,
        *,
        plan: Sequence[tuple[str, str]] = (),
        beta: float | None = None,
        arguments: dict[str, Any] | None = None,
        **options: Any,
    ) -> RunResult:
        """Trains a policy on pairs; `plan` has the stage's own rows, `beta` goes to `PreferenceMetrics`, `arguments`
        and `options` to `make_trainer`."""
        settings, processes = self.settings, self.process.num_processes
        size, accumulation = settings.mini_batch_size, settings.accumulation(processes)
        arguments = {
            "per_device_eval_batch_size": size,
            "prediction_loss_only": True,
            "gradient_accumulation_steps": accumulation,
            "eval_on_start": data.validation is not None and self.checkpoint is None,
            **({} if settings.epochs is None else {"max_steps": -1}),  # then epochs decide
            **(arguments or {}),
        }
        made = self.make_trainer(trainer, config, policy.model, policy.tokenizer, data, arguments=arguments, **options)
        batch = f"{self.batch.rows} pairs ({size} x {accumulation} x {processes})"
        callbacks = [PreferenceMetrics(self.progress, beta)]
        return self.train_rows(made, policy, data, batch=batch, plan=plan, callbacks=callbacks)


class StepMeanLoss:
    """Mixin for a trainer of pairs: its loss is the mean over the pairs of an optimizer step. TRL averages
    per-forward-pass means, which weights the pairs of a short last batch more."""

    sizes: Tensor  # what `count_pairs` returns for a forward pass, a mean over those of the update on all processes

    def count_pairs(self, batch: dict[str, Any]) -> list[int]:
        """Returns the weights of a forward pass's losses: its pair count (up to a constant), and further counts."""
        return [len(next(value for name, value in batch.items() if name.endswith("input_ids")))]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches:
            sizes = torch.tensor([self.count_pairs(batch) for batch in batches], dtype=torch.float64).mean(0).float()
            self.sizes = self.accelerator.reduce(sizes.to(self.args.device), reduction="mean")  # type: ignore[attr-defined]
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not model.training:
            return loss  # evaluation already weights each loss by its rows
        return loss * self.count_pairs(inputs)[0] / self.sizes[0]


@dataclass(eq=False)
class PreferenceMetrics(StageMetrics):
    """Gives TRL's metrics the names used here, and warns once when both log-probabilities fall for `patience` lines.

    `win_rate` is the share of pairs whose chosen answer has the higher reward, `margin` the mean difference. `kl` is
    the mean log-ratio of policy and reference per token of the data's answers (not the policy's own: it may be
    negative).
    """

    progress: ProgressLine
    beta: float | None
    patience: int = 5
    first: tuple[float, float] | None = None
    falling: int = 0
    warned: bool = False

    names = {
        "rewards/accuracies": "win_rate",
        "rewards/margins": "margin",
        "accuracy": "win_rate",
        "logps/chosen": "chosen_logp",
        "logps/rejected": "rejected_logp",
    }

    def add_metrics(self, logs: dict[str, Any], prefix: str, state: TrainerState) -> None:
        if logs.get(f"{prefix}margin") == 0 and logs.get(f"{prefix}win_rate") == 0:
            logs[f"{prefix}win_rate"] = 0.5  # policy and reference are still equal: every pair is a tie
        if self.beta is not None and f"{prefix}rewards/chosen" in logs:
            both = logs[f"{prefix}rewards/chosen"] + logs[f"{prefix}rewards/rejected"]
            logs[f"{prefix}kl"] = both / (2 * self.beta * logs[f"{prefix}completion_length"])
        if "eval_nll_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_nll_loss"])
        if prefix or "chosen_logp" not in logs:
            return
        now = logs["chosen_logp"], logs["rejected_logp"]
        self.first = self.first or now
        # at least 5 % below where they began
        falls = all(value < start - 0.05 * abs(start) for value, start in zip(now, self.first, strict=True))
        self.falling = self.falling + 1 if falls else 0
        if self.falling >= self.patience and not self.warned:
            self.warned = True
            self.progress.say(f"[yellow]warning[/yellow] {ADVICE}")
