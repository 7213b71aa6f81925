"""Merges layers of values (preset, files, command line) over the defaults, and knows where each value came from.
Spellings are resolved before layers are merged, and all problems are collected and reported at once."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmlab.settings.base import Setting, Settings, When, fields_of, is_group, show, spellings_of
from llmlab.settings.errors import SettingsError, UserError, did_you_mean, is_unicode
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.trust import REMOTE_CODE, refusals

S = TypeVar("S", bound=Settings)
LONGEST_VALUE = 200  # characters of a value in an error
LARGEST = 2**53  # integers up to here are exact in JSON and in floats too
NONE_WORDS = ("none", "null")
TYPE_TAGS = ("int", "float", "str", "bool", "list", "dict")  # pydantic's names of the parts of a union
NOT_SETTINGS = ("stage", REMOTE_CODE)  # a recipe may say which stage it is for; `refusals` reports the other


@dataclass(frozen=True)
class Entry:
    """A value that somebody set: `where` is `file:line` or the layer's label, `rank` orders the layers."""

    value: Any
    where: str
    rank: int


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Validated settings, where each value came from (`key -> source`), and the warnings to print."""

    settings: S
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()


def as_resolved(settings: S | Resolved[S]) -> Resolved[S]:
    """Returns settings with their sources; in those made in Python, what differs from its default is an argument."""
    if isinstance(settings, Resolved):
        return settings
    fields = fields_of(type(settings))
    return Resolved(settings, {s.key: "default" if s.of(settings) == s.default else "arguments" for s in fields})


def load(stage: type[S], path: str | Path, **overrides: Any) -> S:
    """Reads a settings file for notebooks and scripts: `load(PretrainSettings, "x.yaml", lr=1e-3)`.

    Args:
        stage: the settings class.
        path: a YAML, JSON or .py file.
        overrides: settings that replace those of the file, under any spelling.

    Returns:
        The validated settings.

    Raises:
        SettingsError: every unknown key, wrong value and contradiction, each with its place.
    """
    return resolve(stage, read_layer(path), Layer("arguments", overrides)).settings


def merge(kind: type[Settings], layers: Iterable[Layer], problems: list[str], warnings: list[str]) -> dict[str, Entry]:
    """Returns what layers set, by key, later ones winning; no value is validated yet."""
    entries: dict[str, Entry] = {}
    for rank, layer in enumerate(layers, start=1):
        problems += refusals(layer)
        found = _read(kind, layer, rank, problems, warnings)
        for names in kind.alternatives:
            if any(name in found and found[name].value is not None for name in names):
                entries = {key: entry for key, entry in entries.items() if key not in names}
        for key, entry in found.items():
            _add(entries, spellings_of(kind)[key], entry)
    return entries


def resolve(stage: type[S], *layers: Layer) -> Resolved[S]:
    """Validates the merged layers, later ones winning, and raises a SettingsError with all of their problems."""
    problems: list[str] = []
    warnings: list[str] = []
    entries = merge(stage, layers, problems, warnings)
    settings, wrong = _validate(stage, entries)
    problems += wrong
    if settings is not None:
        misplaced = _misplaced(settings, entries)
        problems += [message for message, is_error in misplaced.values() if is_error]
        warnings += [message for message, is_error in misplaced.values() if not is_error]
        if misplaced and not problems:
            entries = {key: entry for key, entry in entries.items() if key not in misplaced}
            settings, problems = _validate(stage, entries)
    if problems or settings is None:
        raise SettingsError(problems)
    sources = {s.key: "default" if s.of(settings) == s.default else "implied" for s in fields_of(stage)}
    return Resolved(settings, sources | {key: entry.where for key, entry in entries.items()}, tuple(warnings))


def _add(entries: dict[str, Entry], setting: Setting, entry: Entry) -> None:
    """Sets a value; a mapping is merged into the one before."""
    before = entries.get(setting.key)
    if before and setting.type_name == "mapping" and isinstance(entry.value, dict):
        entry = replace(entry, value={**(before.value or {}), **entry.value})
    entries[setting.key] = entry


def _read(
    stage: type[Settings], layer: Layer, rank: int, problems: list[str], warnings: list[str]
) -> dict[str, Entry]:
    """Returns a layer's values under the stage's own dotted keys."""
    table = spellings_of(stage)
    found: dict[str, Entry] = {}
    spelled: dict[str, str] = {}
    unused: dict[str, list[str]] = defaultdict(list)
    values = {str(key): value for key, value in layer.values.items()}
    stage.translate(values, lambda sentence: warnings.append(f"{layer.label}: {sentence}"))
    keys = list(_unfold(stage, values, layer, problems))
    # a key overrides the file of its group; a setting's own name is read before its other spellings
    keys.sort(key=lambda item: (item[2] is layer, item[0] in table and table[item[0]].name != item[0].split(".")[-1]))
    for key, value, source in keys:
        where = source.where(key if source is layer else key.partition(".")[2])
        mapping, _, inner = key.partition(".")
        if inner and mapping in table and table[mapping].type_name == "mapping":
            key, value = mapping, {inner: value}  # trainer_args.neftune_noise_alpha=5
        setting = table.get(key)
        if setting is None:
            reason = stage.reason_without_effect(key)
            if reason and layer.path is not None:
                unused[reason].append(key)
            elif reason:
                problems.append(f"{where}: '{key}' cannot be set here: {reason}")
            elif key not in NOT_SETTINGS:
                problems.append(f"{where}: unknown key '{key}'{did_you_mean(key, table)}")
            continue
        if unusable := _unusable(value):
            problems.append(f"{where}: {setting.key} = {_brief(value)}: {unusable}")
            continue
        is_none = isinstance(value, str) and value.lower() in NONE_WORDS and value not in setting.choices
        if is_none and "none" in setting.type_name:
            value = None
        other = spelled.get(setting.key, key)
        if other != key and found[setting.key].value != value:
            # a file for several algorithms may hold another one's own setting, which is an alias here
            owner = stage.relative_with(key, lambda relative: relative.model_fields)
            if owner and layer.path is not None:
                unused[owner].append(key)
            else:
                problems.append(f"{where}: '{key}' and '{other}' are two spellings of one setting; keep one")
            continue
        if source is layer:
            spelled[setting.key] = key
        _add(found, setting, Entry(value, where, rank))
    if unused:
        parts = [f"{', '.join(map(repr, names))} ({reason})" for reason, names in unused.items()]
        first = next(iter(unused.values()))[0]
        warnings.append(f"{layer.where(first)}: no effect here: {'; '.join(parts)}")
    return found


def _unfold(
    stage: type[Settings], values: dict[str, Any], layer: Layer, problems: list[str]
) -> Iterator[tuple[str, Any, Layer]]:
    """Yields (dotted key, value, its layer) with the groups of settings, and the files they may name, unfolded."""
    groups = {name for name, info in stage.model_fields.items() if is_group(info.annotation)}
    for key, value in values.items():
        source = layer
        if key in groups and isinstance(value, str):
            beside = (layer.path.parent if layer.path else Path()) / value
            try:
                source = read_layer(beside if beside.exists() else value)
            except UserError as error:
                problems.append(f"{layer.where(key)}: {key} = {value}: {error}")
                continue
            value = source.values
        if key in groups and isinstance(value, dict):
            yield from ((f"{key}.{inner}", part, source) for inner, part in value.items())
        else:
            yield key, value, source


def _unusable(value: Any) -> str | None:
    """Returns why no setting can have this value, whatever its type, or None."""
    if isinstance(value, dict):
        return next(filter(None, map(_unusable, (*value, *value.values()))), None)
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_unusable, value)), None)
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"expected a number of at most {LARGEST:,}"
    if isinstance(value, str) and "\0" in value:
        return "expected text without NUL characters"
    if isinstance(value, str) and not is_unicode(value):
        return "expected valid Unicode, found a lone surrogate"
    return None


def _brief(value: Any) -> str:
    """Returns a value as in YAML, its middle left out where it is long."""
    if isinstance(value, int) and value.bit_length() > 400:
        return "a number of more than 100 digits"
    text = show(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 20]}...{text[-15:]}"


def _validate(stage: type[S], entries: dict[str, Entry]) -> tuple[S | None, list[str]]:
    tree: dict[str, Any] = {}
    for key, entry in entries.items():
        *groups, name = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = entry.value
    try:
        return stage.model_validate(tree), []
    except ValidationError as error:
        sentences = []
        for detail in error.errors():
            reason = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
            reasons = reason.problems if isinstance(reason, SettingsError) else [str(reason)]
            sentences += [_sentence(stage, detail, each, entries) for each in reasons]
        return None, list(dict.fromkeys(sentences))


def _sentence(stage: type[Settings], detail: ErrorDetails, reason: str, entries: dict[str, Entry]) -> str:
    """Returns one of pydantic's errors as a sentence with the place, key, value and what was expected."""
    parts = [str(part) for part in detail["loc"]]
    setting = next((s for s in fields_of(stage) if list(s.path) == parts[: len(s.path)]), None)
    if setting is None and detail["type"] == "value_error":  # of a check between fields, which the reason names
        named = (".".join([*parts, word]) for word in re.findall(r"\w+", reason))
        places = [entries[key].where for key in named if key in entries]
        return f"{places[-1] if places else 'defaults'}: {reason}"
    key = setting.key if setting else ".".join(parts)
    where = entries[key].where if key in entries else "defaults"
    inner = [part for part in parts[len(setting.path) :] if part not in TYPE_TAGS] if setting else []
    name = key + "".join(
        f"[{part}]" if part.isdigit() else f".{part}" for part in inner if part.isidentifier() or part.isdigit()
    )
    if detail["type"] == "missing":
        return f"{where}: {name}: a value is required"
    if detail["type"] == "literal_error":
        choices = [show(choice) for choice in (setting.choices if setting else ())]
        expected = f"expected one of {', '.join(choices)}{did_you_mean(str(detail['input']), choices)}"
    elif detail["type"] == "model_type":
        expected = "expected text or a mapping"
    else:
        expected = reason.replace("Input should be", "expected")
    return f"{where}: {name} = {_brief(detail['input'])}: {expected}"


def _misplaced(settings: Settings, entries: dict[str, Entry]) -> dict[str, tuple[str, bool]]:
    """Returns (sentence, whether it is an error) for each key whose `When` does not hold: silent where it repeats the
    default, a warning where a higher layer changed the condition, as in files that list every setting."""
    misplaced: dict[str, tuple[str, bool]] = {}
    for setting in fields_of(type(settings)):
        condition, entry = setting.marker(When), entries.get(setting.key)
        if condition is None or entry is None or setting.of(settings) == setting.default:
            continue
        other = next(s for s in fields_of(type(settings)) if s.path == (*setting.path[:-1], condition.field))
        actual, decider = other.of(settings), entries.get(other.key)
        if not condition.holds(actual):
            overridden = decider is not None and decider.rank > entry.rank
            sentence = f"{entry.where}: {setting.key} applies only when {condition}, and {other.key} is {show(actual)}"
            misplaced[setting.key] = (sentence + ("; ignored" if overridden else ""), not overridden)
    return misplaced
