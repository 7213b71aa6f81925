"""Symptoms in metric histories: a pure function for each row of the guide's tables, over curves of logged metrics,
that yields what the newest line shows, if it does. Source: seed, RL guide, sections 6 and 7."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from operator import itemgetter
from statistics import fmean, median, pstdev
from typing import Any

from llmlab.health.symptoms import Event, Symptom, load_table
from llmlab.settings.files import is_number

Curve = list[tuple[int, float]]
"""(step, value) of each logged line that has the metric, finite values alone."""
Curves = Mapping[str, Curve]
Found = Iterator[tuple[str, int]]
"""What is seen, with numbers, and the first step at which it shows; the first one counts."""
Check = Callable[[Curve, float, Curves, str], Found]
"""A metric's curve, the limit, all curves and the metric's name."""

FEW, WINDOW = 3, 10  # logged lines that a level is the median of: where it counts at once, and "consistently"
SPIKE_WINDOW, SPIKE_FEWEST = 128, 16
HEALTHY_ENTROPY = 2.0
ONLINE = ("grpo", "ppo")
LOWER_IS_BETTER = ("perplexity", "self_similarity")
HEALTHY = {  # bands of the guide: metric -> (lowest, highest)
    "grad_norm": (0.0, 2.0),
    "eval_perplexity": (3.0, 15.0),
    "kl": (-math.inf, 0.1),
    "entropy": (HEALTHY_ENTROPY, math.inf),
}


def level(curve: Curve, size: int = FEW) -> float:
    """Returns the median of the last values."""
    return median(value for _, value in curve[-size:])


def start(curve: Curve, size: int = FEW) -> float:
    """Returns the median of the first values."""
    return median(value for _, value in curve[:size])


def noise(curve: Curve) -> float:
    """Returns the median absolute difference of successive values."""
    return median([abs(after - before) for (_, before), (_, after) in pairwise(curve)] or [0.0])


def after_warmup(curves: Curves, curve: Curve) -> Curve:
    """Returns the part of a curve after the highest learning rate so far; none of it while that still rises."""
    rates = curves.get("learning_rate")
    if not rates:
        return curve
    peak = max(rates, key=lambda point: point[1])[0]  # of several the first
    return curve[bisect_right(curve, peak, key=itemgetter(0)) :]


def loss_rising(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The last lines are all above the run's start, or a level of ten lines is above the lowest (of many, some)."""
    first, last = start(curve), curve[-5:]
    if len(curve) >= 5 + FEW and all(value > first + (0.1 + limit) * abs(first) for _, value in last):
        yield f"{level(last, 5):.4g} in the last 5 lines, {first:.4g} at the start", last[0][0]
    if len(curve) < 2 * WINDOW or len(curve) % WINDOW:
        return
    every = WINDOW * (1 + len(curve) // (200 * WINDOW))  # a long history costs no more
    blocks = [curve[k : k + WINDOW] for k in (*range(0, len(curve) - WINDOW, every), len(curve) - WINDOW)]
    levels = [level(block, WINDOW) for block in blocks]
    lowest = min(range(len(levels)), key=levels.__getitem__)
    varies = max(noise(blocks[-1]), noise(blocks[lowest]))
    if levels[-1] - levels[lowest] > max(limit * abs(levels[lowest]), 2.5 * varies):
        yield f"{levels[-1]:.4g} in the last 10 lines, {levels[lowest]:.4g} before", blocks[lowest][-1][0] + 1


def loss_spike(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The newest value is so many standard deviations above the mean of those before it, and twice their median."""
    step, value = curve[-1]
    before = [each for _, each in curve[-1 - SPIKE_WINDOW : -1]]
    far = len(before) >= SPIKE_FEWEST and value > 2 * median(before)
    if far and value > fmean(before) + limit * pstdev(before):
        yield f"{value:.4g} at step {step}, {fmean(before):.4g} +- {pstdev(before):.2g} before", curve[-2][0] + 1


def gradient_norm_high(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The median of ten lines after warmup is above the limit, and above twice the run's start."""
    last, first = after_warmup(curves, curve)[-WINDOW:], start(curve, WINDOW)
    if len(last) == WINDOW and level(last, WINDOW) > max(limit, 2 * first):
        yield f"{level(last, WINDOW):.3g} in the last {WINDOW} lines, {first:.3g} at the start", last[0][0]


def gradient_norm_exploding(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The newest value is above the limit, and above ten times the median of those before it."""
    usual = level(curve[:-1], 2 * WINDOW) if len(curve) > 5 else math.inf
    if curve[-1][1] > max(limit, 10 * usual):
        yield f"{curve[-1][1]:.3g} at step {curve[-1][0]}, {usual:.3g} before", curve[-2][0] + 1


def value_loss_exploding(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The value loss is far above what any estimate between zero and the largest return could have."""
    if len(curve) >= FEW and level(curve, 2) > limit * start(curve):
        seen = [abs(value) for name in ("return", "reward", "reward_std") for _, value in curves.get(name, ())]
        largest = max([1e-6, *seen])
        if level(curve, 2) > limit * largest * largest:  # infinite where a power would raise
            yield f"{level(curve, 2):.3g}, {start(curve):.3g} at the start", curve[-2][0]


def kl_high(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The median of three lines is above the limit."""
    if len(curve) >= FEW and level(curve) > limit:
        yield f"{level(curve):.3g} nats per token in the last {FEW} lines, limit {limit:g}", _since(curve, limit)


def perplexity_high(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """Validation perplexity left the range in which it has been, and is a fifth above its best."""
    best = min(value for _, value in curve)
    if best <= limit and curve[-1][1] > max(limit, 1.2 * best):
        yield f"{curve[-1][1]:.3g} at step {curve[-1][0]}, {best:.3g} at best", _since(curve, limit)


def perplexity_low(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """Training data is known by heart: its perplexity is low, and the validation data's more than twice as high."""
    losses = curves.get("loss", [])
    if len(losses) >= FEW and level(losses) < 10:
        seen, new, (step, best) = math.exp(level(losses)), curve[-1][1], min(curve, key=itemgetter(1))
        if seen < limit and new > max(2 * seen, limit, 1.02 * best):
            yield f"{seen:.3g} on training data, {new:.3g} on validation data", step + 1


def entropy_collapse(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The median of three lines is below the limit, which for a policy that started low is a share of its start."""
    lowest = limit * min(1.0, start(curve) / HEALTHY_ENTROPY)
    if len(curve) > FEW and level(curve) < lowest:
        yield f"{level(curve):.3g} in the last {FEW} lines, {start(curve):.3g} at the start", _since(curve, lowest, -1)


def fall(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The last two measurements are below the best one by a share of it, and by more than measurements vary."""
    sign = -1 if any(word in metric for word in LOWER_IS_BETTER) else 1
    place, (step, best) = max(enumerate(curve), key=lambda each: sign * each[1][1])
    falls = min(sign * (best - value) for _, value in curve[-2:])
    if place < len(curve) - 2 and falls > max(limit * abs(best), 2 * noise(curve[: place + 1])):
        yield f"{curve[-1][1]:.3g} at step {curve[-1][0]}, {best:.3g} at step {step}", step + 1


def reward_hacking(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """A gate regressed since a step from which on the reward rose."""
    rewards = curves.get("reward", [])
    for found, step in fall(curve, limit, curves, metric) if len(rewards) >= 2 * FEW else ():
        before = [point for point in rewards if point[0] < step] or rewards[:FEW]
        if level(rewards) - level(before) > 2 * noise(rewards):
            yield f"{found}, while the reward rose from {level(before):.3g} to {level(rewards):.3g}", step


def length_out_of_range(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """Completions are so many times longer or shorter than at first, where most were not cut off then."""
    cut = curves.get("clipped_share", [])
    first, last = start(curve), level(curve)
    shorter = last * limit < first and not (cut and start(cut) > 0.5)
    if len(curve) >= 2 * FEW and (shorter or last > limit * first):
        yield f"{last:.3g} tokens in the last {FEW} lines, {first:.3g} at the start", curve[-FEW][0]


def overfitting(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """Two evaluations are above the best one, while the training loss went on to fall."""
    losses = curves.get("loss", [])
    step, best = min(curve, key=itemgetter(1))
    before, after = ([point for point in losses if (point[0] <= step) == early] for early in (True, False))
    rises = all(value > best + limit * abs(best) for _, value in curve[-2:])
    if len(curve) >= FEW and rises and before and after and level(after) < level(before):
        trend = f"training loss {level(before):.4g} -> {level(after):.4g}"
        yield f"{curve[-1][1]:.4g} at step {curve[-1][0]}, {best:.4g} at step {step}, {trend}", step + 1


def underfitting(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The loss is where it started fifty lines after warmup, and far from that of a trained model."""
    wins = curves.get("win_rate")
    learned = level(wins, WINDOW) > 0.55 if wins else level(curve, WINDOW) < math.log(20)
    hardly = level(curve, WINDOW) >= (1 - limit) * start(curve)
    if hardly and not learned and len(after_warmup(curves, curve)) >= 5 * WINDOW:
        yield f"{level(curve, WINDOW):.4g} at step {curve[-1][0]}, {start(curve):.4g} at the start", curve[0][0]


def reward_flat(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The reward does not rise, and is neither the highest possible nor the same for all completions."""
    equal, first, last = curves.get("zero_variance_share"), start(curve, WINDOW), level(curve, WINDOW)
    flat = len(curve) >= max(limit, 2 * WINDOW) and last - first <= noise(curve[-SPIKE_WINDOW:])
    alike = equal and level(equal, WINDOW) > 0.9  # there is nothing to learn from: the stage says so itself
    if flat and not alike and not 0.9 <= last <= 1:
        yield f"{last:.3g} at step {curve[-1][0]}, {first:.3g} at the start", curve[0][0]


def groups_alike(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """Nearly all groups have equal rewards, which are not the highest possible: there is nothing to compare."""
    rewards = curves.get("reward", [])
    best = rewards and 0.9 <= level(rewards, WINDOW) <= 1
    if len(curve) >= WINDOW and level(curve, WINDOW) > limit and not best:
        yield f"{level(curve, WINDOW):.0%} of the groups in the last {WINDOW} lines", _since(curve, limit)


def win_rate_flat(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The loss fell, and three evaluations of the win rate are no higher than the first one."""
    losses, (step, first) = curves.get("loss", []), curve[0]
    fell = len(losses) >= 2 * FEW and level(losses) <= (1 - limit) * start(losses)
    if fell and len(curve) > FEW and first <= 0.9 and all(value <= first for _, value in curve[-FEW:]):
        trend = f"loss {start(losses):.4g} -> {level(losses):.4g}"
        yield f"{first:.1%} at step {step}, {curve[-1][1]:.1%} at step {curve[-1][0]}, {trend}", step


def source_dead(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The loss of a source is nearly nothing from its first line on."""
    if len(curve) >= 5 and max(start(curve), level(curve, 5)) < limit:
        yield f"{level(curve, 5):.2g} since step {curve[0][0]}", curve[0][0]


def source_hard(curve: Curve, limit: float, curves: Curves, metric: str) -> Found:
    """The loss of a source stays where it started, while the whole loss fell by a tenth."""
    whole, first, last = curves.get("loss", []), start(curve), level(curve, WINDOW)
    fell = len(whole) >= 2 * WINDOW and level(whole, WINDOW) <= 0.9 * start(whole)
    if fell and len(curve) >= 2 * WINDOW and last >= (1 - limit) * first:
        yield f"{last:.4g} at step {curve[-1][0]}, {first:.4g} at the start", curve[0][0]


NOT_FINITE = ("loss", "eval_loss")  # a gradient norm is judged before it is logged, and a loss scaler may go on


@dataclass
class Watch:
    """Finds symptoms line by line: each is reported when it begins, and again only after it was over. `limits` are
    `HealthLimits` by name; one that is None turns its check off."""

    limits: Mapping[str, float | None]
    stage: str
    curves: dict[str, Curve] = field(default_factory=dict)
    ongoing: dict[tuple[str, str], int] = field(default_factory=dict)  # -> lines since it was seen

    def add(self, line: Mapping[str, Any]) -> list[Event]:
        """Returns the symptoms that begin at a line of `metrics.jsonl`, or a log event of a trainer."""
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            return []
        names = [name for name, value in line.items() if is_number(value) and abs(value) < 1e300]  # NaN is not either
        for name in names:
            curve = self.curves.setdefault(name, [])
            if name != "learning_rate" or not curve or line[name] > curve[-1][1]:  # of which only the peak counts
                curve.append((step, float(line[name])))
        events = [not_finite(step, name, line[name]) for name in NOT_FINITE if name in line and name not in names]
        for symptom in load_table()[0].values():
            limit = self.limits.get(symptom.limit or symptom.name)
            if limit is None or symptom.online not in (None, self.stage in ONLINE):
                continue
            for name in names:
                if any(fnmatchcase(name, pattern) for pattern in symptom.metrics):
                    events += self._follow(symptom, name, limit)
        return events

    def _follow(self, symptom: Symptom, metric: str, limit: float) -> Iterable[Event]:
        check: Check = globals()[symptom.check or symptom.name]  # a function above
        found = next(check(self.curves[metric], limit, self.curves, metric), None)
        key = symptom.name, metric
        lines = self.ongoing.pop(key, WINDOW) + 1  # since it was seen
        if found is not None:
            self.ongoing[key] = 0
            if lines > WINDOW:
                (step, value), message = self.curves[metric][-1], f"{symptom.title} ({metric}): {found[0]}"
                yield Event(step, symptom.name, metric, value, message, symptom.severity, since=found[1])
        elif lines < WINDOW:
            self.ongoing[key] = lines


def outside_bands(curves: Curves, stage: str) -> dict[str, tuple[float, float, float]]:
    """Returns metric -> (median of its last lines, lowest, highest) of those outside the guide's healthy bands."""
    found = {}
    for name, (lowest, highest) in HEALTHY.items():
        if curves.get(name) and (name != "entropy" or stage in ONLINE):
            value = level(list(curves[name]), WINDOW)
            if not lowest <= value <= highest:
                found[name] = (value, lowest, highest)
    return found


def not_finite(step: int, metric: str, value: Any) -> Event:
    """Returns the event of a loss, gradient or weight that is not finite."""
    value = value if isinstance(value, float) else math.nan
    message = f"{metric} is {value} at step {step}"
    return Event(step, "loss_not_finite", metric, value, message, "critical", since=step)


def _since(curve: Curve, limit: float, sign: int = 1) -> int:
    """Returns the first step of the last values in a row that are beyond a limit."""
    step = curve[-1][0]
    for step_before, value in reversed(curve):
        if sign * (value - limit) <= 0:
            break
        step = step_before
    return step
