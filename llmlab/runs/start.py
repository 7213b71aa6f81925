"""How a run of a stage begins: on which machine, in which claimed folder, and what it resumes from, an undamaged
checkpoint, with settings and data files that continue the same training. How the rows of an optimizer step are split
into processes and forward passes changes no result, so a resumed run may split them otherwise. No model is loaded
here, and of the data only the files' identities are read."""

import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from rich.console import Console
from rich.markup import escape
from safetensors import safe_open
from transformers import TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import safe_globals

from llmlab.data.files import files_of
from llmlab.hardware import check_packages, probe
from llmlab.optim.build import check_supported
from llmlab.runs import checkpoints
from llmlab.runs.record import read_record
from llmlab.runs.signals import Interrupted, interrupt
from llmlab.settings.base import Resume, Settings, fields_of, show
from llmlab.settings.data import DataSettings
from llmlab.settings.errors import LAUNCHED, OfMainProcess, SettingsError, UserError, reading, reason_of
from llmlab.settings.files import Layer, check_types, read_json
from llmlab.settings.sources import Resolved, resolve
from llmlab.settings.training import TrainingSettings
from llmlab.terminal import Terminal

# what `accelerate launch`, torchrun and notebook_launcher set in each process
IN_LAUNCH = {"LOCAL_RANK", "ACCELERATE_DYNAMO_MODE"}
S = TypeVar("S", bound=Settings)
T = TypeVar("T")
HASHED_BYTES = 2**30  # of all data files together, a second or two; larger ones are known by size and time


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


