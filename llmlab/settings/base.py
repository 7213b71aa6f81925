"""What a setting is: a field of a small frozen pydantic model, whose annotated type carries everything else.

The markers here (`Trl`, `Alias`, `When`, `Panel`) are read by the loader, the command line, the schema, the docs and
the trainers.  Reading files and merging layers is in `sources.py`; the named types are in `vocabulary.py`.
"""

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from llmlab.settings.trust import TRAINER_ARGS, leaves


@dataclass(frozen=True)
class Trl:
    """The field of the TRL or Transformers configuration that this setting becomes, under the same meaning."""

    name: str


@dataclass(frozen=True)
class Alias:
    """Other accepted spellings: the other seed's, and Hugging Face's."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class When:
    """The setting is asked for, and valid, only when another field has one of these values."""

    field: str
    values: tuple[Any, ...]

    def __init__(self, field: str, *values: Any):
        object.__setattr__(self, "field", field)
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        return f"{self.field} is {' or '.join(show(value) for value in self.values)}"


class Settings(BaseModel):
    """The base of every settings class: unknown keys are errors and values never change after they were resolved."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    panel: ClassVar[str] = "Options"
    """Title under which help and docs show the fields that this class introduces."""

    inapplicable: ClassVar[dict[str, str]] = {}
    """Keys of the seeds that cannot mean anything here, and why: accepted from a file only, with one warning."""

    implied: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Keys without a field, and the values that say what the stage does anyway: accepted in silence."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Fields that say one thing in several units: the one of the last layer wins."""

    relatives: ClassVar[tuple[str, ...]] = ()
    """Classes (`module:name`) whose keys may stand in one file with this one's: they are named in one warning."""

    @classmethod
    def translate(cls, values: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Returns a layer's values with keys that have no field of their own put into this class's words.

        Args:
            values: of the layer.
            say: takes a sentence about how a value was read, where that is not obvious.
        """
        return values

    @classmethod
    def why_inapplicable(cls, key: str) -> str | None:
        """Returns why a key of the seeds has no effect in this stage, or None where the key is unknown."""
        for base in cls.__mro__:
            if key in vars(base).get("inapplicable", {}):
                return vars(base)["inapplicable"][key]
        return cls.owners_elsewhere(key, spellings_of)

    @classmethod
    def owners_elsewhere(cls, key: str, keys_of: Callable[[type["Settings"]], Any]) -> str | None:
        """Returns to which of the relatives a key belongs, of those whose keys `keys_of` has it among."""
        modules = (path.partition(":") for path in cls.relatives)
        others = [getattr(import_module(module), name) for module, _, name in modules]
        owners = [other.panel for other in others if other is not cls and key in keys_of(other)]
        return f"belongs to {' and '.join(owners)}" if owners else None

    def recorded(self) -> dict[str, Any]:
        """Returns plain values for a run's record, which the run can be resumed with."""
        values = self.model_dump(mode="json")
        if TRAINER_ARGS in values:  # what sends data off this machine is said anew each time
            kept = {name: value for name, value in values[TRAINER_ARGS].items() if not leaves(name, value)}
            values[TRAINER_ARGS] = kept
        return values

    def trainer_arguments(self) -> dict[str, Any]:
        """Returns the arguments of the TRL or Transformers configuration that the `Trl` markers name."""
        named = ((setting.marker(Trl), setting.of(self)) for setting in fields_of(type(self)))
        return {trl.name: value for trl, value in named if trl is not None and value is not None}


@dataclass(frozen=True)
class Setting:
    """One field as the command line, the docs and the loader see it.

    `path` is the dotted name (`model.d_model` for a field of the nested model settings), `owner` the class that
    introduces the field.
    """

    path: tuple[str, ...]
    info: FieldInfo
    owner: type[Settings]

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def type(self) -> Any:
        return self.info.annotation

    @property
    def help(self) -> str:
        return self.info.description or ""

    @property
    def default(self) -> Any:
        return self.info.get_default(call_default_factory=True)

    @property
    def shown_default(self) -> str:
        """The default in a reader's words."""
        return "required" if self.info.is_required() else show(self.default)

    def of(self, settings: Settings) -> Any:
        """Returns the value that these settings give it."""
        value: Any = settings
        for name in self.path:
            value = getattr(value, name)
        return value

    def marker(self, kind: type) -> Any:
        return next((mark for mark in self.info.metadata if isinstance(mark, kind)), None)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every accepted name, the stage's own first."""
        aliases = [name for mark in self.info.metadata if isinstance(mark, Alias) for name in mark.names]
        trl = self.marker(Trl)
        names = [self.name, *aliases, *([trl.name] if trl else ())]
        return tuple(dict.fromkeys(names))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a `Literal` type, or nothing where the type is open."""
        options = [self.type, *typing.get_args(self.type)]
        return tuple(
            value for part in options if typing.get_origin(part) is Literal for value in typing.get_args(part)
        )

    @property
    def type_name(self) -> str:
        """The type in a reader's words: `float`, `int or none`, `rope | alibi`."""
        return describe_type(self.type)


def describe_type(annotation: Any) -> str:
    """Returns the type in a reader's words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " | ".join(show(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments)
    if origin in (list, tuple):
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "none"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return getattr(annotation, "type_name", "mapping")
    return {"str": "text", "bool": "true | false"}.get(annotation.__name__, annotation.__name__)


def show(value: Any) -> str:
    """Returns a value as a person would write it in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(part)}" for key, part in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def fields_of(stage: type[Settings]) -> tuple[Setting, ...]:
    """Returns the settings of a class, nested groups unfolded: its own first, then those it composes."""
    return tuple(sorted(_walk(stage, ()), key=lambda setting: setting.owner is not stage))


def _walk(stage: type[Settings], prefix: tuple[str, ...]) -> Iterator[Setting]:
    for name, info in stage.model_fields.items():
        if is_group(info.annotation):
            yield from _walk(info.annotation, (*prefix, name))
        else:
            owner = next(base for base in reversed(stage.__mro__) if name in getattr(base, "model_fields", {}))
            yield Setting((*prefix, name), info, owner)


def is_group(annotation: Any) -> bool:
    """Whether a field's type is itself a settings class (such as `model`), whose fields have names of their own."""
    return isinstance(annotation, type) and issubclass(annotation, Settings)


@cache
def spellings_of(stage: type[Settings]) -> dict[str, Setting]:
    """Returns every accepted key of a stage: dotted paths, names, then aliases; a field's own name wins."""
    table: dict[str, Setting] = {}
    settings = fields_of(stage)
    for names in (lambda s: [s.key], lambda s: [s.name], lambda s: s.spellings):
        for setting in settings:
            for name in names(setting):
                table.setdefault(name, setting)
    for setting in settings:
        for name in setting.spellings:
            table.setdefault(".".join((*setting.path[:-1], name)), setting)
    return table
