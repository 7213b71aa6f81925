"""The rule by which gates fail: no false alarms, power at the size that it asks for; statistics of sets of texts."""

import math

import numpy as np
import pytest

from llmlab.evaluation.gates import compare, distinct_n, self_similarity


def decide(differences, **options):
    differences = np.asarray(differences, float)
    return compare(
        differences, np.ones(len(differences)), **{"tolerance": 0.05, "largest": 1.0, "tests": 1, "seed": 0, **options}
    )


def test_interval_and_needed_prompts_follow_from_the_spread():
    draw = np.random.default_rng(0)
    differences = draw.normal(0.01, 0.2, 2000)
    found = decide(differences)
    error = differences.std() / math.sqrt(2000)
    assert found.delta == pytest.approx(differences.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    variance = differences.var() + 1 / 2000
    assert found.needed == pytest.approx((1.96 + 1.881) ** 2 * variance / 0.05**2, rel=0.01)
    assert decide(differences, tests=10).needed > found.needed


@pytest.mark.parametrize("losses", [3, 4, 5])
def test_a_few_lost_prompts_are_no_evidence_however_sure_the_bootstrap_is(losses):
    differences = [-1] * losses + [0] * (100 - losses)
    assert decide(differences).regressed is False  # Fisher's p is 1 / 2 ** losses
    assert decide([-1] * 8 + [0] * 92).regressed is True


def test_a_certain_but_small_loss_passes():
    draw = np.random.default_rng(1)
    found = decide(draw.normal(-0.02, 0.05, 1000))
    assert found.high < 0 and not found.regressed  # under half of the tolerance
    assert decide(draw.normal(-0.03, 0.05, 1000)).regressed


def test_weights_make_a_mean_over_tokens():
    losses, tokens = np.array([-10.0, -300.0]), np.array([10.0, 100.0])
    assert compare(losses, tokens, tolerance=0.05, largest=1.0, tests=1, seed=0, draws=100).delta == pytest.approx(
        -310 / 110
    )


def test_a_model_against_itself_and_one_that_lost_five_percent():
    draw = np.random.default_rng(2)

    def scores(chance, count):
        return (draw.random(count) < chance).astype(float)

    alarms = [decide(scores(0.8, 100) - scores(0.8, 100), tolerance=0.04, draws=1000).regressed for _ in range(200)]
    assert sum(alarms) <= 10
    needed = decide(scores(0.8, 500) - scores(0.8, 500), tolerance=0.04).needed
    found = [
        decide(scores(0.76, needed) - scores(0.8, needed), tolerance=0.04, draws=400).regressed for _ in range(50)
    ]
    assert sum(found) >= 45


def test_distinct_n_is_the_share_of_distinct_n_grams():
    texts = ["a b c", "a b d", ""]
    values = distinct_n(texts)
    assert values.mean() == pytest.approx(3 / 4)  # a b, b c, a b, b d
    assert values.tolist() == pytest.approx([1.5 * 3 / 4, 1.5 * 3 / 4, 0])
    assert distinct_n(texts, n_gram=1).mean() == pytest.approx(4 / 6)


def test_self_similarity_is_the_mean_cosine_of_pairs():
    texts = ["a b", "a c", "a b"]
    assert self_similarity(texts).mean() == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert self_similarity(["x", "x"]).mean() == pytest.approx(1)
    assert self_similarity(["x", "", "y"]).mean() == 0


@pytest.mark.parametrize("statistic", [distinct_n, self_similarity])
def test_values_vary_as_the_statistic_of_other_texts_does(statistic):
    draw = np.random.default_rng(3)
    sets = [[" ".join(map(str, draw.zipf(1.5, 30))) for _ in range(60)] for _ in range(100)]
    errors = [statistic(texts).std() / math.sqrt(60) for texts in sets]
    assert np.mean(errors) == pytest.approx(np.std([statistic(texts).mean() for texts in sets]), rel=0.25)
