"""What a whole run shows, judged from its metrics, events and settings, and the settings that the guides would change.
Pure functions of plain histories. Events are what `checks` found while it trained; actions are in `symptoms.yaml`.
Source: RL guide, section 6; LLM-Lab document, "Learning Rate Selection" and "Troubleshooting"."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from llmlab.health.symptoms import Event, changes_of, load_table
from llmlab.settings.base import Settings, fields_of
from llmlab.settings.errors import SettingsError
from llmlab.settings.files import Layer
from llmlab.settings.sources import resolve

URGENCY = (  # a setting that two conditions change follows the first of them
    *("unstable", "drift", "reward_hacking", "regression", "collapse", "alike", "overfitting", "preference", "data"),
    *("underfitting", "reward_flat"),
)
PAIRS, ONLINE = ("dpo", "orpo", "reward"), ("ppo", "grpo")
FEWEST, FEWEST_REWARDS = 5, 10  # logged values that show a trend; rewards are noisier
RISE, EXPLOSION = 1.02, 1.2  # of the validation loss over its best, of the training loss over its lowest
SPIKE = 1.5  # of the training loss over its median, and twice its lowest so far
HARDLY = 0.05  # relative fall of a loss that hardly falls, or that still falls well at the end of a run
SMALL_LOSS = 0.3  # nats per token: little is left to fall
ALIKE, BEST_REWARD = 0.6, 0.95  # share of groups of equal rewards; a reward that needs no more
EVENTS_SHOWN = 3  # of one symptom
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class History:
    """A run: stage, settings, curves of its metrics as (step, value), events, how it ended, and its last metrics."""

    stage: str
    settings: Any
    curves: Mapping[str, Curve]
    events: Sequence[Event] = ()
    status: str = "finished"
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def curve(self, name: str, fewest: int = FEWEST) -> Curve:
        """Returns a metric's curve, or nothing where it has too few values."""
        found = self.curves.get(name, ())
        return found if len(found) >= fewest else ()


def diagnose(run: History) -> dict[str, list[str]]:
    """Returns condition of `symptoms.yaml` -> sentences with the numbers and steps that show it, the most urgent
    first; trends are judged from five logged values on, those of rewards from ten."""
    found: dict[str, list[str]] = {name: [] for name in URGENCY}
    symptoms = load_table()[0]
    for name in dict.fromkeys(event.symptom for event in run.events if event.symptom in symptoms):
        events = [event for event in run.events if event.symptom == name]
        lines = [f"step {event.step}: {'; '.join(filter(None, (event.message, event.action)))}" for event in events]
        more = [f"and {len(lines) - EVENTS_SHOWN} more such events"] if len(lines) > EVENTS_SHOWN else []
        found[symptoms[name].condition] += [*lines[:EVENTS_SHOWN], *more]
    for judge in (_instability, _overfitting, _underfitting, _rewards, _preferences, _sources):
        for condition, sentence in judge(run):
            found[condition].append(sentence)
    return {name: sentences for name, sentences in found.items() if sentences}


