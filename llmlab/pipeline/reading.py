"""A pipeline file: ordered stages, each with its settings, where `${stage}` stands for an earlier stage's run folder.

```yaml
output_dir: runs/quickstart
stages:
  tokenizer: {datasets: [demo/stories], vocab_size: 2048}
  pretrain: {tokenizer_name: "${tokenizer}", datasets: [demo/stories]}
```
A stage's name is its kind, unless `stage: kind` says otherwise. A stage may have a `preset` and a `hardware`, and the
file a `hardware` for all of them: names, as on the command line.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.settings.base import show
from llmlab.settings.errors import SettingsError, UserError, did_you_mean
from llmlab.settings.files import Layer, parse_scalar, read_layer
from llmlab.settings.presets import SECTIONS, read_preset
from llmlab.settings.rewards import RewardsSettings
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import REMOTE_CODE, refusals
from llmlab.stages import STAGES, Stage

REFERENCE = re.compile(r"\$\{([^}]*)\}")
NAME = re.compile(r"\w[\w-]{0,99}")  # of a stage: a folder in output_dir, beside files that have a dot in their names
KEYS = ("output_dir", "hardware", "stages")


@dataclass(frozen=True)
class PipelineStage:
    """One stage of a pipeline: its settings resolved, its run folder, and the earlier stages it refers to."""

    name: str
    stage: Stage
    resolved: Resolved[Any]
    folder: Path
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file, read and checked as a whole before anything starts."""

    output_dir: Path
    stages: tuple[PipelineStage, ...]
    processes: int = 1  # of each stage that trains


def read_pipeline(
    path: str | Path,
    overrides: list[str] | None = None,
    *,
    allow_code: bool = False,
    hardware: str | None = None,
    processes: int = 1,
) -> Pipeline:
    """Reads a pipeline file, and raises SettingsError with every problem of every stage; `overrides` are the command
    line's `stage.key=value`, `hardware` replaces that of the file, for so many `processes` of a stage."""
    layer = read_layer(path)
    problems = refusals(Layer(layer.label, {k: v for k, v in layer.values.items() if k != "stages"}, layer.lines))
    unknown, expected = [key for key in layer.values if key not in (*KEYS, REMOTE_CODE)], ", ".join(KEYS)
    problems += [f"{layer.where(str(key))}: unknown key '{key}' of a pipeline; expected {expected}" for key in unknown]
    stages = layer.values.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{layer.where('stages')}: expected 'stages', a mapping of stage names to their settings")
    if unnamed := [name for name in stages if not isinstance(name, str)]:
        raise UserError(f"{layer.where('stages')}: stage '{show(unnamed[0])}': expected a name as text")
    changes = _overrides(overrides or [], stages, problems)
    place = changes.pop("output_dir", layer.values.get("output_dir", f"runs/{Path(path).stem}"))
    if not isinstance(place, str) or not place or "\0" in place:
        raise UserError(f"{layer.where('output_dir')}: output_dir = {show(place)}: expected the path of a folder")
    output_dir = Path(place)

    found: list[PipelineStage] = []
    body = layer.section("stages")
    for number, name in enumerate(stages):
        if not NAME.fullmatch(str(name)):
            expected = "expected letters, digits, '_' and '-' (a folder's name)"
            problems.append(f"{body.where(name)}: stage name '{name}': {expected}")
            continue
        values = stages[name] or {}
        if not isinstance(values, dict):
            problems.append(f"{body.where(name)}: stage '{name}': expected a mapping of settings")
            continue
        kind = str(values.get("stage", name))
        kind = "rs-sft" if kind == "rs_sft" else kind
        if kind not in STAGES:
            hint = did_you_mean(kind, STAGES)
            problems.append(f"{body.where(name)}: unknown stage '{kind}': expected one of {', '.join(STAGES)}{hint}")
            continue
        folders = {str(earlier): str(output_dir / str(earlier)) for earlier in list(stages)[:number]}
        needs: list[str] = []
        section = body.section(name)
        section = Layer(section.label, _substitute(section, folders, needs, problems), section.lines, section.path)
        options = {**changes.get(name, {}), "output_dir": str(output_dir / name)}
        if allow_code and "allow_code" in STAGES[kind].settings_class.model_fields:
            options["allow_code"] = True
        if "output_dir" in values:
            where = section.where("output_dir")
            problems.append(f"{where}: a pipeline's stages write to <output_dir>/<stage>; leave it out")
        try:
            own = ("preset", "hardware") if kind in SECTIONS else ()
            names = {key: options.pop(key, section.values.pop(key, None)) for key in own}
            below = [read_preset(kind, names["preset"])] if names.get("preset") else []
            machine = names and (names["hardware"] or hardware or layer.values.get("hardware")) or None
            layers = [section, Layer("command line", options)]
            resolved = STAGES[kind].resolve(layers, below=below, hardware=machine, processes=processes)
            if issubclass(STAGES[kind].settings_class, RewardsSettings):  # it may start much later
                from llmlab.rewards.loading import check_rewards

                resolved = check_rewards(resolved)
        except UserError as error:
            problems += [f"{problem} (stage '{name}')" for problem in getattr(error, "problems", [error])]
            continue
        found.append(PipelineStage(name, STAGES[kind], resolved, output_dir / name, tuple(dict.fromkeys(needs))))
    if problems:
        raise SettingsError(problems)
    return Pipeline(output_dir, tuple(found), processes)


def _overrides(words: list[str], stages: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        stage, dot, setting = key.partition(".")
        if not equals or not (dot or key == "output_dir"):
            problems.append(f"command line: '{word}': expected stage.key=value, such as pretrain.max_steps=100")
        elif key == "output_dir":
            changes["output_dir"] = text
        elif stage not in stages:
            problems.append(f"command line: '{word}': there is no stage '{stage}'{did_you_mean(stage, stages)}")
        else:
            if setting in changes.setdefault(stage, {}):
                problems.append(f"command line: '{key}' is given twice; keep one")
            changes[stage][setting] = parse_scalar(text, key)
    return changes


def _substitute(section: Layer, folders: dict[str, str], needs: list[str], problems: list[str]) -> dict[str, Any]:
    """Returns the values with every `${stage}` replaced by that stage's run folder, noting which were needed. A run
    folder that is written out is needed just as well."""

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, str):
            found, known = REFERENCE.findall(value), ", ".join(folders) or "none comes before it"
            unknown = (f"${{{name}}}: expected an earlier stage ({known})" for name in found if name not in folders)
            problems.extend(f"{section.where(key)}: {problem}" for problem in unknown)
            text = REFERENCE.sub(lambda match: folders.get(match[1], match[0]), value)
            needs.extend(name for name, path in folders.items() if name in found or Path(text).is_relative_to(path))
            return text
        if isinstance(value, dict):
            return {name: walk(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, key) for inner in value]
        return value

    return walk(section.values, "")
