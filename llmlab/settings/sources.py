"""Merges layers of values (defaults, preset, file, command line) into settings, and knows where each value came from.

Spellings are resolved before layers are merged, so `--lr` on the command line overrides `learning_rate` in a file.
All problems are collected and reported at once.
"""

from collections import defaultdict
from dataclasses import dataclass
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
LARGEST = 2**53  # the integers up to here are whole in JSON and in floats too
NONE_WORDS = ("none", "None", "null")
TYPE_TAGS = ("int", "float", "str", "bool", "list", "dict")  # pydantic says which part of a union refused a value
NOT_SETTINGS = ("stage", REMOTE_CODE)  # a recipe may say which stage it is for; the other is refused elsewhere


@dataclass(frozen=True)
class Given:
    """A value somebody gave: `rank` orders the layers, `where` is `file:line` or the layer's label."""

    value: Any
    where: str
    rank: int


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Validated settings, where each value came from (`key -> source`), and the warnings to print."""

    settings: S
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()

    def given(self, key: str) -> bool:
        """Whether somebody set this key, in contrast to the default that holds otherwise."""
        return self.sources[key] != "default"

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns (key, value, source) for each setting, in the order of declaration."""
        return [(s.key, show(s.of(self.settings)), self.sources[s.key]) for s in fields_of(type(self.settings))]


def as_resolved(settings: S | Resolved[S]) -> Resolved[S]:
    """Returns settings with their sources: those made in Python are arguments where they differ from the defaults."""
    if isinstance(settings, Resolved):
        return settings
    fields = fields_of(type(settings))
    return Resolved(settings, {s.key: "default" if s.of(settings) == s.default else "arguments" for s in fields})


def resolve(stage: type[S], *layers: Layer) -> Resolved[S]:
    """Validates the merged layers, later ones winning.

    Raises:
        SettingsError: every unknown key, wrong value and contradiction, each with its place.
    """
    problems: list[str] = []
    warnings: list[str] = []
    given: dict[str, Given] = {}
    for rank, layer in enumerate(layers, start=1):
        problems += refusals(layer)
        found = _canonical(stage, layer, rank, problems, warnings)
        for fields in stage.alternatives:
            if any(key in found and found[key].value is not None for key in fields):
                given = {key: entry for key, entry in given.items() if key not in fields}
        for key, entry in found.items():
            if key in given and _is_mapping(spellings_of(stage)[key]) and isinstance(entry.value, dict):
                entry = Given({**(given[key].value or {}), **entry.value}, entry.where, rank)
            given[key] = entry
    unusable = [
        f"{entry.where}: {key} = {_brief(entry.value)}: {reason}"
        for key, entry in given.items()
        if (reason := _unusable(entry.value))
    ]
    if unusable:
        raise SettingsError([*problems, *unusable])
    settings, wrong = _validate(stage, given)
    problems += wrong
    if settings is not None:
        misplaced = _misplaced(settings, given)
        problems += [message for message, is_error in misplaced.values() if is_error]
        warnings += [message for message, is_error in misplaced.values() if not is_error]
        if misplaced and not problems:
            given = {key: entry for key, entry in given.items() if key not in misplaced}
            settings, problems = _validate(stage, given)
    if problems or settings is None:
        raise SettingsError(problems)
    sources = {s.key: given[s.key].where if s.key in given else _unsaid(s, settings) for s in fields_of(stage)}
    return Resolved(settings, sources, tuple(warnings))


def _is_mapping(setting: Setting) -> bool:
    """Whether layers add entries to a setting's value rather than replace it."""
    return setting.type_name == "mapping"


def _unsaid(setting: Setting, settings: Settings) -> str:
    """Says where a value comes from that nobody gave."""
    return "default" if setting.of(settings) == setting.default else "implied"


def load(stage: type[S], path: str | Path, **overrides: Any) -> S:
    """Reads a settings file for notebooks and scripts: `load(PretrainSettings, "x.yaml", lr=1e-3)`."""
    return resolve(stage, read_layer(path), Layer("arguments", overrides)).settings