def propose(kind: type[Settings], own: dict[str, Any], conditions: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Returns present and next values by dotted key: the conditions' changes that are valid together. `own` are the
    settings that the run did not leave at their defaults, nested."""
    settings = resolve(kind, Layer("run", own)).settings
    keys = {setting.name: setting.key for setting in reversed(fields_of(kind))}
    changes: dict[str, tuple[Any, Any]] = {}
    for name, values in (pair for each in conditions for pair in changes_of(each, settings).items()):
        trial = {key: after for key, (_, after) in changes.items()} | {keys[name]: values[1]}
        try:
            valid = not resolve(kind, Layer("run", changed(own, trial))).warnings
        except SettingsError:
            valid = False
        if valid and keys[name] not in changes:
            changes[keys[name]] = values
    return changes


def own_settings(kind: type[Settings], recorded: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Returns those of a run's recorded settings that are neither defaults nor implied by others, nested."""
    values: dict[str, Any] = {}
    for setting in fields_of(kind):
        value: Any = recorded
        for name in setting.path:
            value = value.get(name, ...) if isinstance(value, Mapping) else ...
        if value is not ... and sources.get(setting.key, "default") not in ("default", "implied"):
            values = changed(values, {setting.key: value})
    return values


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values with others at these dotted keys."""
    result = dict(values)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        result[first] = changed(result.get(first) or {}, {rest: value}) if rest else value
    return result


def _ends(curve: Curve, share: int = 5) -> tuple[float, float, float]:
    """Returns the means of a curve's first and last part, and the standard error of their difference."""
    values = [value for _, value in curve]
    part = max(len(values) // share, 1)
    first, last = values[:part], values[-part:]
    noise = math.sqrt((statistics.pvariance(first) + statistics.pvariance(last)) / part)
    return statistics.fmean(first), statistics.fmean(last), noise


Findings = Iterator[tuple[str, str]]
"""Conditions, and sentences that show them."""


def _instability(run: History) -> Findings:
    if run.status == "diverged":
        yield "unstable", run.reason or "a loss, gradient or weight was not finite"
    loss = run.curve("loss")
    if loss and run.stage not in ONLINE:
        part, values = max(len(loss) // 5, 3), [value for _, value in loss]
        noise = 4 * statistics.median(abs(b - a) for a, b in pairwise(values)) / math.sqrt(part)
        means = [statistics.fmean(values[at : at + part]) for at in range(len(loss) - part + 1)]
        lowest = min(range(len(means)), key=means.__getitem__)
        if means[-1] > EXPLOSION * means[lowest] and means[-1] - means[lowest] > max(HARDLY, noise):
            where = f"from {means[lowest]:.4g} around step {loss[lowest + part // 2][0]}"
            yield "unstable", f"training loss rose {where} to {means[-1]:.4g} at the end"
        lows = [min(loss[: at + 1], key=lambda point: point[1]) for at in range(len(loss))]
        pairs = zip(lows, loss, strict=True)
        (start, low), (step, peak) = max(pairs, key=lambda pair: pair[1][1] / max(pair[0][1], 1e-9))
        usual = max(2 * low, SPIKE * statistics.median(values))
        if run.stage not in PAIRS and peak > usual and peak - low > SMALL_LOSS:  # losses of pairs approach 0
            yield "unstable", f"training loss jumped from {low:.4g} at step {start} to {peak:.4g} at step {step}"


def _overfitting(run: History) -> Findings:
    evaluated, loss = run.curve("eval_loss", 2), run.curve("loss", 2)
    if not evaluated or not loss or run.stage in ONLINE:
        return
    (step, best), (end, last), now = min(evaluated, key=lambda point: point[1]), evaluated[-1], _ends(loss)[1]
    before = next((value for at, value in reversed(loss) if at <= step), now)
    if last > RISE * best and last - best > 0.01 and now < before:
        words = f"validation loss rose from {best:.4g} at step {step}, its best, to {last:.4g} at step {end}"
        yield "overfitting", f"{words}, while the training loss fell from {before:.4g} to {now:.4g}"


def _underfitting(run: History) -> Findings:
    if run.status != "finished":  # it was still to learn, at rates that were still to come
        return
    loss, evaluated, entropy = run.curve("loss"), run.curve("eval_loss", 2), run.metrics.get("unigram_entropy")
    if loss and run.stage in ("pretrain", "sft", *PAIRS):
        first, last, settings = loss[0][1], _ends(loss)[1], run.settings
        lora = getattr(settings, "use_lora", False)
        adapters = f", with adapters of rank {settings.lora_r} ({settings.lora_preset})" if lora else ""
        if 0 <= first - last < HARDLY * first and last > SMALL_LOSS:
            words = f"training loss fell by {1 - last / first:.1%} alone, from {first:.4g} to {last:.4g}"
            yield "underfitting", f"{words} in {loss[-1][0]:,} steps{adapters}"
    if evaluated and run.stage in ("pretrain", "sft"):
        (end, last), late = evaluated[-1], [point for point in evaluated if point[0] >= 0.75 * evaluated[-1][0]]
        if entropy and last > (1 - HARDLY) * entropy:
            words = f"validation loss {last:.4g} is hardly below the entropy of token counts, {entropy:.4g}"
            yield "underfitting", words
        step, before = late[0]
        if before - last > HARDLY * before and last > SMALL_LOSS:
            words = f"validation loss still fell by {1 - last / before:.1%} from step {step} to the end"
            yield "underfitting", f"{words}, step {end} ({before:.4g} to {last:.4g})"


def _rewards(run: History) -> Findings:
    if run.stage not in ONLINE or run.metrics.get("reward", 0.0) >= BEST_REWARD:
        return
    if run.status == "finished" and (curve := run.curve("reward", FEWEST_REWARDS)):
        before, after, noise = _ends(curve, 3)
        if after - before <= max(2 * noise, 0.02 * abs(before)):
            words = f"reward went from {before:.4g} to {after:.4g} in {curve[-1][0]:,} steps"
            yield "reward_flat", f"{words}, no more than its noise"
    if (alike := run.curve("zero_variance_share")) and (last := _ends(alike)[1]) > ALIKE:
        yield "alike", f"in {last:.0%} of the groups all completions have the same reward"


def _preferences(run: History) -> Findings:
    loss, wins = run.curve("loss"), run.curve("eval_win_rate", 2) or run.curve("win_rate")
    if run.stage == "dpo" and loss and wins:
        (first, last, _), (before, after, _) = _ends(loss), _ends(wins)
        if last < 0.9 * first and after <= before + 0.01:
            words = f"training loss fell from {first:.4g} to {last:.4g}"
            yield "preference", f"{words}, and the win rate went from {before:.1%} to {after:.1%}"


def _sources(run: History) -> Findings:
    whole = run.curve("eval_loss", 2)
    for name, curve in run.curves.items():
        falls = whole and whole[-1][1] < (1 - HARDLY) * whole[0][1]
        if falls and name.startswith("eval_loss/") and len(curve) > 1 and curve[-1][1] > 0.99 * curve[0][1]:
            words = f"loss of {name.partition('/')[2]} went from {curve[0][1]:.4g} to {curve[-1][1]:.4g}"
            yield "data", f"{words}, of all sources from {whole[0][1]:.4g} to {whole[-1][1]:.4g}"
