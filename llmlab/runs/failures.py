"""How runs fail: full disks and memories become sentences, and what was half written goes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.markup import escape
from safetensors import SafetensorError

from llmlab.hardware import free_disk, system_memory
from llmlab.runs import checkpoints
from llmlab.runs.progress import ProgressLine, human
from llmlab.runs.record import METRICS, RECORD, RunRecord, read_metrics
from llmlab.runs.signals import Interrupted
from llmlab.settings.base import Settings, fields_of
from llmlab.settings.errors import Diverged, UserError, reason_of

# torch.save hides the system's error behind these words
TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")


def check_memory(parameters: int, *, batch_tokens: int = 0, width: int = 0) -> None:
    """Refuses a model that cannot even be laid out, or a batch whose first hidden states could not, in this machine.

    Args:
        parameters: of the model, in fp32.
        batch_tokens: of one forward pass.
        width: of its hidden states, in 16 bits.

    Raises:
        UserError: it needs more than there is.
    """
    there = system_memory()
    for what, needed in (("this model", 4 * parameters), ("one batch", 2 * batch_tokens * width)):
        if needed > there > 0:
            raise UserError(
                f"{what} needs at least {human(needed, 'B')} of memory, and this machine has {human(there, 'B')}"
            )


def check_disk(folder: Path, *, needed: int) -> None:
    """Refuses to start a run that could not write what it will have to keep, in bytes.

    Raises:
        UserError: the disk has less than that free.
    """
    free = free_disk(folder)
    if needed > free:
        raise UserError(
            f"output_dir = {folder}: this run writes about {human(needed, 'B')}, "
            f"and the disk has {human(free, 'B')} free"
        )


def _take_back(folder: Path, record: RunRecord | None) -> None:
    """Removes the folder of a new run that a mistake ended before its first step, so that it can be started again."""
    begun = any(folder.glob("checkpoint-*")) or any("loss" in line for line in read_metrics(folder))
    if record is not None and "resumed" not in record.values and not begun:
        for name in (RECORD, METRICS):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds what is not ours
            folder.rmdir()


@contextmanager
def failures_recorded(
    stage: str, folder: Path, record: RunRecord | None, progress: ProgressLine, settings: Settings
) -> Iterator[None]:
    """Records how a run that did not finish ended, and removes checkpoints that it half wrote.

    Raises:
        UserError: memory or disk ran out, or (Diverged) numbers are no longer finite.
        KeyboardInterrupt: the run was interrupted, and is ready to be resumed.
        Interrupted: the same by SIGTERM or SIGHUP.
    """

    def ended(status: str, **results: str) -> None:
        progress.stop()
        if record is not None:
            checkpoints.remove_partial(folder)  # before the record: a full disk needs the room
            record.finish(status, **results)

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        ended("interrupted")
        progress.say(f"stopped; continue with: llmlab {stage} --resume {escape(str(folder))}")
        raise
    except SystemExit:  # rich's, when what the output is piped into is gone
        ended("interrupted", reason="its output was closed")
        raise
    except Diverged as error:
        ended("diverged", reason=str(error))
        kept = checkpoints.checkpoints(folder)
        if kept:
            again = f"llmlab {stage} --resume {folder} --no-load-optimizer learning_rate=..."
            progress.say(f"{kept[-1].name} is from before; to go on from it with a lower rate: {again}")
        raise
    except UserError as error:
        ended("failed", reason=str(error))
        _take_back(folder, record)
        raise
    except Exception as error:
        ended("failed")
        reason = reason_of(error)
        if _is_out_of_memory(error):
            raise UserError(f"out of memory: {how_to_save_memory(settings)}") from error
        if _is_cut_off(error, folder):
            raise UserError(f"output_dir = {folder}: writing stopped: the disk is full or gone ({reason})") from error
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"{getattr(error, 'filename', None) or stage}: {reason}") from error
        raise


def how_to_save_memory(settings: Settings) -> str:
    """Returns what of a stage's own settings makes a step smaller."""
    values = {setting.name: setting.of(settings) for setting in fields_of(type(settings))}
    rows = "mini_batch_size" if "mini_batch_size" in values else "batch_size"
    accumulation = values["gradient_accumulation_steps"]  # None follows from the other sizes
    doubled = "" if accumulation is None else f" and double gradient_accumulation_steps = {accumulation}"
    lengths = [
        name for name in ("max_seq_len", "max_length", "max_prompt_length", "max_new_tokens") if values.get(name)
    ]
    lengths = lengths[-2:] if "max_new_tokens" in lengths else lengths[:1]  # a prompt alone or with its answer
    ways = [f"halve {rows} = {values[rows]}{doubled}"] if values[rows] > 1 else []
    ways += [f"shorten {' or '.join(f'{name} = {values[name]}' for name in lengths)}"]
    ways += [f"set {name}=true" for name in ("gradient_checkpointing", "use_lora") if values.get(name) is False]
    return ", or ".join(ways)


def _is_out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "MPS backend out of memory")  # torch's, for CPUs and Apple's GPUs
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    )


def _is_cut_off(error: Exception, folder: Path) -> bool:
    """Returns whether writing into the run folder failed, in contrast to reading something."""
    if isinstance(error, OSError):
        name = error.filename
        inside = isinstance(name, (str, os.PathLike)) and Path(name).resolve().is_relative_to(folder.resolve())
        return inside or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    if isinstance(error, SafetensorError):
        return str(error).startswith("Error while serializing")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_CANNOT_WRITE)
