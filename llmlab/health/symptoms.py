"""The table of symptoms: how grave each is, and which settings the guides change about it (`symptoms.yaml`). Finding
symptoms in metrics is `checks`; what a run does about one is `llmlab.runs.health`."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from llmlab.settings.base import spellings_of
from llmlab.settings.files import is_number, read_table
from llmlab.settings.optimizer import OWN_RATES

Severity = Literal["warning", "critical"]


@dataclass(frozen=True)
class Event:
    """One finding of a check in a run: a symptom, the metric that shows it, where, and what was done about it."""

    step: int
    symptom: str
    metric: str
    value: float
    message: str
    """One sentence with numbers and steps."""
    severity: Severity = "warning"
    action: str = ""
    """What the run did: nothing, or such as `rolled back to checkpoint-40; learning_rate 0.001 -> 0.0005`."""
    since: int | None = None
    """The first step at which it shows, where a check knows."""


@dataclass(frozen=True)
class Change:
    """The next value of one setting: `times` and `plus` the present one, or `to` a value."""

    setting: str
    times: float = 1.0
    plus: float = 0.0
    to: Any = None
    source: Any = None
    """The only value that is changed `to` another; None is any."""
    at_least: float | None = None
    at_most: float | None = None

    def apply(self, value: Any) -> Any:
        """Returns the next value, of the present one's type; the present one where it cannot change further."""
        if self.to is not None:
            return self.to if self.source in (None, value) else value
        if not is_number(value):
            return value
        after = value * self.times + self.plus
        after = after if self.at_least is None else max(after, self.at_least)
        after = after if self.at_most is None else min(after, max(self.at_most, value))
        if self.times < 1:  # a bound never turns a smaller value into a larger one
            after = min(after, value)
        return round(after) if isinstance(value, int) else float(f"{after:.3g}")


@dataclass(frozen=True)
class Condition:
    """What several symptoms have in common, and the actions of the guides."""

    title: str
    changes: tuple[Change, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Symptom:
    """What one check finds."""

    name: str
    severity: Severity
    condition: str
    title: str
    metrics: tuple[str, ...] = ()
    """Patterns of the metrics that show it."""
    check: str = ""
    """The function in `checks` that finds it, if not that of its name."""
    limit: str = ""
    """The limit in the settings, if not that of its name."""
    online: bool | None = None
    """Whether it means something in stages that sample alone, or in all others alone; None is both."""


@cache
def load_table() -> tuple[dict[str, Symptom], dict[str, Condition]]:
    """Returns symptoms and conditions by name."""
    table, conditions = read_table("llmlab.health", "symptoms"), {}
    for name, entry in table["conditions"].items():
        changes = tuple(Change(**each) for each in entry["changes"])
        conditions[name] = Condition(entry["title"], changes, tuple(entry["advice"]))
    return {name: Symptom(name=name, **entry) for name, entry in table["symptoms"].items()}, conditions


def changes_of(condition: str, settings: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the present and the next value of each setting that a condition changes, by the stage's own spelling."""
    found: dict[str, tuple[Any, Any]] = {}
    spellings = spellings_of(type(settings))
    changes = [(change.setting, change) for change in load_table()[1][condition].changes]
    changes += [(rate, change) for name, change in changes if name == "learning_rate" for rate in OWN_RATES]
    for name, change in changes:
        spelling = spellings.get(name)
        if spelling is None or (name.startswith("lora_") and not settings.use_lora):
            continue
        value = spelling.of(settings)
        after = change.apply(value)
        if after != value:
            found[spelling.name] = (value, after)
    return found
