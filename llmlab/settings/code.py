"""A user's own Python files, named by settings as `path/to/file.py:name`: they run only where that is allowed."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmlab.settings.errors import UserError, did_you_mean, reason_of
from llmlab.settings.paths import expand

NOT_ALLOWED = "this is Python code, which runs when loaded; --allow-code (allow_code=True) allows it"


def find_code(spec: str, allow_code: bool, folder: str | Path = ".") -> tuple[Path, str]:
    """Returns the file and the name in `path/to/file.py:name`; relative paths start at `folder`."""
    file, _, name = spec.rpartition(":")
    path = Path(folder) / expand(file)
    if not path.is_file():
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"{path}: there is no such file{near}")
    if not allow_code:
        raise UserError(NOT_ALLOWED)
    return path, name


def run_file(path: Path, name: str, kind: str) -> Callable[..., Any]:
    """Runs a user's Python file and returns its function or class of this name; `kind` is the word for errors."""
    module_name = f"llmlab_user_code_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:  # a user's code can fail in any way
        raise UserError(f"{path}: cannot be loaded: {type(error).__name__}: {reason_of(error)}") from error
    target = getattr(module, name, None)
    if not callable(target):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{path}: there is no {kind} '{name}' in it{did_you_mean(name, names)}")
    return target
