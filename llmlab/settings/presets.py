"""Shipped values by name, a YAML file each: `--preset` (a model's size, a way of working), `--hardware` (a machine).
The sections of a file (`text`, `rows`, `pairs`, `online`) are for the stages that learn from these: they go over its
other values, and an empty one takes a value away. A machine's batch follows from what other layers set, so that the
effective batch (per device x accumulation x processes) is kept."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmlab.settings import settings_class
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.paths import shipped_folder
from llmlab.settings.sources import merge

SECTIONS = {
    "pretrain": "text",
    **dict.fromkeys(("sft", "rs-sft", "awr"), "rows"),
    **dict.fromkeys(("dpo", "orpo", "reward"), "pairs"),
    **dict.fromkeys(("grpo", "ppo"), "online"),
}
PASSES = "gradient_accumulation_steps"
BATCH = ("batch_size", "mini_batch_size", PASSES)
NOT_SETTINGS = ("num_processes", "accelerate", "out_of_memory")  # of a machine: how to start, what to try then
Values = dict[str, Any]

RECIPE_FOLDER = shipped_folder("recipes")
HARDWARE_PRESETS = {path.stem: path for path in sorted((RECIPE_FOLDER / "hardware").glob("*.yaml"))}


def presets(stage: str) -> dict[str, Path]:
    """Returns the files of the presets shipped for a stage, by name."""
    folders = (stage, *(("presets", "sizes") if stage in SECTIONS else ()))
    return {path.stem: path for folder in folders for path in sorted((RECIPE_FOLDER / folder).glob("*.yaml"))}


def read_preset(stage: str, name: str, option: str = "preset") -> Layer:
    """Returns the values of a preset shipped for a stage, or with the option `hardware` those of a machine."""
    files = HARDWARE_PRESETS if option == "hardware" else presets(stage)
    if not isinstance(name, str) or name not in files:
        known = [*(["auto"] if option == "hardware" else []), *files]
        raise UserError(f"{option} {name}: expected one of {', '.join(known)}{did_you_mean(str(name), known)}")
    values = for_stage(read_layer(files[name]), stage).values
    return Layer(f"{option} {name}", values, path=files[name])


def for_stage(layer: Layer, stage: str) -> Layer:
    """Returns a file's values for a stage: its own, over them those of the stage's section."""
    sections = {name for name in SECTIONS.values() if isinstance(layer.values.get(name), dict)}
    section = layer.section(SECTIONS[stage]) if SECTIONS.get(stage) in sections else Layer("", {})
    values = {key: value for key, value in layer.values.items() if key not in sections | section.values.keys()}
    values |= {key: value for key, value in section.values.items() if value is not None}
    return replace(layer, values=values, lines=layer.lines | section.lines)


def launch_of(hardware: str) -> tuple[int, str | None]:
    """Returns how many processes a machine is for, and the name of the configuration that launches them."""
    values = read_preset("", hardware, "hardware").values
    return values.get("num_processes", 1), values.get("accelerate")


def hardware_layer(
    stage: str, name: str, below: Sequence[Layer], above: Sequence[Layer], *, processes: int | None = 1
) -> tuple[Layer, list[str]]:
    """Returns what a machine sets between these layers, and notes: `above` is what the user set, `below` a preset.
    Outside a launch there are so many processes; None is the machine's own number, for what is only planned."""
    layer = read_preset(stage, name, "hardware")
    own_processes, launch = launch_of(name)
    values = {key: value for key, value in layer.values.items() if key not in NOT_SETTINGS}
    machine, preset, user = (
        {key: entry.value for key, entry in merge(settings_class(stage), part, [], []).items()}
        for part in ([replace(layer, values=values)], below, above)
    )
    processes = int(os.environ.get("WORLD_SIZE", processes or own_processes))
    batch, notes = _fit_batch(stage, machine, preset, user, own_processes, processes)
    if launch and processes == 1:
        notes.append(f"it is for several processes, such as {own_processes}: start them with --accelerate {launch}")
    values = {key: value for key, value in machine.items() if key not in BATCH} | batch
    label = layer.label + (f", {processes} processes" if processes > 1 else "")
    return replace(layer, label=label, values=values), [f"{label}: {note}" for note in notes]


def _fit_batch(
    stage: str, machine: Values, preset: Values, user: Values, own_processes: int, processes: int
) -> tuple[Values, list[str]]:
    """Returns what the user left open of the batch, so that it keeps its effective size, and notes where it cannot."""
    section, fields = SECTIONS[stage], settings_class(stage).model_fields
    pairs, online = section == "pairs", section == "online"
    rows = "mini_batch_size" if pairs or online else "batch_size"  # of a forward pass, per device
    user = {key: user[key] for key in (*BATCH, "group_size") if user.get(key) is not None}
    if not all(type(value) is int and value > 0 for value in user.values()):
        return {}, []  # validation says what is wrong
    below, most = machine, machine[rows]
    if preset.keys() & {*BATCH}:
        below = {key: fields[key].default for key in (rows, PASSES, "batch_size")} | preset
        most, own_processes = min(most, below[rows]), 1
    effective = below[rows] * below[PASSES] * own_processes if below[PASSES] else below["batch_size"]
    effective = user.get("batch_size", effective) if pairs else effective
    group = user.get("group_size", fields["group_size"].default) if "group_size" in fields else 1
    completions = user.get("batch_size", 0) * group if online else 0  # of a rollout, where the user set it

    def counts(unit: int) -> range:  # of so many rows, for about the effective batch, or what fits a rollout
        most = max(-(-effective // unit), 1)
        return range(1, 2 * most + 1) if online else range(max(effective // unit, 1), most + 1)

    sizes = [user[rows]] if rows in user else range(1, most + 1)
    if PASSES in user and rows not in user:
        sizes = counts(user[PASSES] * processes)
    choices = [(size, n) for size in sizes for n in ([user[PASSES]] if PASSES in user else counts(size * processes))]
    choices = [choice for choice in choices if completions % (math.prod(choice) * processes) == 0] or choices
    size, passes = min(choices, key=lambda choice: (abs(math.prod(choice) * processes - effective), -choice[0]))
    update = size * passes * processes
    batch, notes = {rows: size, PASSES: passes}, []
    if update != effective and not (rows in user and (PASSES in user or pairs and "batch_size" in user)):
        parts = f"{size} x {passes}" + (f" x {processes} processes" if processes > 1 else "")
        notes.append(f"an effective batch of {update} ({parts}) is the nearest to {effective}")
    if pairs:  # the passes follow from the rows
        batch = {rows: size} if PASSES in user else {rows: size, "batch_size": update}
    elif online:
        prompts, unit = below["batch_size"], math.lcm(update, group) // group
        batch["batch_size"] = max(round(prompts / unit), 1) * unit
        if batch["batch_size"] != prompts and "batch_size" not in user:
            notes.append(f"batch_size = {batch['batch_size']}: the nearest to {prompts} prompts in whole steps")
    return {key: value for key, value in batch.items() if key not in user and preset.get(key) != value}, notes
