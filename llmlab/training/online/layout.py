"""How prompts and completions are laid out for forward passes: rows of similar length together, without padding
between, and equal prompts read once. Ids and masks are (batch, time): prompts padded on the left, completions of `new`
columns on the right."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import split_tensor_dict

ROTARY = ("llama", "mistral", "qwen2", "qwen3", "llmlab")  # whose tokens depend on position ids and mask alone


class Layout(NamedTuple):
    """The model's inputs with labels, and the row, (batch, 1), and columns, (batch, new), that predict each token."""

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor


def lay_out(ids: Tensor, mask: Tensor, new: int, config: Any, *, compact: bool, experts: bool) -> Layout:
    """Returns a layout of rows for a model of this configuration: equal prompts once or padding cut off, if `compact`.
    Padding is moved to the end, where no token attends to it, so that attention needs no mask; with the loss of
    `experts` there is one, of the real tokens."""
    if compact and not experts and (shared := share_prompts(ids, mask, new, config)):
        return shared
    length = int(mask.sum(1).max()) if compact else ids.shape[1]
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : max(length, 2)]
    short, real = ids.gather(1, order), mask.gather(1, order)
    scored = (real == 1) & (order >= ids.shape[1] - new)
    inputs = {"input_ids": short, "labels": short.masked_fill(~scored, -100)}
    if experts:
        inputs |= {"attention_mask": real.long(), "output_router_logits": True}
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return Layout(inputs, rows, (mask.cumsum(1)[:, -new:] - 2).clamp(min=0))  # one column before its own


def order_rows(prompts: Tensor, prompt_mask: Tensor, new: Tensor) -> Tensor:
    """Returns an order in which rows are beside those of the same prompt, else of similar length."""
    lengths = prompt_mask.sum(1)
    kinds, kind = torch.cat([lengths[:, None], prompts * prompt_mask], 1).unique(dim=0, return_inverse=True)
    if len(kinds) == len(prompts):
        return (lengths + new).argsort(stable=True)
    order = new.argsort(stable=True)
    return order[kind[order].argsort(stable=True)]


def sort_updates(parts: list[dict[str, Any]], passes: int) -> list[dict[str, Any]]:
    """Returns the micro-batches of a rollout with the rows of each update, so many of them, in that order."""
    if len(parts) > passes:
        return [part for k in range(0, len(parts), passes) for part in sort_updates(parts[k : k + passes], passes)]
    tensors = [name for name, value in parts[0].items() if isinstance(value, Tensor) and value.ndim]
    whole = {name: torch.cat([part[name] for part in parts]) for name in tensors}
    order = order_rows(whole["prompt_ids"], whole["prompt_mask"], whole["completion_mask"].sum(1))
    return split_tensor_dict(parts[0] | {name: value[order] for name, value in whole.items()}, len(parts))


def share_prompts(ids: Tensor, mask: Tensor, new: int, config: Any) -> Layout | None:
    """Lays each prompt out once, then its completions, each of which attends to itself and the prompt alone and begins
    with a copy of the prompt's last token; None where the model cannot do so, or it would cost more."""
    windows = getattr(config, "sliding_window", None), getattr(config, "positional_encoding", None) == "alibi"
    if config.model_type not in ROTARY or config._attn_implementation != "sdpa" or any(windows):
        return None
    prompts = torch.cat([mask[:, :-new], ids[:, :-new] * mask[:, :-new]], 1)
    if len(prompts.unique(dim=0)) == len(ids):
        return None
    sequences = [
        [i for i, real in zip(*row, strict=True) if real] for row in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (sequence, length) in enumerate(zip(sequences, mask[:, :-new].sum(1).tolist(), strict=True)):
        groups.setdefault(tuple(sequence[:length]), []).append(row)
    rows, starts, trees = [0] * len(ids), [0] * len(ids), []
    for prompt, members in groups.items():
        count = len(prompt) - 1
        tokens, positions, owners = [*prompt[:-1]], [*range(count)], [0] * count
        for owner, row in enumerate(members, 1):
            rows[row], starts[row] = len(trees), len(tokens)
            tokens += sequences[row][count:]
            positions += range(count, len(sequences[row]))
            owners += [-owner, *[owner] * (len(sequences[row]) - len(prompt))]  # negative: not scored
        trees.append(ids.new_tensor([tokens, positions, owners]).t())
    table = pad_sequence(trees, batch_first=True)  # (prompts, time, 3)
    length, apart, width = table.shape[1], int(mask.sum(1).max()), 6 * config.hidden_size
    # a token's products, and its attention, which a mask makes slower and reads whole
    if len(trees) * length * (width + 4 * length) > len(ids) * apart * (width + 2 * apart):
        return None
    tokens, positions, owners = table.unbind(2)
    owner = owners.abs()
    attended = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])  # (prompts, query, key)
    labels = tokens.masked_fill(owners <= 0, -100)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": attended.tril()[:, None]}
    columns = ids.new_tensor(starts)[:, None] + torch.arange(new, device=ids.device)
    return Layout({**inputs, "labels": labels}, ids.new_tensor(rows)[:, None], columns.clamp(max=length - 2))
