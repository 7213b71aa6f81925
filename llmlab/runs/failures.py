"""How runs fail: full disks and memories become sentences, incomplete checkpoints go, the record says how it ended."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
NO_MEMORY = ("can't allocate memory", "MPS backend out of memory")  # torch's words, for CPUs and Apple's GPUs
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def check_memory(parameters: int, *, batch_tokens: int = 0, width: int = 0) -> None:
    """Refuses a model whose fp32 weights, or a batch whose 16-bit embeddings, exceed this machine's memory."""
    memory = system_memory()
    for what, needed in (("this model", 4 * parameters), ("one batch", 2 * batch_tokens * width)):
        if needed > memory > 0:
            raise UserError(
                f"{what} needs at least {human(needed, 'B')} of memory, and this machine has {human(memory, 'B')}"
            )


def check_disk(folder: Path, *, needed: int) -> None:
    """Refuses a run that will write more bytes than the disk has free."""
    free = free_disk(folder)
    if needed > free:
        raise UserError(
            f"output_dir = {folder}: this run writes about {human(needed, 'B')}, "
            f"and the disk has {human(free, 'B')} free"
        )


@contextmanager
def record_failures(
    stage: str, folder: Path, record: RunRecord | None, progress: ProgressLine, settings: Settings
) -> Iterator[None]:
    """Records how a run ended that did not finish, and raises system errors as UserError; bugs keep their type."""

    def end(status: str, **results: str) -> None:
        progress.stop()
        if record is not None:
            checkpoints.remove_partial(folder)  # first: on a full disk the record needs the room
            record.finish(status, **results)

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        end("interrupted")
        progress.say(f"stopped; continue with: llmlab {stage} --resume {escape(str(folder))}")
        raise
    except SystemExit:  # from rich, when the reader of a piped output has exited
        end("interrupted", reason="its output was closed")
        raise
    except Diverged as error:
        end("diverged", reason=str(error))
        saved = checkpoints.checkpoints(folder)
        if saved:
            again = f"llmlab {stage} --resume {folder} --no-load-optimizer learning_rate=..."
            progress.say(f"{saved[-1].name} is from before that; to resume it with a lower learning rate: {again}")
        raise
    except UserError as error:
        end("failed", reason=str(error))
        trained = any(folder.glob("checkpoint-*")) or any("loss" in line for line in read_metrics(folder))
        if record is not None and "resumed" not in record.values and not trained:
            for name in (RECORD, METRICS):  # a new run without a step: it can be started again in this folder
                (folder / name).unlink(missing_ok=True)
        raise
    except Exception as error:
        end("failed")
        reason = reason_of(error)
        words = str(error) if isinstance(error, RuntimeError) else ""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in words for part in NO_MEMORY):
            raise UserError(f"out of memory: {how_to_save_memory(settings)}") from error
        if _is_write_error(error, folder) or any(part in words for part in TORCH_CANNOT_WRITE):
            raise UserError(f"output_dir = {folder}: writing stopped: the disk is full or gone ({reason})") from error
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"{getattr(error, 'filename', None) or stage}: {reason}") from error
        raise


def how_to_save_memory(settings: Settings) -> str:
    """Returns which of a stage's settings to change so that a step needs less memory."""
    values = {setting.name: setting.of(settings) for setting in fields_of(type(settings))}
    rows = "mini_batch_size" if "mini_batch_size" in values else "batch_size"
    accumulation = values["gradient_accumulation_steps"]  # None follows from the other sizes
    doubled = "" if accumulation is None else f" and double gradient_accumulation_steps = {accumulation}"
    # a prompt and its completion together, or the whole row
    sampled = ("max_prompt_length", "max_new_tokens") if values.get("max_new_tokens") else ()
    lengths = [name for name in sampled or ("max_seq_len", "max_length") if values.get(name)]
    ways = [f"halve {rows} = {values[rows]}{doubled}"] if values[rows] > 1 else []
    ways += [f"shorten {' or '.join(f'{name} = {values[name]}' for name in lengths)}"]
    ways += [f"set {name}=true" for name in ("gradient_checkpointing", "use_lora") if values.get(name) is False]
    return ", or ".join(ways)


def _is_write_error(error: Exception, folder: Path) -> bool:
    """Returns whether an error of the system or of safetensors came from writing into the run folder, not reading."""
    if isinstance(error, SafetensorError):
        return str(error).startswith("Error while serializing")
    if not isinstance(error, OSError):
        return False
    name = error.filename
    inside = isinstance(name, (str, os.PathLike)) and Path(name).resolve().is_relative_to(folder.resolve())
    return inside or error.errno in NO_DISK
