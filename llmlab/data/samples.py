"""`samples.jsonl`: what a model sampled for each prompt, with the tokens and every reward; one JSON a line. RS-SFT,
AWR and `llmlab data pairs` read it. Drawing and scoring samples is `training/offline/sampling.py`."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from llmlab.data.chat.messages import Message
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import write_atomically


class Prompt(NamedTuple):
    """A prompt, and the other columns of its row, which rewards and environments get."""

    messages: list[Message]
    columns: dict[str, Any]
    tools: list[Any] | None = None


class Sample(BaseModel):
    """One completion or episode of a prompt; of its tokens the policy sampled those where `mask` is 1, None is all."""

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
    ended: bool = False  # before a limit of tokens
    rewards: dict[str, float | None] = {}  # by component
    reward: float | None = None
    environment: dict[str, Any] | None = None  # its reward, the range and the parts of it
    success: bool | None = None
    calls: int = 0

    @property
    def labels(self) -> list[int]:
        """The labels of prompt and completion, (time,): the sampled tokens, else -100."""
        mask = self.mask or [1] * len(self.completion_ids)
        sampled = [token if on else -100 for token, on in zip(self.completion_ids, mask, strict=True)]
        return [-100] * len(self.prompt_ids) + sampled


def read_samples(path: Path, *, count: int | None = None) -> list[Sample]:
    """Returns the samples of a file; with a `count`, those of the prompts that have so many after a kill."""
    with reading(path, "samples"):
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    samples = []
    for number, line in enumerate(lines if count or not rest else [*lines, rest], start=1):
        with reading(f"{path}:{number}", "a sample"):
            sample = Sample.model_validate_json(line)
        if not sample.completion or len(sample.mask or sample.completion_ids) != len(sample.completion_ids):
            raise UserError(f"{path}:{number}: this is no sample: expected a completion, and a mask of its tokens")
        samples.append(sample)
    if count is None and not samples:
        raise UserError(f"{path}: there is no sample in it")
    counts = Counter(sample.prompt_id for sample in samples)
    return [sample for sample in samples if count in (None, counts[sample.prompt_id])]


def append_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Appends samples, which are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(sample.model_dump_json() + "\n" for sample in samples))
        file.flush()
        os.fsync(file.fileno())


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes all samples, ordered by prompt."""
    ordered = sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample))
    write_atomically(path, "".join(sample.model_dump_json() + "\n" for sample in ordered))


def group_samples(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the samples of each prompt."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_id, []).append(sample)
    return list(groups.values())
