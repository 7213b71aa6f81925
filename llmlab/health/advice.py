"""What a whole run shows, judged from its metrics, events and settings, and the settings that the guides would change.

Pure functions of plain histories.  Checks of a run while it trains are `checks`; the actions are in `symptoms.yaml`.
Source: RL guide, section 6; LLM-Lab document, "Learning Rate Selection" and "Troubleshooting".
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmlab.health.symptoms import Event, changes_of, load_table
from llmlab.settings.base import Settings, fields_of
from llmlab.settings.errors import SettingsError
from llmlab.settings.files import Layer
from llmlab.settings.sources import resolve

Curve = Sequence[tuple[int, float]]

# a setting that two conditions change in opposite directions follows the first of them
URGENCY = (
    *("unstable", "drift", "reward_hacking", "regression", "collapse", "alike", "overfitting", "preference", "data"),
    *("underfitting", "reward_flat"),
)
NEXT_TOKENS, PAIRS, ONLINE = ("pretrain", "sft"), ("dpo", "orpo", "reward"), ("ppo", "grpo")
FEWEST = 5  # logged values that say something about a trend
FEWEST_REWARDS = 10  # the same of rewards, which are noisy
RISE = 1.02  # of the validation loss over its best: overfitting
EXPLOSION = 1.2  # of the training loss over its lowest
HARDLY = 0.05  # relative fall of a loss that hardly falls, or that still falls well at the end of a run
SMALL_LOSS = 0.3  # nats per token: nothing is left to fall
GRADIENT_NORM, KL, ENTROPY, REGRESSION = 5.0, 0.2, 1.0, 0.05  # warnings of the guide, section 7
ALIKE = 0.6  # share of groups without any difference in reward
BEST_REWARD = 0.95  # of normalized rewards: there is nothing more to learn
EVENTS_SHOWN = 3  # of one symptom


@dataclass(frozen=True)
class History:
    """A run: its stage and settings, the curves of its metrics, its events, how it ended, and the metrics of its
    record."""

    stage: str
    settings: Any
    curves: Mapping[str, Curve]
    events: Sequence[Event] = ()
    status: str = "finished"
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def curve(self, name: str, fewest: int = FEWEST) -> Curve:
        """Returns a metric's (step, value), or nothing where there are too few."""
        found = self.curves.get(name, ())
        return found if len(found) >= fewest else ()


@dataclass
class Finding:
    """A condition of `symptoms.yaml` and the sentences that show it."""

    condition: str
    evidence: list[str]

    @property
    def title(self) -> str:
        return load_table()[1][self.condition].title

    @property
    def advice(self) -> tuple[str, ...]:
        return load_table()[1][self.condition].advice


def diagnose(run: History) -> list[Finding]:
    """Returns what is wrong with a run, the most urgent first; nothing for a healthy one.

    Args:
        run: its history; trends are judged from five logged values on, those of rewards from ten.

    Returns:
        Each condition once, with the events and trends that show it.
    """
    found: dict[str, list[str]] = {}
    symptoms = load_table()[0]
    for name in dict.fromkeys(event.symptom for event in run.events if event.symptom in symptoms):
        events = [event for event in run.events if event.symptom == name]
        lines = [f"step {event.step}: {'; '.join(filter(None, (event.message, event.action)))}" for event in events]
        more = [f"and {len(lines) - EVENTS_SHOWN} more such events"] if len(lines) > EVENTS_SHOWN else []
        found.setdefault(symptoms[name].condition, []).extend([*lines[:EVENTS_SHOWN], *more])
    for judge in (_instability, _overfitting, _underfitting, _reward, _policy, _gates, _preferences, _sources):
        for condition, sentence in judge(run):
            found.setdefault(condition, []).append(sentence)
    return [Finding(name, found[name]) for name in URGENCY if name in found]


