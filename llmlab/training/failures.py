"""How runs fail: full disks and memories become sentences, and what was half written goes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from llmlab.hardware import free_disk, system_memory
from llmlab.settings.errors import UserError
from llmlab.training import checkpoints
from llmlab.training.progress import ProgressLine, human
from llmlab.training.record import METRICS, RECORD, RunRecord, read_metrics

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
def failures_recorded(stage: str, folder: Path, record: RunRecord | None, progress: ProgressLine) -> Iterator[None]:
    """Records how a run that did not finish ended, and removes checkpoints that it half wrote.

    Raises:
        UserError: memory or disk ran out.
        KeyboardInterrupt: the run was interrupted, and is ready to be resumed.
    """

    def ended(status: str, **results: str) -> None:
        progress.stop()
        checkpoints.remove_partial(folder)  # before the record: a full disk needs the room
        if record is not None:
            record.finish(status, **results)

    try:
        yield
    except KeyboardInterrupt:
        ended("interrupted")
        progress.say(f"stopped; continue with: llmlab {stage} --resume {folder}")
        raise
    except SystemExit:  # rich's, when what the output is piped into is gone
        ended("interrupted", reason="its output was closed")
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        ended("failed")
        raise UserError(
            "out of memory: halve batch_size and double gradient_accumulation_steps, "
            "or set gradient_checkpointing=true, or shorten max_seq_len"
        ) from error
    except (OSError, SafetensorError) as error:
        ended("failed")
        raise UserError(f"output_dir = {folder}: writing stopped: {error}") from error
    except UserError as error:
        ended("failed", reason=str(error))
        _take_back(folder, record)
        raise
    except Exception as error:
        ended("failed")
        if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_CANNOT_WRITE):
            raise UserError(f"output_dir = {folder}: writing stopped: the disk is full or gone ({error})") from error
        raise
