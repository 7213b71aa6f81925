"""What may change when a run is resumed; the order of the data and the shape of the weights hang on the rest."""

from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import safe_globals

from llmlab.settings.base import Settings, fields_of, show
from llmlab.settings.errors import SettingsError, UserError, reading
from llmlab.settings.files import Layer, check_types, read_json
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.sources import resolve
from llmlab.training import checkpoints
from llmlab.training.record import read_record

MAY_CHANGE = {
    *("max_steps", "output_dir", "log_every", "eval_every", "eval_steps", "save_best_only", "save_total_limit"),
    *("device", "dtype", "compile", "gradient_checkpointing", "dataloader_num_workers", "num_proc", "cache_dir"),
    *("trainer_args", "allow_dropped", "allow_truncated", "epochs", "save_every", "tf32"),
    *("allow_code", "num_episodes", "log_interval", "eval_interval", "save_interval", "stop_patience"),
}
OF_THE_OPTIMIZER = {"lr", "learning_rate", "weight_decay", "warmup_steps", "grad_clip", "max_grad_norm"}


def check_whole(checkpoint: Path) -> None:
    """Raises UserError for a checkpoint whose files are damaged, before a run that would fail over them begins."""
    state = read_json(checkpoint / checkpoints.STATE)
    # what the trainer relies on, which its annotations are looser or stricter than
    relied = {"stateful_callbacks": dict[str, dict[str, Any]], "train_batch_size": int}
    types = get_type_hints(TrainerState) | relied | {"log_history": list[dict[str, Any]]}
    check_types(checkpoint / checkpoints.STATE, dict.fromkeys(relied) | state, types)
    for path in sorted(checkpoint.glob("*.json")):
        if path.name != "tokenizer.json":  # large, and not the trainer's
            read_json(path)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with reading(path, "weights"), safe_open(path, "pt"):
            pass
    for path in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("rng_state*.pth")):
        with reading(path, "a file of torch"), safe_globals():
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def find_checkpoint(run: Path, settings: Settings, *, load_optimizer: bool) -> Path:
    """Returns the checkpoint to go on from, after checking that these settings can.

    Args:
        run: the run folder; checkpoints that were cut off while being written are removed from it.
        settings: the settings of the resumed run.
        load_optimizer: False allows another optimizer and other values of its settings.

    Raises:
        SettingsError: every setting that changed and must not.
        UserError: there is no whole checkpoint, or nothing is left to do.
    """
    checkpoints.remove_partial(run)
    checkpoint = checkpoints.last_checkpoint(run)
    record = read_record(run)
    before = resolve(type(settings), Layer("record", record["settings"])).settings if record else settings
    problems = []
    for setting in fields_of(type(settings)):
        of_optimizer = setting.owner is OptimizerSettings or setting.name in OF_THE_OPTIMIZER
        if setting.name in MAY_CHANGE or setting.of(before) == setting.of(settings):
            continue
        if of_optimizer and not load_optimizer:
            continue
        hint = " (or resume with --no-load-optimizer)" if of_optimizer else ""
        problems.append(
            f"{setting.key} = {show(setting.of(settings))}: the run to resume has {show(setting.of(before))}, "
            f"and this cannot change on the way{hint}"
        )
    if problems:
        raise SettingsError(problems)
    if getattr(settings, "epochs", None) is not None:
        return checkpoint
    # a run that was killed between its last checkpoint and its final save goes on from the one before
    last = settings.max_steps if record and record["status"] != "finished" else 2**62  # type: ignore[attr-defined]
    open_ended = [path for path in checkpoints.checkpoints(run) if checkpoints.saved_step(path) < last]
    checkpoint = open_ended[-1] if open_ended else checkpoint
    step = checkpoints.saved_step(checkpoint)
    if step >= settings.max_steps:  # type: ignore[attr-defined]
        raise UserError(f"--resume {run}: it already is at step {step}; give a larger max_steps to extend it")
    return checkpoint
