"""Translates a stage's settings into the configuration of the TRL or Transformers trainer underneath. The `Trl`
markers of the settings give most of it; here is what has no one-to-one field."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from importlib.util import find_spec
from inspect import signature
from typing import Any, TypeVar, get_type_hints

from llmlab.hardware import Hardware
from llmlab.settings.base import Settings, show, spellings_of
from llmlab.settings.errors import SettingsError, UserError, did_you_mean, reading
from llmlab.settings.files import check_types, read_table
from llmlab.settings.trust import REMOTE_CODE, remote_code_allowed

C = TypeVar("C")

TABLES = read_table("llmlab.runs", "arguments")


def build_arguments(config: type[C], settings: Settings, hardware: Hardware, **fixed: Any) -> C:
    """Returns the trainer's configuration: the settings, over them what the stage fixes, over both `trainer_args`."""
    scheduler, scheduler_kwargs = TABLES["schedulers"][settings.scheduler].values()
    arguments = {
        **settings.trainer_arguments(),
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": scheduler_kwargs,
        "bf16": hardware.dtype == "bf16",
        "fp16": hardware.dtype == "fp16",
        "tf32": settings.tf32 if hardware.has_tf32 else None,
        "use_cpu": hardware.device == "cpu",
        "dataloader_pin_memory": hardware.device == "cuda",
        "save_total_limit": None,  # it would remove whatever is called checkpoint-*
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # every parameter takes part in every step
        "logging_nan_inf_filter": False,  # a NaN loss must be seen, not averaged away
        "logging_first_step": True,
    }
    if settings.gradient_checkpointing:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if REMOTE_CODE in signature(config).parameters:
        arguments[REMOTE_CODE] = remote_code_allowed()
    with blame_trainer_args(settings, config.__name__):
        return config(**{**arguments, **fixed, **checked_trainer_args(config, settings)})


def blame_trainer_args(settings: Settings, what: str) -> AbstractContextManager[None]:
    """Returns a context that blames the user's `trainer_args`, where there are any, for whatever a library raises."""
    arguments = settings.trainer_args
    return reading(f"trainer_args = {show(arguments)}", what) if arguments else nullcontext()


def checked_trainer_args(config: type, settings: Settings) -> dict[str, Any]:
    """Returns the settings' `trainer_args`, each name checked against the configuration class."""
    spellings = spellings_of(type(settings))
    keys = {field: key for key, names in TABLES["covered"].items() if key in spellings for field in names}
    keys |= {"trust_remote_code": "--trust-remote-code"} | {name: setting.key for name, setting in spellings.items()}
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    problems = []
    for name in settings.trainer_args:
        if name in keys:
            problems.append(f"trainer_args.{name}: set '{keys[name]}' instead, the setting that decides it")
        elif name not in known:
            problems.append(f"trainer_args.{name}: {config.__name__} has no such field{did_you_mean(name, known)}")
    if problems:
        raise SettingsError(problems)
    check_types("trainer_args", settings.trainer_args, get_type_hints(config))
    # here, since Accelerate's own error breaks what is loaded after it
    if settings.trainer_args.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError("trainer_args.deepspeed: it needs deepspeed, which is not installed")
    return settings.trainer_args
