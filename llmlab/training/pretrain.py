"""Pretraining: tokenizer, model, data, trainer, train, save.

The loop is Transformers' Trainer; here it gets our rows in their own order, our optimizers, and a loss that never
holds all logits.  Instruction data and adapters are later stages' business.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers import default_data_collator as stack_rows

from llmlab import hardware as machine
from llmlab.data import Corpus, build_corpus, load_tokenizer
from llmlab.model import ModelSize, build_config, measure, new_model, load_model
from llmlab.optim import build_optimizer, check_supported, estimate_hessian
from llmlab.settings.errors import UserError
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.sources import Resolved
from llmlab.training import checkpoints
from llmlab.training._trl import SwitchableOptimizer
from llmlab.training.arguments import build_arguments
from llmlab.training.callbacks import MetricsLog, Rhythm, ScheduleAfterResume, StreamPosition
from llmlab.training.compile import decide_compile
from llmlab.training.progress import ProgressLine, human, print_plan
from llmlab.training.record import RunRecord, RunResult
from llmlab.training.resume import find_checkpoint


class PretrainTrainer(SwitchableOptimizer, Trainer):
    """Transformers' Trainer with llmlab's optimizers and a loss without full logits."""

    def __init__(self, settings: PretrainSettings, *, load_optimizer: bool = True, **kwargs: Any):
        self.settings = settings
        self.load_optimizer = load_optimizer
        self._hessian_step = -1
        super().__init__(**kwargs)
        # the estimate's sampled labels have a generator of their own, so that dropout draws what it would without
        self._hessian_generator = torch.Generator(device=self.args.device).manual_seed(settings.seed)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings = self.settings
            self.optimizer = build_optimizer(
                model or self.model, settings, learning_rate=settings.lr, weight_decay=settings.weight_decay
            )
        return self.optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        step = self.state.global_step
        if self.settings.optimizer == "sophia" and step % self.settings.sophia_update_every == 0 != self._hessian_step:
            self._estimate_hessian_once(model, inputs, step)
        return super().training_step(model, inputs, num_items_in_batch)
