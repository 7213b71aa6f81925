"""What a setting is: a field of a small frozen pydantic class whose annotated type holds everything else about it. The
loader, command line, schema, docs, trainers and run records read the markers here, and nothing else."""

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, reduce
from importlib import import_module
from typing import Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic.fields import FieldInfo

from llmlab.settings import CLASSES, settings_class
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import read_table
from llmlab.settings.trust import REPORT_TO, TRAINER_ARGS, leaves_machine, remote_services


@dataclass(frozen=True)
class Trl:
    """The field of the TRL or Transformers configuration that this setting becomes."""

    name: str


class Alias:
    """Other accepted spellings: the other seed's, and Hugging Face's."""

    def __init__(self, *names: str):
        self.names = names


class When:
    """The setting is valid only when another field has one of these values, or any value where there are none."""

    def __init__(self, field: str, *values: Any):
        self.field, self.values = field, values

    def holds(self, value: Any) -> bool:
        return value in self.values if self.values else value is not None

    def __str__(self) -> str:
        return f"{self.field} is {' or '.join(map(show, self.values)) or 'set'}"


class Resume(Enum):
    """Whether a resumed run may have another value than its record: marks a type, or all fields of a class."""

    FIXED = "no: the weights or the order of the data depend on it"
    NEW_OPTIMIZER = "only with --no-load-optimizer"
    SPLIT = "as long as the rows of one optimizer step over all processes stay"
    FREE = "yes"
    LOCAL = "yes, and it changes nothing that the run computes: comparisons and pipelines ignore it"


def Help(text: str) -> Any:
    """The help of a type that unrelated classes share; all other fields have a docstring."""
    return Field(description=text)


class Settings(BaseModel):
    """The base of every settings class: unknown keys are errors, and resolved values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,
    )

    panel: ClassVar[str] = "Options"
    """Title under which help and docs show the fields that this class introduces."""

    resume: ClassVar[Resume] = Resume.FIXED
    """Of the fields that this very class introduces, unless their types say otherwise."""

    inapplicable: ClassVar[dict[str, str]] = {}
    """Keys of the seeds that cannot mean anything here, and why: accepted from a file, with a warning."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Fields for one quantity in several units; the first follows from the others. The last layer's choice holds."""

    sibling_classes: ClassVar[tuple[str, ...]] = ()
    """Classes (`module:name`) whose keys may stand in the same file; those that have no effect here are warned of."""

    type_name: ClassVar[str] = "mapping"
    """What errors and help call a value of this class."""

    def __init_subclass__(cls, **facts: Any) -> None:
        """Takes the above from a class's header."""
        for name, value in facts.items():
            setattr(cls, name, value)

    @classmethod
    def __pydantic_init_subclass__(cls, **facts: Any) -> None:
        """Lets fields that only change a default keep their help."""
        for name, info in cls.model_fields.items():
            declared = [base.model_fields[name] for base in cls.__mro__ if name in getattr(base, "model_fields", {})]
            info.description = next((field.description for field in declared if field.description), None)

    def contradictions(self) -> Iterator[str]:
        """Yields a sentence for what is wrong between the fields of this very class; bases are asked by themselves."""
        yield from ()

    @model_validator(mode="after")
    def check_contradictions(self) -> "Settings":
        problems: list[str] = []
        for base in (base for base in reversed(type(self).__mro__) if "contradictions" in vars(base)):
            try:
                problems.extend(base.contradictions(self))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError(problems)
        return self

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Rewrites in place those keys of a layer that have no field of their own but mean one of this class."""

    @classmethod
    def reason_without_effect(cls, key: str) -> str | None:
        """Returns why a key of the seeds has no effect in this stage, or None where the key is unknown."""
        for base in cls.__mro__:
            if key in vars(base).get("inapplicable", {}):
                return vars(base)["inapplicable"][key]
        return cls.relative_with(key, spellings_of)

    @classmethod
    def relative_with(cls, key: str, keys_of: Callable[[type["Settings"]], Any]) -> str | None:
        """Returns a phrase that names the sibling_classes with this key, or None."""
        modules = (path.partition(":") for path in cls.sibling_classes)
        others = [getattr(import_module(module), name) for module, _, name in modules]
        owners = [other.panel for other in others if other is not cls and key in keys_of(other)]
        return f"belongs to {' and '.join(owners)}" if owners else None

    def recorded(self) -> dict[str, Any]:
        """Returns plain values for a run's record, without what follows from others or must be confirmed each time."""
        values = self.model_dump(mode="json")
        for first, *others in self.alternatives:
            if any(values[name] is not None for name in others):
                del values[first]
        if TRAINER_ARGS in values:
            arguments = values[TRAINER_ARGS].items()
            values[TRAINER_ARGS] = {name: value for name, value in arguments if not leaves_machine(name, value)}
            remote = remote_services(values[REPORT_TO])
            values[REPORT_TO] = [name for name in values[REPORT_TO] if name not in remote]
        return values

    def trainer_arguments(self) -> dict[str, Any]:
        """Returns the arguments of the TRL or Transformers configuration that the `Trl` markers name."""
        named = ((setting.marker(Trl), setting.of(self)) for setting in fields_of(type(self)))
        return {trl.name: value for trl, value in named if trl is not None and value is not None}


