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
def text_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[Array, Array]:
    """Returns the sum of token losses in nats, and the number of tokens, of each text's beginning, both (texts,)."""
    losses, longest = [], min(context_length(model) or LONGEST, LONGEST)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.eos_token_id, *ids]  # a document starts where the one before it ended
        row = torch.tensor([ids[:longest]], device=model.device)  # (1, time)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()  # (time - 1, vocabulary)
        losses.append((cross_entropy(logits, row[0, 1:], reduction="sum").item(), len(logits)))
    sums, tokens = np.array(losses, float).reshape(-1, 2).T
    return sums, tokens
