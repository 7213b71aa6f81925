"""The seeds' tables of values (`tables.yaml`), and which of a run's settings lie outside of them. Only what the user
set is judged: defaults and shipped presets are the seeds' own."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llmlab.settings.base import spellings_of
from llmlab.settings.files import is_number, read_table

SHIPPED = ("default", "implied", "preset ", "hardware ")  # beginnings of sources that are not the user


@dataclass(frozen=True, kw_only=True)
class Band:
    """Usual values of a setting, `low` to `high`; the other fields are those of `tables.yaml`."""

    setting: str
    stages: Sequence[str]
    source: str
    low: float
    high: float = math.inf
    effect: str = ""
    recommended: float | None = None
    sized: bool | str = False
    lora: float = 1.0
    zero: bool = False
    quiet: str = ""
    against: bool = False


@cache
def load_bands() -> tuple[tuple[Band, ...], dict[str, tuple[float, float]]]:
    """Returns all bands, and the parameters of the models of each size, from and to."""
    table, bands = read_table("llmlab.health", "tables"), []
    for each in table["tables"]:
        shared = {key: value for key, value in each.items() if key != "bands"}
        bands += [Band(**{**shared, **band}) for band in each["bands"]]
    return tuple(bands), {name: tuple(limits) for name, limits in table["sizes"].items()}


def bands_for(stage: str, setting: str, parameters: float) -> list[Band]:
    """Returns the bands of a setting for a stage and a model of so many parameters, those of its size first."""
    bands, sizes = load_bands()
    size = next((name for name, (low, high) in sizes.items() if low <= parameters < high), None)
    own = [band for band in bands if band.setting == setting and stage in band.stages]
    own = [band for band in own if not band.sized or size is not None and band.sized in (True, size)]
    return sorted(own, key=lambda band: band.sized != size)


def find_outside(
    stage: str, settings: Any, sources: dict[str, str], *, parameters: float, processes: int
) -> list[str]:
    """Returns a sentence for each setting that the user set outside of the tables. `parameters` of the model are 0
    where they are unknown: what depends on its size is then not judged."""
    found = []
    for name, value, keys in _values(stage, settings, processes):
        bands, chosen = bands_for(stage, name, parameters), [sources.get(key, "default") for key in keys]
        lora = getattr(settings, "use_lora", False)
        usual = [replace(band, high=band.high * (band.lora if lora else 1)) for band in bands if not band.against]
        inside = any(band.low <= value <= band.high * (1 + 1e-9) for band in usual) or (value == 0 and bands[0].zero)
        if not usual or inside or all(source.startswith(SHIPPED) for source in chosen):
            continue
        nearest = min(usual, key=lambda band: min(abs(value - band.low), abs(value - band.high)))
        side = "below" if value < nearest.low else "above"
        if nearest.quiet in (side, "both"):
            continue
        low, high = min(band.low for band in usual), max(band.high for band in usual)
        span = f"{low:g}" if low == high else f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        warned = next((f", {band.effect}" for band in bands if band.against and value >= band.low), "")
        start = next((f"; recommended {each.recommended:g}" for each in usual if each.recommended and low != high), "")
        found.append(f"{name} = {value:g}: {side} the usual {span} of {stage}{warned}{start} ({nearest.source})")
    return found


def _values(stage: str, settings: Any, processes: int) -> Iterator[tuple[str, float, list[str]]]:
    """Yields the name and value of each setting that has bands, derived ones too, and the keys that decide it."""
    spellings, rollout = spellings_of(type(settings)), hasattr(settings, "rollout")
    value_of = {name: setting.of(settings) for name, setting in spellings.items()}
    for name in dict.fromkeys(band.setting for band in load_bands()[0] if stage in band.stages):
        value: Any = value_of.get(name)
        keys = [spellings[name].key] if name in spellings else []
        if name == "effective batch":
            value = settings.batch_size if rollout else settings.effective_batch(processes)
            keys = ["batch_size", *(() if rollout else ("mini_batch_size", "gradient_accumulation_steps"))]
        elif name == "lora_alpha / lora_r" and settings.use_lora and not settings.use_rslora:
            value, keys = settings.alpha / settings.lora_r, ["lora_alpha", "lora_r"]
        elif name == "share of warmup steps" and (settings.warmup_steps < 1 or value_of.get("epochs") is None):
            share = settings.warmup_steps
            value, keys = share if share < 1 else share / settings.max_steps, ["warmup_steps"]
        elif name == "d_ff / d_model":
            value, keys = settings.model.d_ff / settings.model.d_model, ["model.d_ff"]
        if is_number(value):
            yield name, value, keys
