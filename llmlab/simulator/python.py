"""Python code that a model wrote: only parsed, never imported or run."""

import ast
import warnings
from threading import Lock
from typing import Any

MAX_CHARACTERS = 100_000  # of code that is parsed
MAX_LINE = 100  # characters
_WARNINGS = Lock()  # `catch_warnings` changes the process


def parse_python(code: str, mode: str = "exec") -> Any:
    """Returns the syntax tree of a model's code, or None where Python cannot parse it."""
    if len(code) > MAX_CHARACTERS:
        return None
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's code
            return ast.parse(code, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def structure_of(code: str) -> str | None:
    """Returns `ast.dump` of a program, or None where it holds no statement or Python cannot parse it."""
    try:
        tree = parse_python(code)
        return ast.dump(tree) if tree is not None and tree.body else None
    except RecursionError:
        return None


def has_style(code: str) -> bool:
    """Whether code parses and keeps the style rules: spaces, none of them at the end of a line, no long lines."""
    tidy = all(len(line) <= MAX_LINE and line == line.rstrip() and "\t" not in line for line in code.split("\n"))
    return tidy and structure_of(code) is not None
