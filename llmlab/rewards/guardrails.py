"""The reward for staying inside guardrails: patterns that must not occur, and lists that found things must be in.

Which ones is data, `guardrails.yaml` here and files of the same form; none of it is code. A pattern cannot tell a
deed from its mention, so this is a training signal and no protection.
"""

from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Le
from pydantic import BaseModel, ConfigDict, ValidationError

from llmlab.rewards.completions import Completion, written
from llmlab.rewards.matching import compile_pattern, search_all
from llmlab.settings.errors import SettingsError, UserError, reading
from llmlab.settings.files import load_yaml
from llmlab.settings.paths import expand

SHIPPED = Path(__file__).with_name("guardrails.yaml")


class Deny(BaseModel):
    """A pattern that must not occur."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    pattern: str


class Allow(BaseModel):
    """A pattern, each find of which must be in the list."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    find: str
    only: tuple[str, ...]

    def has(self, found: str) -> bool:
        """Whether the list holds what was found, itself or through `*.domain`."""
        word, entries = found.lower(), [entry.lower() for entry in self.only]
        return any(word == entry or (entry.startswith("*.") and word.endswith(entry[1:])) for entry in entries)


class Guardrails(BaseModel):
    """What a guardrail file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    deny: tuple[Deny, ...] = ()
    allow: tuple[Allow, ...] = ()

    def broken_by(self, text: str) -> list[str]:
        """Returns the names of the guardrails that a text breaks."""
        names = [rule.name for rule in self.deny if any(True for _ in search_all(rule.pattern, text))]
        for rule in self.allow:
            found = (match[1] if match.re.groups else match[0] for match in search_all(rule.find, text))
            names += [rule.name] if any(word is not None and not rule.has(word) for word in found) else []
        return names


def guardrail_pass(
    completions: list[Completion],
    log_extra: Any = None,
    *,
    file: str | None = None,
    defaults: bool = True,
    violation: Annotated[float, Le(0)] = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Scores whether everything the model wrote, its tool calls too, stays inside the guardrails.

    Args:
        completions: texts or messages of the batch.
        log_extra: TRL's, given by its trainers: the names of broken guardrails go into the table of completions.
        file: a YAML file of guardrails of your own, of the form of `llmlab/rewards/guardrails.yaml`.
        defaults: watch for the shipped ones too.
        violation: the score of a violation; -1 makes it the guide's other reading, a penalty of the whole weight.
        columns: not used.

    Returns:
        1 where no guardrail is broken, else `violation`.

    Raises:
        UserError: the file cannot be read, is not of the form, or a pattern is wrong or takes too long.

    Source: seed, RL guide, section 3, "Extra important (or -2.0 penalty)".
    """
    rules = [read_guardrails(SHIPPED)] if defaults else []
    rules += [read_guardrails(expand(file))] if file else []
    if not any(rule.deny or rule.allow for rule in rules):
        raise UserError("there is no guardrail to watch for: expected a `file` that has some, or defaults = true")
    broken = []
    for row, completion in enumerate(completions):
        try:
            broken.append([name for rule in rules for name in rule.broken_by(written(completion))])
        except UserError as error:
            raise UserError(f"row {row}: {error}") from None
    if log_extra is not None:
        log_extra("guardrails_broken", [", ".join(names) for names in broken])
    return [float(violation) if names else 1.0 for names in broken]


def read_guardrails(path: Path) -> Guardrails:
    """Reads a guardrail file.

    Raises:
        UserError: it cannot be read, is not YAML, or a pattern is wrong.
        SettingsError: it is not of the form.
    """
    with reading(f"file = {path}", "YAML"):
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"file = {path}: this is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        rules = Guardrails.model_validate(values)
    except ValidationError as error:
        raise SettingsError(
            f"{path}: {'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg']}" for detail in error.errors()
        ) from None
    for name, pattern in [(rule.name, rule.pattern) for rule in rules.deny] + [(a.name, a.find) for a in rules.allow]:
        compile_pattern(pattern, f"{path}: {name}")
    return rules
