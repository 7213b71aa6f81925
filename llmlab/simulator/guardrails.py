"""Guardrails: denied patterns and allow-lists, and the time limit under which patterns run on what models write. Which
ones is data: `guardrails.yaml` for all that a model writes, `tool_guardrails.yaml` for the arguments of tools, and
files of the same form. Patterns cannot tell use from mention: a training signal, not a safeguard."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import regex
import yaml
from pydantic import AfterValidator, BaseModel, ValidationError

from llmlab.settings.errors import SettingsError, UserError, reading
from llmlab.settings.files import load_yaml

SHIPPED = Path(__file__).with_name("guardrails.yaml")
SHIPPED_FOR_TOOLS = Path(__file__).with_name("tool_guardrails.yaml")
FLAGS = regex.IGNORECASE | regex.MULTILINE
TIMEOUT = 1.0  # seconds that one pattern may take on one text


class SlowPattern(UserError):
    """A pattern that took longer on a text than it may."""


def compile_pattern(pattern: str, where: str, flags: int, error_type: type[UserError] = UserError) -> Any:
    """Compiles a pattern of the `regex` module, which keeps compiled ones; `where` names it in the error."""
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise error_type(f"{where} = {pattern}: this is not a regular expression: {error}") from None


@contextmanager
def time_limit(pattern: str) -> Iterator[float]:
    """Yields the `timeout` of a search, and names the pattern that exceeds it."""
    try:
        yield TIMEOUT
    except TimeoutError:
        advice = "catastrophic backtracking; avoid repeats inside repeats such as (a|aa)+"
        raise SlowPattern(f"pattern = {pattern}: took over {TIMEOUT:g} s on this completion: {advice}") from None


Pattern = Annotated[str, AfterValidator(lambda text: compile_pattern(text, "pattern", FLAGS))]


class Deny(BaseModel, extra="forbid"):
    """A pattern that must not occur."""

    name: str
    pattern: Pattern

    def breaks(self, text: str) -> bool:
        """Whether it occurs in a text."""
        with time_limit(self.pattern.pattern) as timeout:
            return self.pattern.search(text, timeout=timeout) is not None


class Allow(BaseModel, extra="forbid"):
    """A pattern; whatever it finds must be in the list, itself or as a subdomain through `*.domain`."""

    name: str
    find: Pattern
    only: tuple[str, ...]

    def breaks(self, text: str) -> bool:
        """Whether a text has something that is not in the list."""
        with time_limit(self.find.pattern) as timeout:
            found = (match[match.re.groups > 0] for match in self.find.finditer(text, timeout=timeout))
            return any(word is not None and not self.has(word) for word in found)

    def has(self, word: str) -> bool:
        """Whether the list holds this word, whatever its case."""
        word, entries = word.lower(), [entry.lower() for entry in self.only]
        return any(word == entry or (entry.startswith("*.") and word.endswith(entry[1:])) for entry in entries)


class Guardrails(BaseModel, extra="forbid"):
    """A guardrail file."""

    deny: tuple[Deny, ...] = ()
    allow: tuple[Allow, ...] = ()

    def broken_by(self, text: str) -> list[str]:
        """Returns the names of the guardrails that a text breaks."""
        return [rule.name for rule in (*self.deny, *self.allow) if rule.breaks(text)]


def read_guardrails(path: Path) -> Guardrails:
    """Reads a guardrail file."""
    with reading(f"file = {path}", "YAML"):
        return _parse(path.read_text(encoding="utf-8"), path)


@lru_cache(maxsize=16)
def _parse(text: str, path: Path) -> Guardrails:
    try:
        return Guardrails.model_validate(load_yaml(text))
    except yaml.YAMLError as error:
        raise UserError(f"file = {path}: this is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise SettingsError(
            f"{path}: {'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors()
        ) from None
