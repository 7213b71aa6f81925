"""Reads and writes configuration files, and remembers the line of every key. YAML, JSON and a Python file of literal
assignments (as guides print them) are data: nothing in them is executed. What keys mean is `sources.py`'s."""

import ast
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llmlab.settings.errors import SettingsError, UserError, did_you_mean, reading, shorten

NAMED_MAPPINGS = ("rewards", "reward_weights")  # settings whose value may be a mapping
DEEPEST = 50  # levels of nesting in a settings file
MOST = 100_000  # values in it, each alias counted with everything it stands for
OWN_TAGS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")

Places = list[tuple[str, int]]
"""Dotted keys and their lines, in the order of the file."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2's floats, so that `5e-6` is a number, and with dates as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in OWN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Layer:
    """One source of values: a file, a preset or the command line; `lines` maps dotted keys to lines of the file."""

    label: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    path: Path | None = None

    def where(self, key: str) -> str:
        """Returns `file:line` for a key of a file, else the label."""
        line = self.lines.get(key)
        return f"{self.label}:{line}" if line else self.label

    def section(self, key: str) -> "Layer":
        """Returns the mapping under a key as a layer with the same lines."""
        lines = {name[len(key) + 1 :]: line for name, line in self.lines.items() if name.startswith(f"{key}.")}
        return Layer(self.label, self.values[key] or {}, lines, self.path)


def read_layer(path: str | Path, listed: str | None = None) -> Layer:
    """Reads a `.yaml`, `.yml`, `.json` or `.py` file that holds one mapping, without duplicate keys, or a list, which
    becomes the value of the key `listed`."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: not a regular file (a device or a pipe)")
    with reading(path, "settings"):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            siblings = [sibling.name for sibling in path.parent.glob("*")] if path.parent.is_dir() else []
            raise UserError(f"{path}: there is no such file{did_you_mean(path.name, siblings)}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: cannot be read as settings: it is not text") from None
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json, ".py": _read_python}
    if path.suffix not in readers:
        raise UserError(f"{path}: settings files end in .yaml, .yml, .json or .py, not '{path.suffix}'")
    with reading(path, "settings"):
        values, places = readers[path.suffix](text, path)
        _check_extent(values)
    lines: dict[str, int] = {}
    twice = []
    for key, line in places:
        if key in lines:
            twice.append(f"{path}:{line}: '{key}' is a duplicate key, first set on line {lines[key]}")
        lines.setdefault(key, line)
    if twice:
        raise SettingsError(twice)
    if isinstance(values, list) and listed:
        values, lines = {listed: values}, {f"{listed}.{key}": line for key, line in lines.items()}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    return Layer(str(path), values, lines, path)


def parse_scalar(text: str, key: str = "a value") -> Any:
    """Reads one command-line value as YAML: `1e-4`, `true`, `[a, b]`, `{key: 1}`."""
    with reading(f"command line: {key} = {shorten(text)}"):
        try:
            return load_yaml(text)
        except yaml.YAMLError:
            return text


def load_yaml(text: str) -> Any:
    """Returns the plain data of a YAML text; raises YAMLError, or ValueError where it is too deep or too large."""
    value = yaml.load(text, _Loader)  # a SafeLoader subclass: nothing runs
    _check_extent(value)
    return value


def read_table(package: str, name: str) -> Any:
    """Returns what a YAML file beside the modules of a package holds, ten times as fast where libyaml is there."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(resources(package).joinpath(f"{name}.yaml").read_text(encoding="utf-8"), loader)


def _check_extent(value: Any, most: float = MOST) -> None:
    """Raises ValueError for data that contains itself, is nested too deeply, or grows beyond measure by aliases."""
    count, waiting = 0, [(value, 0)]
    while waiting:
        inner, depth = waiting.pop()
        count += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if count > most:
            raise ValueError(f"it holds more than {most:,} values, aliases counted")
        if isinstance(inner, dict):
            waiting += [(part, depth + 1) for part in inner.values()]
        elif isinstance(inner, (list, tuple)):
            waiting += [(part, depth + 1) for part in inner]


def _read_yaml(text: str, path: Path) -> tuple[Any, Places]:
    try:
        node = yaml.compose(text, _Loader)
        values = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or error
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: this is not valid YAML: {reason}") from None
    return ({} if node is None else values), list(_places(node))


def _places(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the dotted keys below a node with their lines; entries of a list have numbers as keys."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1
            yield from _places(item, f"{prefix}{index}.")
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _places(value, f"{prefix}{key.value}.")


def _read_json(text: str, path: Path) -> tuple[Any, Places]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: this is not valid JSON: {error.msg}") from None
    _check_extent(values)  # before the YAML reader, which is slow on what is too large
    try:  # JSON is YAML but for tabs: the lines come from the YAML reader where it can read the text
        return values, _read_yaml(text.replace("\t", " "), path)[1]
    except UserError:
        return values, []


def _read_python(text: str, path: Path) -> tuple[Any, Places]:
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: this is not valid Python: {error.msg}") from None
    values: dict[str, Any] = {}
    places: Places = []
    for node in body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if not isinstance(node, (ast.Assign, ast.Expr)) or not (name or isinstance(node.value, ast.Dict)):
            raise UserError(f"{path}:{node.lineno}: expected name = {{...}} and nothing else; it is never executed")
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            problem = "only literal values are read from a Python file; it is never executed"
            raise UserError(f"{path}:{node.lineno}: {problem}") from None
        # the name of a block means nothing, unless it is a setting whose value is the mapping
        if isinstance(node.value, ast.Dict) and name not in NAMED_MAPPINGS:
            places += [(str(ast.literal_eval(key)), key.lineno) for key in node.value.keys if key is not None]
            values |= value
        else:
            places.append((name, node.lineno))
            values[name] = value
    return values, places


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns what a JSON file holds, checked to be a mapping."""
    path = Path(path)
    with reading(path, "JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_extent(value, most=math.inf)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def finite(value: Any) -> Any:
    """Returns plain values with NaN and infinity, which JSON cannot spell, as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: Any) -> bool:
    """Whether a plain value is a number, no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_types(subject: str | Path, values: dict[str, Any], types: dict[str, Any]) -> None:
    """Raises UserError where a value that is passed on to a library has another type than the library declares.
    `types` are by name, such as `typing.get_type_hints` of a configuration class; values without a type pass."""
    for name in sorted(values.keys() & types.keys()):
        try:
            TypeAdapter(types[name]).validate_python(values[name])
        except ValidationError as error:
            expected = error.errors()[0]["msg"].replace("Input should be", "expected")
            raise UserError(f"{subject}: {name} = {shorten(repr(values[name]))}: {expected}") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name beside it, then renames it: readers never see half of it. A link is
    followed, and what is no regular file (a device, a pipe) is written to, never replaced."""
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                handle.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:  # such as a stop signal, even just after the renaming
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def dump(values: dict[str, Any], path: str | Path) -> None:
    """Writes plain values as JSON or YAML, by the file's ending."""
    path = Path(path)
    if path.suffix == ".json":
        text = json.dumps(values, indent=2) + "\n"
    elif path.suffix in (".yaml", ".yml"):
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119)
    else:
        raise UserError(f"{path}: settings are written as .json or .yaml, not '{path.suffix}'")
    write_atomically(path, text)
