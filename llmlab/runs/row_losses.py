"""The losses of single validation rows: by source, and the hardest ones, from what evaluation computes anyway. A row
is known by its tokens, so packing, shuffling and several processes do not matter: of packed conversations each is a
row again. A packed row of pretraining has the text of several documents, and stays one row."""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from llmlab.runs.record import HARDEST_ROWS
from llmlab.settings.files import write_atomically

MOST = 20  # rows that are recorded
BEGINNING, CHARACTERS = 96, 240  # of a row's text that is recorded: tokens, characters


class RowLosses:
    """Sums of the losses of validation rows, which `origins` yields as (ids, name of its source, number there)."""

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
