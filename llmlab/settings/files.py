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

from llmlab.settings.errors import SettingsError, UserError, did_you_mean, reading

NAMED_MAPPINGS = ("rewards", "reward_weights")


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2's floats, so that `5e-6` is a number, and with duplicate keys as errors."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file{did_you_mean(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"{path}: cannot be read as settings: {reason}") from None
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json, ".py": _read_python}
    if path.suffix not in readers:
        raise UserError(f"{path}: settings files end in .yaml, .yml, .json or .py, not '{path.suffix}'")
    values, lines = readers[path.suffix](text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    return Layer(str(path), values, lines, path)


def parse_scalar(text: str) -> Any:
    """Reads one command-line value as YAML would: `1e-4`, `true`, `[a, b]`, `{key: 1}`."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader subclass: plain data only
    except yaml.YAMLError:
        return text


def _read_yaml(text: str, path: Path) -> tuple[Any, dict[str, int]]:
    try:
        node = yaml.compose(text, _Loader)
        values = {} if node is None else yaml.load(text, _Loader)
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
        except ValueError:
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
    return values, lines


def read_json(path: str | Path, shape: type = dict) -> Any:
    """Returns what a JSON file holds, checked to be a mapping or list.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    path = Path(path)
    with reading(path, "JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
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


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name beside it, then renames it: readers never see half of it.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
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
