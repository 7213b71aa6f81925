"""The reward for staying inside guardrails: denied patterns and allow-lists.

Which ones is data, `guardrails.yaml` here and files of the same form; none of it is code. Patterns cannot tell use
from mention: a training signal, not a safeguard.
"""

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import regex
import yaml
from annotated_types import Le
from pydantic import AfterValidator, BaseModel, ValidationError

from llmlab.rewards.completions import Completion, model_text
from llmlab.rewards.function import Row, reward_function
from llmlab.rewards.matching import compile_pattern, time_limit
from llmlab.settings.errors import SettingsError, UserError, reading
from llmlab.settings.files import load_yaml
from llmlab.settings.paths import expand

SHIPPED = Path(__file__).with_name("guardrails.yaml")
FLAGS = regex.IGNORECASE | regex.MULTILINE
Pattern = Annotated[str, AfterValidator(lambda text: compile_pattern(text, "pattern", FLAGS))]


class Deny(BaseModel, extra="forbid"):
    """A pattern that must not occur."""

    name: str
    pattern: Pattern


class Allow(BaseModel, extra="forbid"):
    """A pattern; whatever it finds must be in the list, itself or as a subdomain through `*.domain`."""

    name: str
    find: Pattern
    only: tuple[str, ...]

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
        names = []
        for rule in self.deny:
            with time_limit(rule.pattern.pattern) as timeout:
                names += [rule.name] if rule.pattern.search(text, timeout=timeout) else []
        for rule in self.allow:
            with time_limit(rule.find.pattern) as timeout:
                words = [match[match.re.groups > 0] for match in rule.find.finditer(text, timeout=timeout)]
            names += [rule.name] if any(word is not None and not rule.has(word) for word in words) else []
        return names


@reward_function(weight=2.0, low="violation", note="guardrails_broken")
def guardrail_pass(
    completion: Completion,
    row: Row,
    *,
    file: str | None = None,
    defaults: bool = True,
    violation: Annotated[float, Le(0)] = 0.0,
) -> tuple[float, str]:
    """Scores whether everything the model wrote, its tool calls too, stays inside the guardrails.

    The names of broken guardrails go into TRL's table of completions.

    Args:
        file: a YAML file of guardrails of your own, of the form of `llmlab/rewards/guardrails.yaml`.
        defaults: include the shipped guardrails.
        violation: the score of a violation; -1 turns it into a penalty of the full weight, the guide's alternative.

    Returns:
        1 where no guardrail is broken, else `violation`.

    Source: seed, RL guide, section 3, "Extra important (or -2.0 penalty)".
    """
    rules = [read_guardrails(SHIPPED)] if defaults else []
    rules += [read_guardrails(expand(file))] if file else []
    if not any(rule.deny or rule.allow for rule in rules):
        raise UserError("there is no guardrail to watch for: expected a `file` that has some, or defaults = true")
    text = model_text(completion)
    broken = [name for rule in rules for name in rule.broken_by(text)]
    return float(violation) if broken else 1.0, ", ".join(broken)


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
