"""Odds-ratio preference optimization: policy, pairs, trainer. The loop and the loss are TRL's ORPOTrainer, which is
experimental in TRL; the pairs reach it as token ids."""

import os
from typing import Any

import torch
from peft import PeftModel
from torch import nn

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read at import
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from llmlab.runs._trl import TokenizedORPOPairs, chunked_head
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.runs.trainer import StageTrainer
from llmlab.settings.preference import ORPOSettings
from llmlab.training.preference.run import PreferenceRun, StepMeanLoss


class LLMLabORPOTrainer(StageTrainer, TokenizedORPOPairs, StepMeanLoss, ORPOTrainer):
    """TRL's ORPOTrainer with llmlab's optimizers; its loss depends neither on `mini_batch_size` nor on processes. The
    NLL term is a mean over the tokens of an optimizer step, the odds-ratio term a mean over its pairs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(base, outputs=("log_probs", "mean_logits"))
        if self.eval_dataset is not None:
            masks = self.eval_dataset["chosen_attention_mask"]
            self.eval_sizes = torch.tensor([len(masks), sum(len(mask) - 1 for mask in masks)], device=self.args.device)

    def count_pairs(self, batch: dict[str, Any]) -> list[int]:
        """Returns the number of pairs and of predicted tokens in the chosen rows."""
        mask = batch["chosen_attention_mask"]  # (pairs, time)
        return [len(mask), int(mask[:, 1:].sum())]

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the answers' mean log-probabilities, (pairs,), the logits' means, and the NLL term, from the chunked
        head; TRL keeps all logits."""
        joined = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids, mask, answers = (joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        pairs = len(ids) // 2
        labels = torch.cat((ids[:pairs].where(mask[:pairs] == 1, -100), answers[pairs:]))  # no NLL of rejected prompts
        with chunked_head(equal=False, enabled=self.on_cpu):
            output = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        log_probs, is_answer = output.log_probs, answers[:, 1:] != -100  # (2 pairs, time - 1), 0 without a label
        means = (log_probs * is_answer).sum(-1) / is_answer.sum(-1)
        logits = (output.mean_logits[half][output.label_mask[half]] for half in (slice(pairs), slice(pairs, None)))
        mean_pairs, mean_tokens = self.sizes if model.training else self.eval_sizes
        nll = -log_probs[:pairs].sum() / pairs * (mean_pairs / mean_tokens)
        return *means.split(pairs), *logits, nll, *([output.aux_loss] if self.aux_loss_enabled else [])

    def estimated_from(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the chosen rows, which the NLL term is computed on."""
        return self._prepare_inputs({name: batch[f"chosen_{name}"] for name in ("input_ids", "attention_mask")})


@training_stage(PreferenceRun)
def orpo(run: PreferenceRun[ORPOSettings]) -> RunResult:
    """Trains a policy on preference pairs with ORPO: NLL on the chosen completions plus an odds-ratio loss, and writes
    the run folder.

    Args:
        settings: `ORPOSettings`: which model, what pairs, for how long.

    Returns:
        The run folder and its last metrics: `loss`, `nll_loss`, `log_odds_ratio`, `win_rate`, `margin`, ...

    Source: seed, RL guide, section 2, "ORPO Configuration"; arXiv:2403.07691.
    """
    policy = run.load_policy()
    data = run.read_pairs(policy)
    tokens = sum(report.counts["tokens"] for report in data.reports) / sum(r.trained_rows for r in data.reports)
    arguments = {"remove_unused_columns": False}  # its collator needs columns that are not model inputs
    progress = {"tokens_per_step": round(tokens * run.batch.rows)}  # this trainer counts no tokens
    return run.train_pairs(LLMLabORPOTrainer, ORPOConfig, policy, data, arguments=arguments, progress=progress)
