"""Do gates cry wolf, and do they find a regression of 5 %? A simulation of both, with the code of `llmlab evaluate`.

A model is compared with itself (fresh samples of the same prompts), which must fail in at most 5 % of 200 evaluations,
and with one that lost 5 % of its score, at the number of prompts that a first evaluation of 200 prompts says it needs,
which must be found in at least 90 %. Run: python benchmarks/gates.py
"""

import argparse
import time
from types import SimpleNamespace

import numpy as np

from llmlab.evaluation.gates import Scores, judge
from llmlab.evaluation.statistics import distinct_n
from llmlab.settings.gates import GateSettings

PILOT = 200  # prompts of the evaluation that says how many it needs
CASES = {  # mean score, how much prompts differ in difficulty (0: not at all, 1: each always succeeds or always fails)
    "easy, sampled": (0.9, 0.3),
    "half, sampled": (0.5, 0.3),
    "half, nearly greedy": (0.5, 0.9),
    "rare, sampled": (0.15, 0.3),
}


def successes(draw, chances):
    """A 0 or 1 for each prompt."""
    return Scores((draw.random(len(chances)) < chances).astype(float), np.ones(len(chances)))


def losses(draw, means, tokens, change=0.0):
    """The summed token losses of texts, and their tokens."""
    return Scores(tokens * (means + change + draw.normal(0, 0.05, len(means))), tokens)


def binary_pair(draw, count, mean, spread, loss):
    """The scores of a model that lost a share of its successes, and of the baseline."""
    strength = (1 - spread) / max(spread, 1e-9)
    chances = draw.beta(mean * strength, (1 - mean) * strength, count)
    return successes(draw, chances * (1 - loss)), successes(draw, chances)


def text_pair(draw, count, loss):
    """The losses of a model whose perplexity grew by a share, and of the baseline."""
    means, tokens = draw.normal(3.0, 0.5, count), draw.integers(50, 1000, count).astype(float)
    return losses(draw, means, tokens, np.log1p(loss)), losses(draw, means, tokens)


def word_pair(draw, count, loss):
    """The distinct bigrams of random texts from one vocabulary."""
    def texts():
        return [" ".join(map(str, draw.zipf(1.5, 30))) for _ in range(count)]

    return tuple(Scores(distinct_n(texts()), np.ones(count)) for _ in range(2))


def gate(name):
    """A gate as `load_gates` makes it."""
    reward = SimpleNamespace(low=0.0, high=1.0, weight=1.0) if name == "exact_match" else None
    from llmlab.evaluation.gates import Gate

    return Gate(name, GateSettings(name=name), reward, {}, [])


def rate(draw, name, pair, count, loss, tests, repeats, resamples):
    """Returns the share of evaluations in which one of so many gates calls a regression, in the first with a loss."""
    failed = 0
    for repeat in range(repeats):
        pairs = [pair(draw, count, loss if number == 0 else 0.0) for number in range(tests)]
        verdicts = [judge(gate(name), *each, tests=tests, seed=repeat, resamples=resamples) for each in pairs]
        failed += bool((verdicts[0] if loss else [v for v in verdicts if v.failures] and verdicts[0]) and (
            verdicts[0].failures if loss else any(v.failures for v in verdicts)))
    return failed / repeats


if __name__ == "__main__":
    pass
