"""Do gates cry wolf, and do they find a regression of 5 %? A simulation of both, with the code of `llmlab evaluate`.

    python benchmarks/gates.py [--repeats 200]

A model is compared with itself (fresh samples of the same prompts): at most 5 % of 200 evaluations may fail.  Then
with one that lost 5 % of its score, at the number of prompts that a first evaluation of 200 prompts says it needs: at
least 90 % must find it.  Takes about a minute.
"""

import argparse

import numpy as np

from llmlab.evaluation.gates import Gate, Scores, distinct_n, judge
from llmlab.rewards.function import Reward
from llmlab.settings.gates import GateSettings

FIRST = 200  # prompts of the evaluation that says how many it takes
CASES = {  # name: gate, mean score, how much prompts differ (0: not at all, 1: each always succeeds or always fails)
    "exact_match, mean 0.9": ("exact_match", 0.9, 0.3),
    "exact_match, mean 0.5, nearly greedy": ("exact_match", 0.5, 0.9),
    "perplexity": ("perplexity", 20.0, 0.5),
    "distinct_n": ("distinct_n", 0.0, 0.0),
}


def simulate(draw, name, mean, spread, count, loss):
    """Returns the scores of a model that lost a share of its score, and of the baseline, on the same prompts."""
    if name == "exact_match":
        strength = (1 - spread) / spread
        chances = draw.beta(mean * strength, (1 - mean) * strength, count)
        values = [(draw.random(count) < chances * share).astype(float) for share in (1 - loss, 1)]
        return [Scores(each, np.ones(count)) for each in values]
    if name == "perplexity":
        losses, tokens = draw.normal(np.log(mean), spread, count), draw.integers(50, 1000, count).astype(float)
        noise = [np.log1p(loss) + draw.normal(0, 0.05, count), draw.normal(0, 0.05, count)]
        return [Scores(tokens * (losses + each), tokens) for each in noise]
    texts = [[" ".join(map(str, draw.zipf(1.5, 30))) for _ in range(count)] for _ in range(2)]
    return [Scores(distinct_n(each), np.ones(count)) for each in texts]


def share_that_fails(draw, case, count, loss, tests, repeats):
    """Returns the share of evaluations of so many gates in which one fails, the first of them with a loss."""
    name, mean, spread = case
    reward = Reward(len, low=0.0, high=1.0) if name == "exact_match" else None
    gate, failed = Gate(name, GateSettings(name=name), reward, {}, []), 0
    for repeat in range(repeats):
        pairs = [simulate(draw, name, mean, spread, count, 0 if number else loss) for number in range(tests)]
        options = {"tests": tests, "seed": repeat, "draws": 1000 * tests}
        verdicts = [judge(gate, *pair, **options) for pair in (pairs[:1] if loss else pairs)]
        failed += any(verdict.failures for verdict in verdicts)
    needed = [judge(gate, *simulate(draw, name, mean, spread, FIRST, loss), tests=tests, seed=0, draws=100).needed]
    return failed / repeats, needed[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    draw = np.random.default_rng(0)
    print("| gate | gates at once | fails against itself, 20 and 200 prompts | prompts needed | finds a loss of 5 % |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for label, case in CASES.items():
        for tests in (1, 4):
            alarms = [share_that_fails(draw, case, count, 0.0, tests, repeats)[0] for count in (20, FIRST)]
            needed = int(np.median([share_that_fails(draw, case, 20, 0.05, tests, 1)[1] for _ in range(9)]))
            found = "-"  # how a text loses distinct n-grams is no matter of one number
            if case[0] != "distinct_n":
                found = f"{share_that_fails(draw, case, needed, 0.05, tests, max(repeats // 2, 1))[0]:.0%}"
            print(f"| {label} | {tests} | {alarms[0]:.1%}, {alarms[1]:.1%} | {needed:,} | {found} |", flush=True)


if __name__ == "__main__":
    main()