def check_undamaged(checkpoint: Path) -> None:
    """Raises UserError for a checkpoint with damaged files, before the run that would fail over them begins."""
    state = read_json(checkpoint / checkpoints.STATE)
    # the trainer relies on these, and its annotations are looser or stricter
    required = {"stateful_callbacks": dict[str, dict[str, Any]], "train_batch_size": int}
    types = get_type_hints(TrainerState) | required | {"log_history": list[dict[str, Any]]}
    check_types(checkpoint / checkpoints.STATE, dict.fromkeys(required) | state, types)
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".json" and path.name != "tokenizer.json":  # large, and not the trainer's
            read_json(path)
        elif path.suffix == ".safetensors":
            with reading(path, "weights"), safe_open(path, "pt"):
                pass
        elif path.suffix == ".pt" or path.match("rng_state*.pth"):
            with reading(path, "a file of torch"), safe_globals():
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def data_files(settings: DataSettings) -> dict[str, dict[str, Any]]:
    """Returns size, time and, unless they are too large together, the hash of each local data file."""
    sources = (*settings.datasets, *(settings.validation_datasets or ()))
    stats = {file: file.stat() for source in sources for file in files_of(source)}
    found = {str(file): {"bytes": stat.st_size, "modified": stat.st_mtime_ns} for file, stat in stats.items()}
    if sum(stat.st_size for stat in stats.values()) > HASHED_BYTES:
        return found
    for name in found:
        digest = hashlib.blake2b(digest_size=16)
        with reading(name), open(name, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        found[name]["hash"] = digest.hexdigest()
    return found


def check_data(run: Path, now: dict[str, dict[str, Any]], *, allow_changed: bool) -> list[str]:
    """Returns a note for each data file that changed since the run began, or raises them all."""
    before = read_record(run).get("data_files", now)
    notes = []
    for name in sorted({*before, *now}):
        if not _is_same(before.get(name, {}), now.get(name, {})):
            change = "is gone" if name not in now else "changed" if name in before else "is new"
            notes.append(f"{name}: this data file {change} since the run began")
    if notes and not allow_changed:
        raise SettingsError([f"{note}; --allow-changed-data resumes all the same" for note in notes])
    return notes


def _is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a file's size and hash are the same; its time counts only where one of them has no hash."""
    by = "hash" if "hash" in before and "hash" in now else "modified"
    return bool(before and now) and (before.get("bytes"), before.get(by)) == (now.get("bytes"), now.get(by))


def recorded_settings(run: Path, settings: S) -> S:
    """Returns the settings that a run recorded, or these where it has no record."""
    record = read_record(run)
    return resolve(type(settings), Layer("record", record["settings"])).settings if record else settings


def rollbacks_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the rollbacks of a run so far, oldest first."""
    return read_record(folder).get("rollbacks", [])


def changes_since_start(folder: Path, settings: Any) -> dict[str, Any]:
    """Returns what rollbacks changed of a run's first settings, of those that still have their first values."""
    first, now = {}, {}
    for entry in rollbacks_of(folder):
        for name, (before, after) in entry["changes"].items():
            if now.get(name) != before:  # the first time, or a resumed run had another value
                first[name] = before
            now[name] = after
    return {name: value for name, value in now.items() if getattr(settings, name) == first[name]}


def changed_by(folder: Path, name: str, step: int) -> float:
    """Returns the factor by which rollbacks changed a setting since the checkpoint of a step was written."""
    later = takewhile(lambda each: each["to"] >= step, reversed(rollbacks_of(folder)))
    pairs = [each["changes"][name] for each in later if name in each["changes"]]
    return math.prod(after / before for before, after in pairs)


def find_checkpoint(run: Path, settings: Settings, *, load_optimizer: bool, chosen: Path | None = None) -> Path | None:
    """Returns the last or the chosen checkpoint, None for a run that ended before its first; settings that decide
    data, model or, unless it is not loaded, the optimizer's state must be the recorded ones."""
    record, before = read_record(run), recorded_settings(run, settings)
    problems = []
    for setting in fields_of(type(settings)):
        of_optimizer = setting.resume is Resume.NEW_OPTIMIZER
        free = setting.resume in (Resume.FREE, Resume.SPLIT, Resume.LOCAL) or (of_optimizer and not load_optimizer)
        if not free and setting.of(before) != setting.of(settings):
            hint = " (or resume with --no-load-optimizer)" if of_optimizer else ""
            has = f"the run to resume has {show(setting.of(before))}, which a resumed run cannot change{hint}"
            problems.append(f"{setting.key} = {show(setting.of(settings))}: {has}")
    if problems:
        raise SettingsError(problems)
    saved = checkpoints.checkpoints(run)
    if chosen is not None and chosen.name not in [path.name for path in saved]:
        names = ", ".join(path.name for path in saved) or "none"
        raise UserError(f"--resume {chosen}: this is no complete checkpoint; expected one of those in {run}: {names}")
    finished = record.get("status", "finished") == "finished"
    if not saved and finished:
        raise UserError(f"--resume {run}: this run has no complete checkpoint; start it again in another output_dir")
    if not saved:
        return None
    checkpoint = run / chosen.name if chosen else saved[-1]
    if not (getattr(settings, "epochs", None) or getattr(settings, "num_episodes", None)):
        check_steps_left(run, checkpoints.saved_step(checkpoint), settings.max_steps, finished)  # type: ignore[attr-defined]
    return checkpoint


def check_deepspeed(checkpoint: Path, *, used: bool, processes: int, load_optimizer: bool) -> None:
    """Raises UserError for a checkpoint that DeepSpeed wrote and others would read, or the other way around."""
    parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*optim_states.pt")))
    if used and not (parts and load_optimizer):
        why = "restores the optimizer too" if parts else "reads only checkpoints that it wrote"
        raise UserError(f"--resume {checkpoint}: DeepSpeed always {why}; resume without it")
    if parts and load_optimizer and (not used or parts != processes):
        why = f"DeepSpeed wrote it on {parts} processes, and reads it on as many"
        raise UserError(f"--resume {checkpoint}: {why}; take them, or with --no-load-optimizer and without DeepSpeed")


def check_steps_left(run: Path, done: int, steps: int, finished: bool) -> None:
    """Raises UserError where a run has no step left; one killed before its final save has that to do."""
    if done > steps or (done == steps and finished):
        raise UserError(f"--resume {run}: it already is at step {done}; train longer to extend it")


@contextmanager
def begin(
    run_class: type[T],
    stage: str,
    resolved: Resolved[Any],
    *,
    resume: str | Path | None,
    load_optimizer: bool,
    allow_changed_data: bool,
    console: Console | None,
) -> Iterator[T]:
    """Claims the run folder for as long as the run takes; the main process alone looks at it, and tells the others.
    `run_class` has the fields of `Run`."""
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

        def claim() -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
            """Returns what the folder decides of the run, and the settings that resuming changes, with sources."""
            sharding = sharding_of(settings)
            check_supported(settings.optimizer, sharding or process.distributed_type)
            output, processes = Path(settings.output_dir), process.num_processes
            if resume is None:
                folder = stack.enter_context(checkpoints.claim(output))
                new = {"folder": folder, "data_files": data_files(settings), "batch": batch_of(settings, processes)}
                return {**new, "resumed": None, "checkpoint": None}, {}, {}
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
            record = read_record(folder)
            batch, changes = split_again(now, recorded_settings(folder, now), record, processes)
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
            sources = dict.fromkeys(changes, "batch of the resumed run") | dict.fromkeys(rolled_back, "rollback")
            resumed = {"folder": folder, "data_files": files, "batch": batch, "checkpoint": checkpoint}
            return {**resumed, "resumed": record.get("status", "finished")}, changes | rolled_back, sources

        start, changes, sources = on_main(process, claim)
        if changes:
            changed, sources = settings.model_copy(update=changes), {**resolved.sources, **sources}
            resolved = replace(resolved, settings=changed, sources=sources)
        yield run_class(stage, load_optimizer, resolved, hardware, process, console, **start)


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
