"""How runs fail: full disks and memories become sentences, and what was half written goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from llmlab.hardware import free_disk
from llmlab.settings.errors import UserError
from llmlab.training import checkpoints
from llmlab.training.progress import ProgressLine, human
from llmlab.training.record import RunRecord

# torch.save hides the system's error behind these words
TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")


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
        raise
    except Exception as error:
        ended("failed")
        if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_CANNOT_WRITE):
            raise UserError(f"output_dir = {folder}: writing stopped: the disk is full or gone ({error})") from error
        raise