def propose(kind: type[Settings], own: dict[str, Any], findings: Sequence[Finding]) -> dict[str, tuple[Any, Any]]:
    """Returns present and next values by dotted key, of the findings' changes that are valid together.

    `own` are the settings that the run did not leave at their defaults, nested.
    """
    settings = resolve(kind, Layer("run", own)).settings
    keys = {setting.name: setting for setting in reversed(fields_of(kind))}
    changes: dict[str, tuple[Any, Any]] = {}
    for finding in findings:
        for name, (before, after) in changes_of(finding.condition, settings).items():
            setting = keys[name]
            trial = {**{key: value for key, (_, value) in changes.items()}, setting.key: after}
            if setting.key not in changes and _is_valid(kind, changed(own, trial)):
                changes[setting.key] = (before, after)
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


def _is_valid(kind: type[Settings], values: dict[str, Any]) -> bool:
    try:
        return not resolve(kind, Layer("run", values)).warnings
    except SettingsError:
        return False


def _ends(curve: Curve) -> tuple[float, float]:
    """Returns the means of a curve's first and last fifth."""
    part = max(len(curve) // 5, 1)
    values = [value for _, value in curve]
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])


def _rise(curve: Curve) -> tuple[float, float, bool]:
    """Returns the means of the first and last third of a curve, and whether it rose by more than its noise."""
    values = [value for _, value in curve]
    part = max(len(values) // 3, 1)
    first, last = values[:part], values[-part:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    noise = math.sqrt((statistics.pvariance(first) + statistics.pvariance(last)) / part)  # of their difference
    return before, after, after - before > max(2 * noise, 0.02 * abs(before))


Judged = list[tuple[str, str]]
"""Conditions and the sentences that show them."""


def _instability(run: History) -> Judged:
    found = []
    if run.status == "diverged":
        found.append(("unstable", run.reason or "a loss, gradient or weight was not finite"))
    loss, norms = run.curve("loss"), run.curve("grad_norm")
    if loss and run.stage not in ONLINE:
        part = max(len(loss) // 5, 3)
        means = [statistics.fmean(value for _, value in loss[at : at + part]) for at in range(len(loss) - part + 1)]
        lowest = min(range(len(means)), key=means.__getitem__)
        if means[-1] > EXPLOSION * means[lowest] and means[-1] - means[lowest] > HARDLY:
            step = loss[lowest + part // 2][0]
            words = f"training loss rose from {means[lowest]:.4g} around step {step} to {means[-1]:.4g} at the end"
            found.append(("unstable", words))
    if norms and (usual := statistics.median(value for _, value in norms[len(norms) // 2 :])) > GRADIENT_NORM:
        step = norms[len(norms) // 2][0]
        found.append(("unstable", f"gradient norm is {usual:.3g} in the median from step {step} on (usual: below 2)"))
    return found


def _overfitting(run: History) -> Judged:
    evaluated, loss = run.curve("eval_loss", 2), run.curve("loss", 2)
    if not evaluated or not loss or run.stage in ONLINE:
        return []
    (step, best), (end, last) = min(evaluated, key=lambda point: point[1]), evaluated[-1]
    before = [value for at, value in loss if at <= step][-1:]
    _, now = _ends(loss)
    if last <= RISE * best or last - best < 0.01 or not before or now >= before[0]:
        return []
    words = f"validation loss rose from {best:.4g} at step {step}, its best, to {last:.4g} at step {end}"
    return [("overfitting", f"{words}, while the training loss fell from {before[0]:.4g} to {now:.4g}")]


def _underfitting(run: History) -> Judged:
    if run.stage not in (*NEXT_TOKENS, *PAIRS):
        return []
    found, loss, evaluated = [], run.curve("loss"), run.curve("eval_loss", 2)
    lora = run.settings.use_lora if hasattr(run.settings, "use_lora") else False
    where = f", with adapters of rank {run.settings.lora_r} ({run.settings.lora_preset})" if lora else ""
    if loss:
        first, last = loss[0][1], _ends(loss)[1]
        if 0 <= first - last < HARDLY * first and last > SMALL_LOSS:
            words = f"training loss fell by {1 - last / first:.1%} alone, from {first:.4g} to {last:.4g}"
            found.append(("underfitting", f"{words} in {loss[-1][0]:,} steps{where}"))
    entropy = run.metrics.get("unigram_entropy")
    if evaluated and entropy and evaluated[-1][1] > (1 - HARDLY) * entropy:
        words = f"validation loss {evaluated[-1][1]:.4g} is hardly below the entropy of token counts, {entropy:.4g}"
        found.append(("underfitting", words))
    late = [point for point in evaluated if point[0] >= 0.75 * evaluated[-1][0]]
    if len(late) > 1 and late[0][1] - late[-1][1] > HARDLY * late[0][1] and late[-1][1] > SMALL_LOSS:
        words = f"validation loss still fell by {1 - late[-1][1] / late[0][1]:.1%} from step {late[0][0]} to the end"
        found.append(("underfitting", f"{words}, step {late[-1][0]} ({late[0][1]:.4g} to {late[-1][1]:.4g})"))
    return found


def _reward(run: History) -> Judged:
    curve = run.curve("reward", FEWEST_REWARDS)
    if run.stage not in ONLINE or not curve:
        return []
    before, after, rises = _rise(curve)
    if rises:
        return []
    reached = after >= BEST_REWARD
    words = f"reward went from {before:.4g} to {after:.4g} in {curve[-1][0]:,} steps, no more than its noise"
    return [] if reached else [("reward_flat", words)]


def _policy(run: History) -> Judged:
    if run.stage not in ONLINE:
        return []
    found = []
    if (kl := run.curve("kl")) and (last := _ends(kl)[1]) > KL:
        found.append(("drift", f"KL divergence to the reference is {last:.3g} at the end (healthy: below 0.1)"))
    if entropy := run.curve("entropy"):
        first, last = _ends(entropy)
        if last < min(ENTROPY, first / 2):
            found.append(("collapse", f"entropy fell from {first:.3g} to {last:.3g} nats a token"))
    if alike := run.curve("zero_variance_share"):
        last, reward = _ends(alike)[1], run.metrics.get("reward", 0.0)
        if last > ALIKE and reward < BEST_REWARD:
            words = f"in {last:.0%} of the groups all completions have the same reward (reward {reward:.3g})"
            found.append(("alike", words))
    return found


def _gates(run: History) -> Judged:
    rewards, found = run.curve("reward", 2), []
    rises = bool(rewards) and _rise(rewards)[2]
    for name, curve in run.curves.items():
        if not name.startswith("gate/") or len(curve) < 2 or "perplexity" in name:
            continue
        (step, best), (end, last) = max(curve, key=lambda point: point[1]), curve[-1]
        if best - last > REGRESSION * abs(best):
            words = f"{name} fell from {best:.3g} at step {step} to {last:.3g} at step {end}"
            condition = "reward_hacking" if rises else "regression"
            found.append((condition, words + ", while the reward rose" * rises))
    return found


def _preferences(run: History) -> Judged:
    loss = run.curve("loss")
    wins = run.curve("eval_win_rate", 2) or run.curve("win_rate")
    if run.stage != "dpo" or not loss or not wins:
        return []
    (first, last), (before, after) = _ends(loss), _ends(wins)
    if last > 0.9 * first or after > before + 0.01:
        return []
    words = (
        f"training loss fell from {first:.4g} to {last:.4g}, and the win rate went from {before:.1%} to {after:.1%}"
    )
    return [("preference", words)]


def _sources(run: History) -> Judged:
    whole, found = run.curve("eval_loss", 2), []
    if not whole or whole[-1][1] > (1 - HARDLY) * whole[0][1]:
        return []
    for name, curve in run.curves.items():
        if name.startswith("eval_loss/") and len(curve) > 1 and curve[-1][1] > 0.99 * curve[0][1]:
            words = f"loss of {name.partition('/')[2]} went from {curve[0][1]:.4g} to {curve[-1][1]:.4g}"
            found.append(("data", f"{words}, of all sources from {whole[0][1]:.4g} to {whole[-1][1]:.4g}"))
    return found
