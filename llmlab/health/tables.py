"""The seeds' tables of values (`tables.yaml`), and which of a run's settings lie outside of them.

Only what the user set is judged: defaults and shipped presets are the seeds' own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from llmlab.settings.base import spellings_of

SHIPPED = ("default", "implied", "preset ", "hardware ")  # beginnings of sources that are not the user


@dataclass(frozen=True, kw_only=True)
class Band:
    """Usual values of a setting, `low` to `high`; `sized` names the models that it is for, None being all."""

    setting: str
    stages: tuple[str, ...]
    source: str
    low: float
    high: float
    effect: str = ""
    when: str = ""
    recommended: float | None = None
    sized: bool | str | None = None
    lora: float = 1.0
    zero: bool = False
    quiet: str = ""
    against: bool = False

    def upper(self, settings: Any) -> float:
        return self.high * (self.lora if getattr(settings, "use_lora", False) else 1.0)


@cache
def load_bands() -> tuple[tuple[Band, ...], dict[str, tuple[float, float]]]:
    """Returns all bands, and the parameters of the models of each size, from and to."""
    table = yaml.safe_load((files("llmlab.health") / "tables.yaml").read_text(encoding="utf-8"))
    bands = []
    for each in table["tables"]:
        common = {name: value for name, value in each.items() if name not in ("bands", "stages")}
        for band in each["bands"]:
            own = {name: value for name, value in band.items() if name not in ("from", "to")}
            ends = {"low": band["from"], "high": band.get("to", math.inf)}
            bands.append(Band(stages=tuple(each["stages"]), **{**common, **own}, **ends))
    return tuple(bands), {name: (low, high) for name, (low, high) in table["sizes"].items()}


def bands_for(stage: str, setting: str, parameters: float) -> list[Band]:
    """Returns the bands of a setting (by any of the seeds' names) for a stage and a model of so many parameters."""
    bands, sizes = load_bands()
    size = next((name for name, (low, high) in sizes.items() if low <= parameters < high), None)
    return [
        band
        for band in bands
        if band.setting == setting and stage in band.stages
        if not band.sized or (size if band.sized is True else band.sized == size)
    ]


def find_outside(
    stage: str, settings: Any, sources: dict[str, str], *, parameters: float, processes: int
) -> list[str]:
    """Returns a sentence for each setting that the user set outside of the tables.

    `parameters` of the model are 0 where they are unknown: what depends on its size is then not judged.
    """
    found = []
    for name, value, keys in _values(stage, settings, processes):
        chosen = any(not sources.get(key, "default").startswith(SHIPPED) for key in keys)
        bands = bands_for(stage, name, parameters)
        if not chosen or not bands or (value == 0 and bands[0].zero):
            continue
        usual = sorted((band for band in bands if not band.against), key=lambda band: not isinstance(band.sized, str))
        if any(band.low <= value <= band.upper(settings) * (1 + 1e-9) for band in usual):
            continue
        nearest = min(usual, key=lambda band: min(abs(value - band.low), abs(value - band.upper(settings))))
        side = "below" if value < nearest.low else "above"
        if nearest.quiet in (side, "both"):
            continue
        low, high = min(band.low for band in usual), max(band.upper(settings) for band in usual)
        span = f"{low:g}" if low == high else f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        warned = next((f", {band.effect}" for band in bands if band.against and value >= band.low), "")
        start = next((f"; recommended {each.recommended:g}" for each in usual if each.recommended and low != high), "")
        found.append(f"{name} = {value:g}: {side} the usual {span} of {stage}{warned}{start} ({nearest.source})")
    return found


def _values(stage: str, settings: Any, processes: int) -> Iterator[tuple[str, float, list[str]]]:
    """Yields the name and value of each setting that has bands, derived ones too, and the keys that decide it."""
    spellings = spellings_of(type(settings))
    value_of = {name: setting.of(settings) for name, setting in spellings.items()}
    for name in dict.fromkeys(band.setting for band in load_bands()[0] if stage in band.stages):
        if name == "effective batch":
            keys = ["batch_size", "mini_batch_size", "gradient_accumulation_steps"]
            rollout = hasattr(settings, "rollout")
            value = settings.batch_size if rollout else settings.effective_batch(processes)
            keys = keys[:1] if rollout else keys
        elif name == "lora_alpha / lora_r":
            used = value_of["use_lora"] and not value_of["use_rslora"]
            keys, value = ["lora_alpha", "lora_r"], settings.alpha / settings.lora_r if used else None
        elif name == "share of warmup steps":
            steps, warmup = value_of["max_steps"], value_of["warmup_steps"]
            by_epochs = value_of.get("epochs") is not None and warmup >= 1
            keys, value = ["warmup_steps"], None if by_epochs else warmup if warmup < 1 else warmup / steps
        elif name == "d_ff / d_model":
            keys, value = ["model.d_ff"], value_of["d_ff"] / value_of["d_model"]
        else:
            keys, value = [spellings[name].key], value_of[name]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value, keys
