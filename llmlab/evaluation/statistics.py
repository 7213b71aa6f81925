"""What a difference between two models' scores of the same prompts means, and how many prompts it takes to find one.
The null hypothesis is no change. A regression is called where the paired bootstrap interval (95 % for all gates
together, by Bonferroni) lies below 0, a sign-flip test agrees, and the loss is at least half of the tolerance: the
midpoint between no change and the loss to be found. So small changes pass even where they are certain, and a model
fails against itself in at most 2.5 % of all evaluations. Sources: Efron and Tibshirani 1993, An Introduction to the
Bootstrap; Koehn 2004 (W04-3250); Fisher 1935 (sign flips are exact for any number of prompts)."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALARM = 0.05  # two-sided, all gates together: regressions are the lower half
POWER = 0.97  # aimed at, so that 0.9 is kept where the spread is only estimated
AT_ONCE = 2_000_000  # numbers drawn


class Comparison(NamedTuple):
    """A mean difference and its interval, whether it is a regression, and the prompts that it takes to find one."""

    delta: float
    low: float
    high: float
    regressed: bool
    needed: int


def compare(
    differences: Array, weights: Array, *, tolerance: float, largest: float, tests: int, seed: int, draws: int = 10_000
) -> Comparison:
    """Returns what paired differences, weight x (score - baseline's score), (prompts,), say; higher is better.
    `tolerance` is the loss to be found with a power of 90 %, `largest` the largest difference of a prompt, which is
    counted once more, since few prompts may show none; `tests` gates are judged together."""
    count, total, level = len(differences), weights.sum(), ALARM / tests
    delta = float(differences.sum() / total)
    draw, means, flips = np.random.default_rng(seed), np.empty(draws), np.empty(draws)
    rows = max(AT_ONCE // count, 1)
    for start in range(0, draws, rows):
        part = slice(start, min(start + rows, draws))
        chosen = draw.integers(count, size=(part.stop - start, count))
        means[part] = differences[chosen].sum(1) / weights[chosen].sum(1)
        flips[part] = (1.0 - 2.0 * draw.integers(2, size=chosen.shape)) @ differences / total
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    p = (1 + (flips <= delta + 1e-9 * abs(delta)).sum()) / (1 + draws)
    variance = (np.square(differences - delta * weights).sum() + largest**2) / count / weights.mean() ** 2
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(POWER)
    fewest = math.ceil(math.log2(2 / level)) + 2  # with fewer, equal signs everywhere are no evidence either
    regressed = bool(high < 0 and p <= level / 2 and delta <= -tolerance / 2)
    needed = max(math.ceil(z**2 * variance / tolerance**2), fewest)
    return Comparison(delta, float(low), float(high), regressed, needed)


def distinct_n(texts: Sequence[str], *, n_gram: int = 2) -> Array:
    """Returns the share of distinct n-grams of words among all n-grams, as values of the texts, whose mean it is.
    Source: Li et al. 2016 (arXiv:1510.03055)."""
    own = [Counter(zip(*(words[k:] for k in range(n_gram)), strict=False)) for words in map(_words, texts)]
    everywhere = _add(own)
    shares = np.array([sum(count / everywhere[gram] for gram, count in each.items()) for each in own])
    return shares * len(texts) / max(everywhere.total(), 1)


def self_similarity(texts: Sequence[str]) -> Array:
    """Returns the mean cosine similarity of the word counts of two texts, as values of the texts, whose mean it is."""
    units = []
    for vector in map(Counter, map(_words, texts)):
        norm = math.sqrt(sum(count**2 for count in vector.values()))
        units.append({word: count / norm for word, count in vector.items()})
    whole = _add(units)
    near = np.array([sum(share * whole[word] for word, share in unit.items()) - bool(unit) for unit in units])
    near /= max(len(texts) - 1, 1)
    return 2 * near - near.mean()  # each text is in its own pairs and in the others' (Hoeffding 1948, U-statistics)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _add(counters: Iterable[Mapping[Any, float]]) -> Counter[Any]:
    whole: Counter[Any] = Counter()
    for each in counters:
        whole.update(each)  # type: ignore[arg-type]
    return whole
