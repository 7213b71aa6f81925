"""Perplexity of a model on texts: the exponential of its mean loss in nats per token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmlab.evaluation.statistics import Array
from llmlab.inference import context_length

LONGEST = 1024  # tokens of a text that are scored


@torch.no_grad()
def text_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[int]]) -> list[Array]:
    """Returns the sum of token losses in nats, and the number of tokens, of each text's beginning, both (texts,)."""
    losses, longest = [], min(context_length(model) or LONGEST, LONGEST)
    for ids in texts:
        first = [] if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.eos_token_id]  # of the document before it
        row = torch.tensor([[*first, *ids][:longest]], device=model.device)  # (1, time)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()  # (time - 1, vocabulary)
        losses.append((cross_entropy(logits, row[0, 1:], reduction="sum").item(), len(logits)))
    return list(np.array(losses, float).reshape(-1, 2).T)
