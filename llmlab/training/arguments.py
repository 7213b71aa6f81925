"""Translates a stage's settings into the arguments of the TRL or Transformers trainer underneath.

The `Trl` markers of the settings do most of it; here is what has no one-to-one field.
"""

import warnings
from dataclasses import fields
from typing import Any, TypeVar

from llmlab.hardware import Hardware
from llmlab.settings.base import Settings, Trl, fields_of
from llmlab.settings.errors import SettingsError, did_you_mean

C = TypeVar("C")

SCHEDULERS = {
    "none": ("constant_with_warmup", {}),
    "cosine": ("cosine", {}),
    "linear": ("linear", {}),
    "polynomial": ("polynomial", {"power": 2.0, "lr_end": 0.0}),  # power 1 would be "linear" again
}


def build_arguments(config: type[C], settings: Settings, hardware: Hardware, **fixed: Any) -> C:
    """Returns the trainer's configuration for these settings on this machine.

    Args:
        config: the TRL or Transformers configuration class.
        settings: a training stage's settings.
        hardware: the probed machine.
        fixed: what the stage decides itself; `trainer_args` of the settings may override it.

    Raises:
        SettingsError: `trainer_args` names an unknown field, or one that a setting already covers.
    """
    scheduler, scheduler_kwargs = SCHEDULERS[settings.scheduler]
    checkpointing = (
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}
    )
    with warnings.catch_warnings():
        # the new name of `gradient_checkpointing` is not known to the older versions that are supported
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        return config(
            **{
                **settings.trainer_arguments(),
                "lr_scheduler_type": scheduler,
                "lr_scheduler_kwargs": scheduler_kwargs,
                "bf16": hardware.dtype == "bf16",
                "fp16": hardware.dtype == "fp16",
                "use_cpu": hardware.device == "cpu",
                "dataloader_pin_memory": hardware.device == "cuda",
                "report_to": "none",
                "disable_tqdm": True,
                "ddp_find_unused_parameters": False,  # every parameter takes part in every step
                "logging_nan_inf_filter": False,  # a NaN loss must be seen, not averaged away
                "logging_first_step": True,
                **checkpointing,
                **fixed,
                **checked_trainer_args(config, settings),
            }
        )


def checked_trainer_args(config: type, settings: Settings) -> dict[str, Any]:
    """Returns the settings' `trainer_args`, each name checked against the configuration class."""
    covered = {setting.marker(Trl).name: setting.key for setting in fields_of(type(settings)) if setting.marker(Trl)}
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    problems = []
    for name in settings.trainer_args:
        if name in covered:
            problems.append(f"trainer_args.{name}: set '{covered[name]}' instead, which is this option's name here")
        elif name not in known:
            problems.append(f"trainer_args.{name}: {config.__name__} has no such field{did_you_mean(name, known)}")
    if problems:
        raise SettingsError(problems)
    return settings.trainer_args
