"""Reads and writes configuration files, and remembers the line of every key.

YAML, JSON, and a Python file of literal assignments (as guides print them) are data here: nothing in them is ever
executed.  What the keys mean is `sources.py`'s business.
"""

import ast
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llmlab.settings.errors import SettingsError, UserError, did_you_mean, reading

NAMED_MAPPINGS = ("rewards", "reward_weights")
LONGEST_SHOWN = 60  # characters of a value in an error
DEEPEST = 50  # levels of nesting in a file of settings
MOST = 100_000  # values in it, each alias counted with all that it stands for


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2's floats, so that `5e-6` is a number, and with dates as text."""


OURS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in OURS]
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
    """One source of values: a file, a preset, or the command line.

    `lines` maps a key (dotted where nested) to its line in the file; `path` is the file, or None.
    """

    label: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    path: Path | None = None

    def where(self, key: str) -> str:
        """Returns `file:line` for a key of a file, else the label."""
        line = self.lines.get(key)
        return f"{self.label}:{line}" if line else self.label

    def section(self, key: str) -> "Layer":
        """Returns the mapping under a key as a layer of its own, lines kept."""
        lines = {name[len(key) + 1 :]: line for name, line in self.lines.items() if name.startswith(f"{key}.")}
        return Layer(self.label, self.values[key] or {}, lines, self.path)


def read_layer(path: str | Path) -> Layer:
    """Reads a `.yaml`, `.yml`, `.json` or `.py` file that holds one mapping.

    Raises:
        UserError: the file is missing, unreadable, not of these kinds, or does not hold a mapping.
        SettingsError: a key stands twice.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: this is a device or a pipe; expected a file")
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
        values, lines = readers[path.suffix](text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    return Layer(str(path), values, lines, path)


def parse_scalar(text: str, key: str = "a value") -> Any:
    """Reads one command-line value as YAML would: `1e-4`, `true`, `[a, b]`, `{key: 1}`."""
    with reading(f"command line: {key} = {text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + '...'}"):
        try:
            return load_yaml(text)
        except yaml.YAMLError:
            return text


def load_yaml(text: str) -> Any:
    """Returns the plain data of a YAML text.

    Raises:
        YAMLError: it is not YAML.
        ValueError: it is too deep, too large, or has a number that Python does not read.
    """
    value = yaml.load(text, _Loader)  # a SafeLoader subclass: nothing runs
    _check_extent(value)
    return value


def _check_extent(value: Any, most: float = MOST) -> None:
    """Raises ValueError for data that holds itself, is nested too deeply, or grows beyond measure by its aliases."""
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


def _read_yaml(text: str, path: Path) -> tuple[Any, dict[str, int]]:
    try:
        node = yaml.compose(text, _Loader)
        values = {} if node is None else load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: this is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: this is not valid YAML: {error}") from None
    lines: dict[str, int] = {}
    twice: list[str] = []

    def visit(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[f"{prefix}{index}"] = item.start_mark.line + 1
                visit(item, f"{prefix}{index}.")
        elif isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
                if key in lines:
                    twice.append(f"{path}:{line}: '{key}' stands here again; it was first set on line {lines[key]}")
                lines.setdefault(key, line)
                visit(value_node, f"{key}.")

    if node is not None:
        visit(node, "")
    if twice:
        raise SettingsError(twice)
    return values, lines


def _read_json(text: str, path: Path) -> tuple[Any, dict[str, int]]:
    try:
        values = json.loads(text)
        _check_extent(values)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: this is not valid JSON: {error.msg}") from None
    try:  # JSON is YAML but for tabs: lines come from the YAML reader where it can read the text
        return values, _read_yaml(text.replace("\t", " "), path)[1]
    except SettingsError:
        raise
    except UserError:
        return values, {}


def _read_python(text: str, path: Path) -> tuple[Any, dict[str, int]]:
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: this is not valid Python: {error.msg}") from None
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    twice: list[str] = []
    for node in body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if not isinstance(node, (ast.Assign, ast.Expr)) or not (name or isinstance(node.value, ast.Dict)):
            raise UserError(f"{path}:{node.lineno}: expected name = {{...}} and nothing else; it is never executed")
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            raise UserError(
                f"{path}:{node.lineno}: only literal values are read from a Python file; it is never executed"
            ) from None
        # the name of a block says nothing, but for that of a setting whose value is the mapping
        if isinstance(node.value, ast.Dict) and name not in NAMED_MAPPINGS:
            places = [(str(ast.literal_eval(key)), key.lineno) for key in node.value.keys if key is not None]
            values |= value
        else:
            places = [(name, node.lineno)]
            values[name] = value
        for key, line in places:
            if key in lines:
                twice.append(f"{path}:{line}: '{key}' stands here again; it was first set on line {lines[key]}")
            lines.setdefault(key, line)
    if twice:
        raise SettingsError(twice)
    _check_extent(values)
    return values, lines


def read_json(path: str | Path, shape: type = dict) -> Any:
    """Returns what a JSON file holds, checked to be a mapping or list.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    path = Path(path)
    with reading(path, "JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_extent(value, most=math.inf)
    if not isinstance(value, shape):
        raise UserError(
            f"{path}: expected a JSON {'list' if shape is list else 'object'}, found {type(value).__name__}"
        )
    return value


def finite(value: Any) -> Any:
    """Returns plain values with what JSON has no word for (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_types(subject: str | Path, values: dict[str, Any], types: dict[str, Any]) -> None:
    """Checks values that a file gives some library against the types that the library declares.

    Args:
        subject: the file, or the setting that holds the values.
        values: by name; names without a type pass.
        types: by name, such as `typing.get_type_hints` of a configuration class.

    Raises:
        UserError: a value is of another type.
    """
    for name in sorted(values.keys() & types.keys()):
        try:
            TypeAdapter(types[name]).validate_python(values[name])
        except ValidationError as error:
            expected = error.errors()[0]["msg"].replace("Input should be", "expected")
            shown = repr(values[name])
            shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
            raise UserError(f"{subject}: {name} = {shown}: {expected}") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name beside it, then renames it: readers never see half of it.

    A link is followed, and what is no regular file (`/dev/null`, a pipe) is written as it is, never replaced.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
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
        except BaseException:
            os.unlink(temporary)
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
