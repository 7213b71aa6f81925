"""The reward model that a critic starts from, checked to fit the policy."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llmlab.adapters import lora_config
from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import fit_vocabulary, load_classifier, load_config, read_adapter
from llmlab.settings.errors import UserError


def load_scorer(run: Any) -> PreTrainedModel | PeftModel | None:
    """Returns the reward model that initializes the critic of an `OnlineRun`, with adapters where the policy has
    them."""
    settings, policy = run.settings, run.policy
    source = settings.value_checkpoint
    if source is None:
        return None
    where = f"value_checkpoint = {source}:"
    adapter = read_adapter(source)
    kinds = load_config(source).architectures or [] if adapter is None else [str(adapter.config.task_type)]
    if not any(kind.endswith(("ForSequenceClassification", "SEQ_CLS")) for kind in kinds):
        problem = f"it has no score head (found {', '.join(kinds) or 'none'}), and a new one would be random"
        raise UserError(f"{where} {problem}; expected a run folder of llmlab reward")
    scorer = load_classifier(source, dtype=policy.model.dtype if run.with_adapters else torch.float32)
    if not isinstance(getattr(scorer, "score", None), nn.Linear):
        kind = f"model_type = {scorer.config.model_type}"
        raise UserError(f"{where} {kind}: it does not score at each token; expected a run folder of llmlab reward")
    if load_tokenizer(source).get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"{where} it has another vocabulary than the policy; leave it out")
    fit_vocabulary(scorer, policy.tokenizer)
    return get_peft_model(scorer, lora_config(scorer, settings, task="SEQ_CLS")) if run.with_adapters else scorer