def _canonical(
    stage: type[Settings], layer: Layer, rank: int, problems: list[str], warnings: list[str]
) -> dict[str, Given]:
    """Returns a layer's values under the stage's own dotted keys."""
    groups = {name for name, info in stage.model_fields.items() if is_group(info.annotation)}
    found: dict[str, Given] = {}
    spelled: dict[str, str] = {}
    unused: dict[str, list[str]] = defaultdict(list)

    def take(key: str, value: Any, where: str, from_group_file: bool = False) -> None:
        if key in groups and isinstance(value, str):
            return take_file(key, value)
        if key in groups and isinstance(value, dict):
            for name, inner in value.items():
                take(f"{key}.{name}", inner, layer.where(f"{key}.{name}"))
            return
        mapping, _, rest = key.partition(".")
        if rest and mapping in stage.model_fields and isinstance(stage.model_fields[mapping].default_factory, type):
            key, value = mapping, {rest: value}  # trainer_args.neftune_noise_alpha=5
        setting = spellings_of(stage).get(key)
        if setting is None:
            reason = stage.why_inapplicable(key)
            if key in NOT_SETTINGS or value in stage.implied.get(key, ()):
                return
            if reason and layer.path is not None:
                unused[reason].append(key)
            elif reason:
                problems.append(f"{where}: '{key}' cannot be set here: {reason}")
            else:
                problems.append(f"{where}: unknown key '{key}'{did_you_mean(key, spellings_of(stage))}")
            return
        if (
            isinstance(value, str)
            and value in NONE_WORDS
            and value not in setting.choices
            and "none" in setting.type_name
        ):
            value = None
        other = spelled.get(setting.key, key)
        if other != key and found[setting.key].value != value:
            # one of the two may be another algorithm's own word
            owner_of = {name: stage.owners_elsewhere(name, lambda kind: kind.model_fields) for name in (key, other)}
            foreign = next((name for name, owner in owner_of.items() if owner), None)
            if foreign is None or layer.path is None:
                problems.append(f"{where}: '{key}' and '{other}' are two spellings of one setting; keep one")
            else:
                unused[owner_of[foreign]].append(foreign)
            if foreign == key:
                return
        if not from_group_file:  # a key beside a group's file overrides the file's
            spelled[setting.key] = key
        if setting.key in found and _is_mapping(setting) and isinstance(value, dict):
            value = {**(found[setting.key].value or {}), **value}
        found[setting.key] = Given(value, where, rank)

    def take_file(key: str, name: str) -> None:
        base = layer.path.parent if layer.path else Path()
        path = base / name if (base / name).exists() else Path(name)
        try:
            nested = read_layer(path)
        except UserError as error:
            problems.append(f"{layer.where(key)}: {key} = {name}: {error}")
            return
        for inner, value in nested.values.items():
            take(f"{key}.{inner}", value, nested.where(str(inner)), from_group_file=True)

    def say(sentence: str) -> None:
        warnings.append(f"{layer.label}: {sentence}")

    # whole groups first: a key beside them is more specific than what their file says
    for key, value in sorted(stage.translate(layer.values, say).items(), key=lambda item: item[0] not in groups):
        take(str(key), value, layer.where(str(key)))
    if unused:
        parts = [f"{', '.join(map(repr, keys))} ({reason})" for reason, keys in unused.items()]
        first = next(iter(unused.values()))[0]
        warnings.append(f"{layer.where(first)}: no effect here: {'; '.join(parts)}")
    return found


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
        return "expected valid Unicode, found half a character"
    return None


def _brief(value: Any) -> str:
    """Returns a value as YAML has it, its middle left out where it is long."""
    if isinstance(value, int) and value.bit_length() > 400:
        return "a number of more than 100 digits"
    text = show(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 20]}...{text[-15:]}"


def _validate(stage: type[S], given: dict[str, Given]) -> tuple[S | None, list[str]]:
    tree: dict[str, Any] = {}
    for key, entry in given.items():
        *groups, name = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = entry.value
    try:
        return stage.model_validate(tree), []
    except ValidationError as error:
        return None, list(dict.fromkeys(_sentence(stage, detail, given) for detail in error.errors()))


def _sentence(stage: type[Settings], detail: ErrorDetails, given: dict[str, Given]) -> str:
    context = detail.get("ctx") or {}
    if "keys" in context:  # a contradiction between fields, raised by `conflict`
        prefix = "".join(f"{part}." for part in detail["loc"])
        places = [given[prefix + key].where for key in context["keys"] if prefix + key in given]
        return f"{places[-1] if places else 'defaults'}: {detail['msg']}"
    parts = [str(part) for part in detail["loc"]]
    setting = next((s for s in fields_of(stage) if list(s.path) == parts[: len(s.path)]), None)
    key = setting.key if setting else ".".join(parts)
    where = given[key].where if key in given else "defaults"
    inner = [part for part in parts[len(setting.path) :] if part not in TYPE_TAGS] if setting else []
    name = key + "".join(
        f"[{part}]" if part.isdigit() else f".{part}" for part in inner if part.isidentifier() or part.isdigit()
    )
    value = detail["input"]
    if detail["type"] == "literal_error":
        choices = [show(choice) for choice in (setting.choices if setting else ())]
        expected = f"expected one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    elif detail["type"] == "value_error":
        expected = str(context["error"])
    else:
        expected = detail["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    return f"{where}: {name} = {_brief(value)}: {expected}"


def _misplaced(settings: Settings, given: dict[str, Given]) -> dict[str, tuple[str, bool]]:
    """Returns the given keys whose condition does not hold: (sentence, whether it is an error).

    A value that only repeats the default is silent, and one whose condition a higher layer changed is dropped with a
    warning: both come from files that list everything.
    """
    misplaced: dict[str, tuple[str, bool]] = {}
    for setting in fields_of(type(settings)):
        condition, entry = setting.marker(When), given.get(setting.key)
        if condition is None or entry is None or setting.of(settings) == setting.default:
            continue
        other = next(s for s in fields_of(type(settings)) if s.path == (*setting.path[:-1], condition.field))
        actual = other.of(settings)
        if actual in condition.values:
            continue
        decider = given.get(other.key)
        overridden = decider is not None and decider.rank > entry.rank
        sentence = f"{entry.where}: {setting.key} applies only when {condition}, and {other.key} is {show(actual)}"
        misplaced[setting.key] = (sentence + ("; ignored" if overridden else ""), not overridden)
    return misplaced
