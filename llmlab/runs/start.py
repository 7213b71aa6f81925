"""How a run of a stage begins: on which machine, in which claimed folder, from which checkpoint. No model is loaded
here, and of the data only the files' identities are read."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from rich.console import Console
from rich.markup import escape
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llmlab.hardware import Hardware, check_packages, probe
from llmlab.optim.build import check_supported
from llmlab.runs import checkpoints
from llmlab.runs.batch import Batch, batch_of, split_again
from llmlab.runs.record import read_record
from llmlab.runs.resume import (
    changes_since_start,
    check_data,
    check_deepspeed,
    check_undamaged,
    data_files,
    find_checkpoint,
    recorded_settings,
)
from llmlab.runs.signals import Interrupted, interrupt
from llmlab.settings.base import Settings
from llmlab.settings.errors import LAUNCHED, OfMainProcess, UserError, reason_of
from llmlab.settings.sources import Resolved
from llmlab.terminal import Terminal

# what `accelerate launch`, torchrun and notebook_launcher set in each process
IN_LAUNCH = {"LOCAL_RANK", "ACCELERATE_DYNAMO_MODE"}
S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound="Start[Any]")
T = TypeVar("T")


@dataclass
class Start(Generic[S]):
    """Where a run starts: `resumed` is the status that an earlier part of it recorded, None for a new run."""

    stage: str
    load_optimizer: bool
    resolved: Resolved[S]
    hardware: Hardware
    process: PartialState
    console: Console
    folder: Path
    resumed: str | None
    checkpoint: Path | None
    data_files: dict[str, Any]
    batch: Batch

    def __post_init__(self) -> None:
        self.settings: Any = self.resolved.settings
        set_seed(self.settings.seed)

    @property
    def done(self) -> int:
        """The number of optimizer updates that the checkpoint holds."""
        return checkpoints.saved_step(self.checkpoint) if self.checkpoint else 0


@contextmanager
def begin(
    run_class: type[R],
    stage: str,
    resolved: Resolved[Any],
    *,
    resume: str | Path | None,
    load_optimizer: bool,
    allow_changed_data: bool,
    console: Console | None,
) -> Iterator[R]:
    """Claims the run folder for as long as the run takes; the main process alone looks at it, and tells the others."""
    settings = resolved.settings
    try:
        hardware = probe(settings.device, settings.dtype)
    except UserError as error:
        source = resolved.sources.get("device", "")
        named = source if source.startswith("hardware") else None  # nobody typed the device then
        raise UserError(f"{named}: {error}" if named else str(error)) from None
    check_packages(settings, hardware)
    if hardware.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, looks for a GPU and says so
    unset_hf_deepspeed_config()  # of an earlier run here: under ZeRO-3 models would be loaded in parts
    process = PartialState(cpu=hardware.device == "cpu")
    console = console or Terminal(quiet=not process.is_main_process)
    gpus = torch.cuda.device_count() if hardware.device == "cuda" else 1
    if gpus > 1 and not IN_LAUNCH & os.environ.keys():
        ways = f"llmlab {stage} --accelerate ddp, or accelerate.notebook_launcher in a notebook, uses all"
        console.print(f"[yellow]note[/yellow] {gpus} GPUs are visible, and this run uses one of them: {ways}")
    with lost_processes_named(process), ExitStack() as stack:

        def claim() -> dict[str, Any]:
            sharding = sharding_of(settings)
            check_supported(settings.optimizer, sharding or process.distributed_type)
            output, processes = Path(settings.output_dir), process.num_processes
            if resume is None:
                folder = stack.enter_context(checkpoints.claim(output))
                new = {"resumed": None, "checkpoint": None, "batch": batch_of(settings, processes)}
                return {"folder": folder, "data_files": data_files(settings), "changes": {}, **new}
            run, chosen = checkpoints.find_run(resume)
            if not run.is_dir():
                raise UserError(f"--resume {resume}: there is no such run folder")
            if not (output.is_dir() and run.samefile(output)):
                raise UserError(f"output_dir = {output}: a resumed run goes on in its own folder, {run}")
            folder = stack.enter_context(checkpoints.claim(output, resume=True))
            files = data_files(settings)
            notes = check_data(folder, files, allow_changed=allow_changed_data)
            rolled_back = changes_since_start(folder, settings)
            now = settings.model_copy(update=rolled_back)
            checkpoint = find_checkpoint(folder, now, load_optimizer=load_optimizer, chosen=chosen)
            if checkpoint is not None:
                check_undamaged(checkpoint)
                used = sharding == "DEEPSPEED"
                check_deepspeed(checkpoint, used=used, processes=processes, load_optimizer=load_optimizer)
            before, record = recorded_settings(folder, now), read_record(folder)
            batch, changes = split_again(now, before, record, processes)
            if changes:
                values = ", ".join(f"{name} = {value}" for name, value in changes.items())
                notes.append(f"an optimizer step keeps its {batch.rows} rows, with {values}")
            checkpoints.remove_partial(folder)
            if checkpoint is not None and chosen is not None:
                later = checkpoints.supersede(folder, checkpoints.saved_step(checkpoint))
                target, names = folder / checkpoints.SUPERSEDED, ", ".join(path.name for path in later)
                notes += [f"moved into {target}, since the run continues from before them: {names}"] if names else []
            for note in notes:
                console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
            resumed = {"resumed": record.get("status", "finished"), "checkpoint": checkpoint, "batch": batch}
            sources = dict.fromkeys(changes, "batch of the resumed run") | dict.fromkeys(rolled_back, "rollback")
            found = {"folder": folder, "data_files": files, "changes": changes | rolled_back, "sources": sources}
            return {**found, **resumed}

        found = on_main(process, claim)
        changed_sources = found.pop("sources", {})
        if changes := found.pop("changes"):
            sources = {**resolved.sources, **changed_sources}
            resolved = replace(resolved, settings=settings.model_copy(update=changes), sources=sources)
        yield run_class(stage, load_optimizer, resolved, hardware, process, console, **found)


def sharding_of(settings: Any) -> str | None:
    """Returns what Accelerate is to shard the model with, `FSDP`, `DEEPSPEED` or None, as launcher or settings say."""
    for kind in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}") or settings.trainer_args.get(kind.lower()):
            if kind == "FSDP" and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
                where = "fsdp_cpu_ram_efficient_loading: true"
                raise UserError(f"{where}: every process needs weights, not the first one alone; expected false")
            return kind
    return None


def on_main(process: PartialState, action: Callable[[], T]) -> T:
    """Returns on every process what `action` returns on the main one, or raises its UserError there too."""
    result, error = None, None
    if process.is_main_process:
        try:
            result = action()
        except UserError as caught:
            error = caught
    result, message = broadcast_object_list([result, error and str(error)])
    if message is not None:
        raise error or OfMainProcess(message)
    return result


@contextmanager
def lost_processes_named(process: PartialState) -> Iterator[None]:
    """Says in one sentence, on the main process alone, that another process of this run is gone."""
    if process.num_processes == 1:
        yield
        return
    ignored = False  # the launcher's SIGTERM, until the sentence is printed
    main_thread = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, lambda number, _: ignored or interrupt(number)) if main_thread else None
    try:
        yield
    except (RuntimeError, torch.distributed.DistError, Interrupted) as caught:
        ignored = True
        error: BaseException | None = caught  # the launcher may stop this process while it handles the loss
        # gloo's errors have no type of their own
        while error and not (isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)):
            error = error.__context__
        if error is None:
            ignored = False
            raise
        # a launch of llmlab's own on one machine says which process it was
        kind = UserError if process.is_main_process and os.environ.get(LAUNCHED) != "1" else OfMainProcess
        raise kind(
            "another process of this run ended, and this one cannot go on without it; if it gave no reason, it was "
            f"killed (most often for its memory); --resume continues from the last checkpoint ({reason_of(error)})"
        ) from error
    finally:
        if main_thread and not ignored:
            signal.signal(signal.SIGTERM, earlier)
