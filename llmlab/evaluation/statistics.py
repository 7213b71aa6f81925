"""What a difference between two models' scores of the same prompts means, and how many prompts it takes to find one.

The null hypothesis is no change. A regression is called where the paired bootstrap interval (95 % for all gates
together, by Bonferroni) lies below 0, a sign-flip test agrees, and the loss is at least half of the tolerance: the
midpoint between no change and the loss to be found. So small changes pass even where they are certain, and a model
fails against itself in at most 2.5 % of all evaluations. Sources: Efron and Tibshirani 1993, An Introduction to the
Bootstrap; Koehn 2004 (W04-3250); Fisher 1935 (sign flips are exact for any number of prompts).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALARM = 0.05  # two-sided, all gates together: regressions are the lower half
POWER = 0.95  # aimed at, so that 0.9 is kept where the spread is only estimated
AT_ONCE = 2_000_000  # numbers drawn


class Comparison(NamedTuple):
    """A mean difference and its interval, whether it is a regression, and the prompts that it takes to find one."""

    delta: float
    low: float
    high: float
    regressed: bool
    needed: int


def compare(
    differences: Array,
    weights: Array,
    *,
    tolerance: float,
    largest: float,
    tests: int = 1,
    seed: int = 0,
    resamples: int = 10_000,
) -> Comparison:
    """Returns what paired differences, (prompts,), say; higher is better.

    Args:
        differences: weight x (score - baseline's score) of each prompt.
        weights: of each prompt in the mean, (prompts,).
        tolerance: the loss that is to be found with a power of 90 %, above 0.
        largest: the largest difference of a prompt; one more is counted, since few prompts may show none.
        tests: gates that are judged together.
        seed: of the resampling.
        resamples: of the bootstrap and of the test.
    """
    count, total, level = len(differences), weights.sum(), ALARM / tests
    delta = float(differences.sum() / total)
    draw, means, flips = np.random.default_rng(seed), np.empty(resamples), np.empty(resamples)
    rows = max(AT_ONCE // count, 1)
    for start in range(0, resamples, rows):
        part = slice(start, min(start + rows, resamples))
        chosen = draw.integers(count, size=(part.stop - start, count))
        means[part] = differences[chosen].sum(1) / weights[chosen].sum(1)
        flips[part] = (1.0 - 2.0 * draw.integers(2, size=chosen.shape)) @ differences / total
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    p = (1 + (flips <= delta + 1e-9 * abs(delta)).sum()) / (1 + resamples)
    variance = (np.square(differences - delta * weights).sum() + largest**2) / count / weights.mean() ** 2
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(POWER)
    fewest = math.ceil(math.log2(2 / level)) + 2  # with fewer, equal signs everywhere are no evidence either
    return Comparison(
        delta,
        float(low),
        float(high),
        regressed=bool(high < 0 and p <= level / 2 and delta <= -tolerance / 2),
        needed=max(math.ceil(z**2 * variance / tolerance**2), fewest),
    )


def distinct_n(completions: Sequence[Sequence[str]], *, n_gram: int = 2) -> Array:
    """Returns the share of distinct n-grams among all, as values of the prompts, (prompts,), whose mean it is.

    Args:
        completions: texts of each prompt.
        n_gram: words of an n-gram.

    Source: Li et al. 2016 (arXiv:1510.03055); the values are jackknife pseudo-values.
    """
    own: list[Counter[Any]] = []
    for samples in completions:
        texts = map(_words, samples)
        own.append(Counter(gram for words in texts for gram in zip(*(words[k:] for k in range(n_gram)), strict=False)))
    whole = _add(own)
    distinct, total = len(whole), whole.total()
    lost = [sum(count == whole[gram] for gram, count in each.items()) for each in own]
    shares = [(distinct - less) / max(total - each.total(), 1) for less, each in zip(lost, own, strict=True)]
    return _pseudo_values(distinct / max(total, 1), np.array(shares))


def self_similarity(completions: Sequence[Sequence[str]]) -> Array:
    """Returns the mean cosine similarity of two completions' word counts, as values of the prompts, (prompts,).

    1 says that all completions, (prompts, samples), have the same words. The values are jackknife pseudo-values.
    """
    own, counts = [], np.array([sum(any(_words(text)) for text in samples) for samples in completions])
    for samples in completions:
        vectors = [Counter(_words(text)) for text in samples]
        norms = [math.sqrt(sum(count**2 for count in vector.values())) for vector in vectors]
        pairs = zip(vectors, norms, strict=True)
        own.append(_add(Counter({word: c / norm for word, c in vector.items()}) for vector, norm in pairs))
    whole = _add(own)
    less = np.array([2 * _dot(unit, whole) - _dot(unit, unit) for unit in own])  # of the square, without the prompt
    n = np.append(counts.sum() - counts, counts.sum())  # the last one is of all prompts
    means = (_dot(whole, whole) - np.append(less, 0) - n) / np.maximum(n * (n - 1), 1)
    return _pseudo_values(means[-1], means[:-1])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _add(counters: Any) -> Counter[Any]:
    whole: Counter[Any] = Counter()
    for each in counters:
        whole.update(each)
    return whole


def _dot(one: Counter[Any], other: Counter[Any]) -> float:
    return sum(value * other[word] for word, value in one.items())


def _pseudo_values(whole: float, without: Array) -> Array:
    """Returns values with the mean `whole` that vary as it does when a prompt is left out."""
    return whole + (len(without) - 1) * (without.mean() - without)
