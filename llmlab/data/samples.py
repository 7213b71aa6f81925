"""`samples.jsonl`: what a model sampled for each prompt, with the tokens and every reward; one JSON a line.

RS-SFT, AWR and `llmlab data pairs` read it. Drawing and scoring samples is `training/offline/sampling.py`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from llmlab.data.chat.messages import Message
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import write_atomically

SAMPLES, DESCRIPTION = "samples.jsonl", "samples.json"


class Prompt(NamedTuple):
    """A prompt, and the other columns of its row, which rewards and environments get."""

    messages: list[Message]
    columns: dict[str, Any]
    tools: list[Any] | None = None


class Sample(BaseModel):
    """One completion or episode of a prompt.

    `completion_ids` are all tokens after the prompt, (time,); of them the policy sampled those where `mask` is 1, or
    all without a mask. `ended` is whether it ended before the limit of tokens.
    """

    prompt_id: int
    sample: int
    validation: bool = False
    prompt: list[Message]
    tools: list[Any] | None = None
    columns: dict[str, Any] = {}
    completion: list[Message] = []
    prompt_ids: list[int]
    completion_ids: list[int] = []
    mask: list[int] | None = None
    ended: bool = False
    rewards: dict[str, float | None] = {}
    reward: float | None = None
    success: bool | None = None
    calls: int = 0

    @property
    def text(self) -> str:
        """What the model answered last."""
        return str(self.completion[-1].get("content") or "")

    def labels(self) -> list[int]:
        """Returns the labels of prompt and completion, (time,): the sampled tokens, else -100."""
        mask = self.mask or [1] * len(self.completion_ids)
        sampled = [token if on else -100 for token, on in zip(self.completion_ids, mask, strict=True)]
        return [-100] * len(self.prompt_ids) + sampled


def read_samples(path: Path) -> list[Sample]:
    """Returns the samples of a file, in its order."""
    samples = []
    with reading(path, "samples"), path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                sample = Sample.model_validate_json(line)
            except ValidationError as error:
                (first, *_), where = error.errors(), f"{path}:{number}: this is no sample"
                raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
            if (
                sample.mask is not None
                and len(sample.mask) != len(sample.completion_ids)
                or not (sample.completion and sample.prompt_ids)
            ):
                raise UserError(f"{path}:{number}: this is no sample: expected a completion, and its mask as long")
            samples.append(sample)
    if not samples:
        raise UserError(f"{path}: there is no sample in it")
    return samples


def group_samples(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the samples of each prompt."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_id, []).append(sample)
    return list(groups.values())


def recover_samples(path: Path, count: int) -> list[Sample]:
    """Returns the samples of the prompts that have so many, and takes those that a kill cut off out of the file."""
    if not path.is_file() or not (text := path.read_bytes()):
        return []
    with reading(path, "samples"):
        lines = [Sample.model_validate_json(line) for line in text.rpartition(b"\n")[0].splitlines()]
    counts = Counter(sample.prompt_id for sample in lines)
    samples = [sample for sample in lines if counts[sample.prompt_id] == count]
    write_atomically(path, _to_lines(samples))
    return samples


def append_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Appends the samples of a prompt, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_to_lines(samples))
        file.flush()
        os.fsync(file.fileno())


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes all samples, ordered by prompt."""
    write_atomically(path, _to_lines(sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample))))


def _to_lines(samples: Sequence[Sample]) -> str:
    return "".join(sample.model_dump_json() + "\n" for sample in samples)