def settings_of_table(name: str, module: str, doc: str, table: str, kind: Any, **facts: Any) -> type[Settings]:
    """Returns the settings class of a YAML table beside this module: names of fields of one type, default and help."""
    rows = read_table("llmlab.settings", table)
    fields: dict[str, Any] = {key: (kind, Field(default, description=text)) for key, (default, text) in rows.items()}
    return create_model(name, __base__=Settings, __module__=module, __doc__=doc, __cls_kwargs__=facts, **fields)


@dataclass(frozen=True)
class Setting:
    """One field: `path` is its name after those of its groups (`model`, `d_model`), `owner` its first class."""

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
        return " ".join((self.info.description or "").split())

    @property
    def default(self) -> Any:
        return self.info.get_default(call_default_factory=True)

    @property
    def shown_default(self) -> str:
        return "required" if self.info.is_required() else show(self.default)

    @property
    def resume(self) -> Resume:
        return self.marker(Resume) or vars(self.owner).get("resume", Resume.FIXED)

    @property
    def bounds(self) -> str:
        """The bounds of a number, such as `>= 0, < 1`."""
        signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        marks = [(sign, getattr(mark, name, None)) for mark in self.info.metadata for name, sign in signs]
        return ", ".join(f"{sign} {bound}" for sign, bound in marks if bound is not None)

    def of(self, settings: Settings) -> Any:
        """Returns the value that these settings give it."""
        return reduce(getattr, self.path, settings)

    def marker(self, kind: type) -> Any:
        return next((mark for mark in self.info.metadata if isinstance(mark, kind)), None)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every accepted name, the stage's own first."""
        aliases = [name for mark in self.info.metadata if isinstance(mark, Alias) for name in mark.names]
        trl = self.marker(Trl)
        return tuple(dict.fromkeys([self.name, *aliases, *([trl.name] if trl else [])]))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a `Literal` type; empty for any other."""
        parts = [part for part in (self.type, *typing.get_args(self.type)) if typing.get_origin(part) is Literal]
        return tuple(value for part in parts for value in typing.get_args(part))

    @property
    def type_name(self) -> str:
        """The type in a reader's words: `float`, `int or none`, `rope | alibi`."""
        return describe_type(self.type)


def describe_type(annotation: Any) -> str:
    """Returns a type in a reader's words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " | ".join(map(show, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if is_group(annotation):
        return annotation.type_name
    names = {str: "text", bool: "true | false", types.NoneType: "none"}
    return names.get(annotation, annotation.__name__)


def show(value: Any) -> str:
    """Returns a value as a person would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(part)}" for key, part in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def fields_of(stage: type[Settings]) -> tuple[Setting, ...]:
    """Returns the settings of a class, groups unfolded: its own first, then those of its bases."""
    order, found = {base: number for number, base in enumerate(stage.__mro__)}, []
    for name, info in stage.model_fields.items():
        if is_group(info.annotation):
            found += [replace(inner, path=(name, *inner.path)) for inner in fields_of(info.annotation)]
        else:
            owner = next(base for base in reversed(stage.__mro__) if name in getattr(base, "model_fields", {}))
            found.append(Setting((name,), info, owner))
    return tuple(sorted(found, key=lambda setting: order.get(setting.owner, 1)))


def local_names(stage: str) -> set[str]:
    """Returns the settings of a stage that change nothing it computes; empty for a stage of another version."""
    if stage not in CLASSES:
        return set()
    return {setting.name for setting in fields_of(settings_class(stage)) if setting.resume is Resume.LOCAL}


def is_group(annotation: Any) -> bool:
    """Whether a field's type is itself a settings class (such as `model`), whose fields have names of their own."""
    return isinstance(annotation, type) and issubclass(annotation, Settings)


@cache
def spellings_of(stage: type[Settings]) -> dict[str, Setting]:
    """Returns every accepted key of a stage: dotted paths, names, then aliases; a field's own name wins."""
    settings = fields_of(stage)[::-1]  # the first of those with the same alias has it
    table = {".".join((*setting.path[:-1], name)): setting for setting in settings for name in setting.spellings}
    table |= {name: setting for setting in settings for name in setting.spellings}
    table |= {setting.name: setting for setting in settings}
    return table | {setting.key: setting for setting in settings}
