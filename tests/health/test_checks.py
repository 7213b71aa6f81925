"""Each check finds its symptom in a curve that has it, and none in one that is as it should be."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.health import checks
from llmlab.health.checks import Watch, outside_bands
from llmlab.health.symptoms import load_table
from llmlab.settings.training import HealthLimits

LIMITS = HealthLimits().model_dump()


def find(lines, stage="sft", **limits):
    """Returns the symptoms of these lines, of which each is a step, with the steps at which they are reported."""
    history = [{"step": step, **line} for step, line in enumerate(lines, start=1)]
    watch = Watch({**LIMITS, **limits}, stage)
    return [(event.symptom, event.step) for line in history for event in watch.add(line)]


def curve(name, *values):
    return [{name: value} for value in values]


def test_every_symptom_of_the_table_has_a_check_and_a_limit():
    symptoms = load_table()[0]
    assert all(symptom.metrics for name, symptom in symptoms.items() if name != "loss_not_finite")
    assert all(
        callable(getattr(checks, symptom.check or name)) for name, symptom in symptoms.items() if symptom.metrics
    )
    found = set(symptoms)
    assert {*LIMITS} == found - {"loss_not_finite", "reward_hacking"}  # which has gate_regression's


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_number_that_is_not_finite(value):
    assert find([{"loss": 1.0}, {"loss": value}]) == [("loss_not_finite", 2)]
    assert find([{"eval_loss": value}], "ppo") == [("loss_not_finite", 1)]
    assert find([{"loss": 1.0, "grad_norm": value}]) == []  # the loss scaler of fp16 left that update out


FALLING = [2 + 3 * 0.9**k for k in range(60)]
SYMPTOMS = {  # symptom: (stage, lines, the step at which it is found)
    "loss_rising": ("sft", curve("loss", *[2.0] * 5, *[2.7] * 10), 10),  # 30 % above the start, five times
    "loss_spike": ("sft", curve("loss", *([1.0, 1.2] * 10), 3.0), 21),  # 1.1 + 6 x 0.1 = 1.7, and twice the median
    "gradient_norm_high": ("sft", curve("grad_norm", *[2.0] * 10, *[5.5] * 10), 16),  # the median of ten exceeds 5
    "gradient_norm_exploding": ("sft", curve("grad_norm", *[1.0] * 6, 10.5), 7),
    "value_loss_exploding": ("ppo", [{"value_loss": v, "return": 0.9} for v in (0.2, 0.2, 0.2, 9.0, 9.0)], 5),
    "kl_high": ("dpo", curve("kl", 0.0, 0.1, 0.21, 0.21), 4),
    "kl_too_high": ("grpo", curve("kl", 0.1, 0.31, 0.31), 3),
    "perplexity_high": ("pretrain", curve("eval_perplexity", 500, 30, 15, 21), 4),
    "perplexity_low": ("sft", [*curve("loss", 3, 0.6, 0.5, 0.5), *curve("eval_perplexity", 4, 5)], 6),
    "entropy_collapse": ("ppo", curve("entropy", 3, 3, 3, 0.9, 0.9), 5),
    "diversity_falling": ("grpo", curve("reward/distinct_n", 0.9, 0.9, 0.6, 0.6), 4),
    "gate_regression": ("sft", curve("gate/json_valid", 0.5, 0.9, 0.8, 0.8), None),  # measurements vary by 0.4
    "overfitting": ("sft", [{"loss": 3 - k / 4, "eval_loss": v} for k, v in enumerate((3, 2, 2.2, 2.3))], 4),
    "underfitting": ("pretrain", curve("loss", *[6.0] * 60), 50),
    "length_out_of_range": ("grpo", curve("completion_length", *[10] * 5, 31, 31), 7),
    "reward_flat": ("grpo", curve("reward", *[0.3] * 50), 50),
    "groups_alike": ("grpo", [{"zero_variance_share": 0.95, "reward": 0.3}] * 10, 10),
    "win_rate_flat": (
        "dpo",
        [
            *({"loss": 0.7, "eval_win_rate": 0.5}, {"loss": 0.7}, {"loss": 0.6}),
            *({"loss": 0.5, "eval_win_rate": value} for value in (0.5, 0.49, 0.5)),
        ],
        6,
    ),
    "source_dead": ("sft", curve("loss/empty", *[0.0] * 5), 5),
    "repetition": ("grpo", curve("gate/self_similarity", 0.2, 0.2, 0.3, 0.3), 4),
}


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_is_found_once(symptom):
    stage, lines, step = SYMPTOMS[symptom]
    found = dict(find([*lines, *lines[-1:]], stage))
    assert found.get(symptom) == step
    assert symptom not in dict(find(lines, stage, **{symptom: None}))


def test_a_gate_that_falls_by_more_than_it_varies():
    assert find(curve("gate/json_valid", 0.88, 0.9, 0.89, 0.85, 0.84)) == [("gate_regression", 5)]
    assert find(curve("gate/json_valid", 0.88, 0.9, 0.89, 0.87, 0.88)) == []  # 5 % of 0.9 is 0.045
    perplexities = curve("gate/perplexity", 8.5, 8.2, 8.0, 8.1, 9.0, 9.1)  # lower is better
    assert find(perplexities) == [("gate_regression", 6)]


def test_a_reward_that_rises_while_a_gate_falls():
    lines = [{"reward": k / 10, "step": k} for k in range(8)]
    gates = [{"gate/exact_match": value} for value in (0.9, 0.9, 0.5, 0.4)]
    mixed = [line for pair in zip(lines[::2], lines[1::2], gates, strict=True) for line in pair]
    assert ("reward_hacking", 12) in find([{k: v for k, v in line.items() if k != "step"} for line in mixed], "grpo")


def test_a_source_that_is_not_learned():
    lines = [{"loss": 4 - k / 10, "loss/noise": 5.0, "loss/books": 4 - k / 8} for k in range(20)]
    assert find(lines) == [("source_hard", 20)]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "awr", "grpo", "ppo"])
def test_a_clean_run_has_none(stage):
    draw, lines = random.Random(0), []
    for step in range(400):
        rate = min(step / 40, 1) * (1 - step / 500)
        loss = 1 + 4 * math.exp(-step / 60)
        lines.append(
            {"loss": loss * draw.gauss(1, 0.08), "grad_norm": 1 + 5 * math.exp(-step / 10) + abs(draw.gauss(0, 0.5)),
             "learning_rate": rate, "kl": min(step / 4000, 0.08) + draw.gauss(0, 0.01), "entropy": 3 - step / 800,
             "reward": min(step / 300, 0.8) + draw.gauss(0, 0.05), "completion_length": 40 - step / 30}
        )  # fmt: skip
        if step % 20 == 19:
            lines.append({"eval_loss": 1.05 * loss, "eval_perplexity": math.exp(1.05 * loss), "gate/exact_match": 0.5})
    assert find(lines, stage) == []


def test_a_fresh_model_is_no_warning():
    perplexities = [math.exp(loss) for loss in (9, 6, 5, 4, 3.5, 3.2)]
    assert find(curve("eval_perplexity", *perplexities), "pretrain") == []
    assert find(curve("grad_norm", *[20.0] * 5, *[9.0] * 40), "pretrain") == []  # below twice its own start


class Counted(list):
    """A curve that counts its points that are looked at one by one; copies of parts of it cost little."""

    looks = 0

    def __iter__(self):
        for point in super().__iter__():
            Counted.looks += 1
            yield point


def test_a_line_costs_no_more_after_many():
    """Of a curve of 30,000 lines, the checks of one line look at few points."""
    draw, watch, looks = random.Random(0), Watch(LIMITS, "pretrain"), []
    watch.curves |= {name: Counted() for name in ("loss", "grad_norm", "learning_rate")}
    for step in range(30_000):
        line = {"loss": draw.gauss(2, 0.01), "grad_norm": draw.gauss(1, 0.01), "learning_rate": 1 - step / 40_000}
        if 1_000 <= step < 29_000:  # without the checks
            for name in ("loss", "grad_norm"):
                watch.curves[name].append((step, line[name]))
            continue
        Counted.looks = 0
        assert not watch.add({"step": step, **line})
        looks.append(Counted.looks)
    assert fmean(looks[1_000:]) < 10 * fmean(looks[:1_000]), (fmean(looks[:1_000]), fmean(looks[1_000:]))


def test_a_symptom_is_reported_again_only_after_it_was_over():
    again = [0.25] * 5 + [0.05] * 14 + [0.25] * 5
    assert find(curve("kl", *again), "grpo") == [("kl_high", 3), ("kl_high", 21)]
    assert find(curve("kl", *[0.25, 0.25, 0.25, 0.15, 0.15, 0.25, 0.25]), "grpo") == [("kl_high", 3)]


def test_healthy_bands_are_those_of_the_guide():
    curves = {"grad_norm": [(1, 2.5)], "eval_perplexity": [(1, 8.0)], "kl": [(1, 0.15)], "entropy": [(1, 1.5)]}
    assert {*outside_bands(curves, "ppo")} == {"grad_norm", "kl", "entropy"}
    assert {*outside_bands(curves, "sft")} == {"grad_norm", "kl"}


NAMES = sorted(
    {pattern.replace("*", "x") for each in load_table()[0].values() for pattern in each.metrics} | {"win_rate", "step"}
)
VALUES = st.none() | st.booleans() | st.text(max_size=3) | st.integers() | st.floats() | st.just([1])
LINES = st.lists(st.dictionaries(st.sampled_from([*NAMES, "learning_rate", "reward_std"]), VALUES), max_size=40)


@settings(max_examples=150, deadline=None)
@given(LINES, st.sampled_from(["pretrain", "sft", "grpo", "ppo"]))
def test_no_history_is_too_strange(lines, stage):
    watch = Watch(LIMITS, stage)
    for step, line in enumerate(lines):
        for event in watch.add({"step": step, **line}):
            assert event.message and event.symptom in load_table()[0]
