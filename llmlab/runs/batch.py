"""The effective batch: the rows of one optimizer step over all processes, which a resumed run keeps. How they are
split into processes, forward passes and rows of one changes no result, so a resumed run may split them otherwise."""

import math
from dataclasses import dataclass
from typing import Any

from llmlab.settings.errors import UserError
from llmlab.settings.training import TrainingSettings


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step and, at most, of one evaluation, over all processes; `settings` split them."""

    rows: int
    validation_rows: int
    settings: dict[str, int | None]


def batch_of(settings: TrainingSettings, processes: int) -> Batch:
    """Returns the batch that settings describe for so many processes."""
    split = {name: getattr(settings, name) for name in split_settings(settings)}
    rows, _, evaluations = split.values()
    return Batch(settings.effective_batch(processes), rows * evaluations * processes, split)


def split_settings(settings: Any) -> tuple[str, str, str]:
    """Returns the settings that count rows of a forward pass, passes of a step, and batches of an evaluation."""
    evaluation = "eval_batches" if "eval_batches" in type(settings).model_fields else "eval_steps"
    return settings.rows_per_pass, "gradient_accumulation_steps", evaluation


def split_again(
    settings: TrainingSettings, before: TrainingSettings, record: dict[str, Any], processes: int
) -> tuple[Batch, dict[str, int]]:
    """Returns the batch of the recorded run, and the changes to `settings` that keep it on so many processes: what the
    user changed stays, the rest follows, or UserError says why it cannot."""
    were = record.get("hardware", {}).get("processes", processes)
    batch = Batch(**record["batch"]) if "batch" in record else batch_of(before, were)
    if processes != were and getattr(settings, "streaming", False):
        raise UserError(
            "streaming = true: each process of the run to resume reads its own part of the stream, so it goes on with "
            f"as many, {were}, and not with {processes}"
        )
    share, rest = divmod(batch.rows, processes)
    if rest:
        raise UserError(
            f"{processes} processes: an optimizer step of the run to resume has {batch.rows} rows, which they cannot "
            f"share equally; the nearest number that can is {_nearest_divisor(batch.rows, processes)}"
        )
    names = split_settings(settings)
    now = {name: getattr(settings, name) for name in names}
    rows, passes, evaluations = now.values()
    changed = {name: new for name, new in now.items() if new not in (getattr(before, name), batch.settings[name])}
    if names[0] not in changed:
        rows = max(part for part in range(1, rows + 1) if share % part == 0)
    elif share % rows:
        raise UserError(
            f"{names[0]} = {rows}: an optimizer step of the run to resume has {share} rows on each process, which is "
            f"no multiple of it; the nearest that divides them is {_nearest_divisor(share, rows)}"
        )
    if changed.get(names[1], share // rows) != share // rows:
        raise UserError(
            f"{names[1]} = {passes}: with {names[0]} = {rows} it is {share // rows}, so that an optimizer step of the "
            f"run to resume keeps its {batch.rows} rows; leave it out"
        )
    values = {names[0]: rows, **({} if passes is None else {names[1]: share // rows})}
    most = batch.validation_rows
    if names[2] in changed:
        most = evaluations * rows * processes
    else:
        values[names[2]] = math.ceil(most / (rows * processes))
    batch = Batch(batch.rows, most, batch.settings | changed)
    return batch, {name: value for name, value in values.items() if value != getattr(settings, name)}


def smaller_batch(settings: TrainingSettings) -> dict[str, int] | None:
    """Returns the settings of half the rows of a forward pass, or the next divisor below; None where it is one."""
    name, *counted = split_settings(settings)
    rows = getattr(settings, name)
    if rows == 1:
        return None
    fewer = next(part for part in range(rows // 2, 0, -1) if rows % part == 0)
    counts = {each: getattr(settings, each) for each in counted}  # None follows from the others
    return {name: fewer, **{each: rows // fewer * count for each, count in counts.items() if count is not None}}


def _nearest_divisor(number: int, to: int) -> int:
    return min((part for part in range(1, number + 1) if number % part == 0), key=lambda part: abs(part - to))
