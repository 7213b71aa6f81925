"""What a history shows: each condition on one made for it, nothing on a healthy one, changes that are valid."""

import math

import pytest

from llmlab.health.advice import URGENCY, History, changed, diagnose, own_settings, propose
from llmlab.health.symptoms import Event, load_table
from llmlab.settings import settings_class
from llmlab.settings.files import Layer
from llmlab.settings.sources import resolve

STEPS = range(10, 210, 10)


def history(stage="sft", events=(), status="finished", metrics=None, settings=None, **curves):
    made = resolve(settings_class(stage), Layer("run", {"datasets": ["demo/chat"], **(settings or {})})).settings
    points = {name.replace("__", "/"): list(zip(STEPS, values, strict=False)) for name, values in curves.items()}
    return History(stage, made, points, events, status, "", metrics or {})


def falling(start, end, count=20):
    """An exponential approach, as losses have it."""
    return [end + (start - end) * math.exp(-number / 4) for number in range(count)]


def conditions(**run):
    return list(diagnose(history(**run)))


def noisy(values, size):
    return [value + size * (-1) ** number for number, value in enumerate(values)]


@pytest.mark.parametrize(
    "run",
    [
        {"loss": falling(3, 1), "eval_loss": falling(3, 1.2), "grad_norm": [1.5] * 20},
        {"loss": noisy([0.05] * 20, 0.01), "grad_norm": [0.3] * 20},  # nothing left to learn
        {"stage": "dpo", "loss": falling(0.69, 0.3), "eval_win_rate": [0.5, 0.7, 0.8]},
        {
            "stage": "grpo",
            "reward": noisy([0.3 + 0.02 * n for n in range(20)], 0.02),
            "zero_variance_share": [0.4] * 20,
        },
        {"stage": "grpo", "reward": [0.97] * 20, "zero_variance_share": [0.9] * 20, "metrics": {"reward": 0.97}},
        {"stage": "ppo", "reward": [0.1, 0.1], "kl": [0.05] * 20, "entropy": [0.1] * 20},  # too few rewards
        {"loss": [2.0]},
        {},
    ],
)
def test_healthy_runs_are_said_to_be_healthy(run):
    assert conditions(**run) == []


@pytest.mark.parametrize(
    ("condition", "run", "words"),
    [
        (
            "overfitting",
            {"loss": falling(3, 0.2), "eval_loss": [2.0, 1.5, 1.4, 1.6, 1.9]},
            "validation loss rose from 1.4 at step 30, its best, to 1.9 at step 50",
        ),
        ("underfitting", {"loss": falling(3, 2.95)}, "training loss fell by 1.6% alone, from 3 to 2.9"),
        ("underfitting", {"loss": falling(3, 1), "eval_loss": [3.0, 2.5, 2.0, 1.6, 1.2]}, "still fell by 25.0%"),
        (
            "underfitting",
            {
                "stage": "pretrain",
                "loss": falling(7, 5),
                "eval_loss": [5.3, 5.2],
                "metrics": {"unigram_entropy": 5.19},
            },
            "validation loss 5.2 is hardly below the entropy of token counts, 5.19",
        ),
        ("unstable", {"loss": falling(3, 1, 10) + [2.0] * 10}, "training loss rose from"),
        ("unstable", {"loss": [1.1, 1.5, 2.3, 1.8, 1.2, 0.9]}, "jumped from 1.1 at step 10 to 2.3 at step 30"),
        ("unstable", {"status": "diverged"}, "not finite"),
        (
            "alike",
            {"stage": "grpo", "zero_variance_share": [0.8] * 20, "metrics": {"reward": 0.2}},
            "in 80% of the groups all completions have the same reward",
        ),
        ("reward_flat", {"stage": "ppo", "reward": noisy([0.3] * 20, 0.02)}, "no more than its noise"),
        (
            "preference",
            {"stage": "dpo", "loss": falling(0.69, 0.3), "eval_win_rate": [0.61, 0.6, 0.6]},
            "the win rate went from 61.0% to 60.0%",
        ),
        (
            "data",
            {"loss": falling(3, 1), "eval_loss": [2.0, 1.5], "eval_loss__a": [1.0, 0.2], "eval_loss__b": [4.0, 4.1]},
            "loss of b went from 4 to 4.1, of all sources from 2 to 1.5",
        ),
    ],
)
def test_each_condition_with_its_evidence(condition, run, words):
    found = diagnose(history(**run))
    assert any(words in sentence for sentence in found[condition]), found


def test_adapters_are_named_where_they_do_not_improve():
    found = diagnose(history(loss=falling(3, 2.95), settings={"lora_r": 4}))
    assert "with adapters of rank 4 (minimal)" in found["underfitting"][0]
    kind = settings_class("sft")
    changes = propose(kind, {"datasets": ["demo/chat"], "lora_r": 4, "lora_alpha": 8}, list(found))
    assert changes["lora_r"] == (4, 8) and changes["lora_alpha"] == (8, 16)
    assert changes["lora_preset"] == ("minimal", "all") and changes["learning_rate"] == (5e-6, 1e-5)


def test_events_are_evidence_too_and_the_urgent_comes_first():
    events = [Event(step, "loss_spike", "loss", 9.0, f"loss jumped to {step}", "warning") for step in range(1, 6)]
    events.append(Event(9, "unknown of a later version", "loss", 1.0, "?"))
    found = diagnose(history(events=events, loss=falling(3, 2.95)))
    assert list(found) == ["unstable", "underfitting"]
    assert found["unstable"] == [*(f"step {n}: loss jumped to {n}" for n in (1, 2, 3)), "and 2 more such events"]
    own = {"datasets": ["demo/chat"], "learning_rate": 1e-4}
    assert propose(settings_class("sft"), own, list(found))["learning_rate"] == (1e-4, 5e-5)


def test_conditions_are_those_of_the_table():
    assert set(URGENCY) == set(load_table()[1])


def test_only_valid_changes_are_proposed():
    """Epochs and steps are one quantity, PPO has no dropout, and custom targets stay."""
    sft = {"datasets": ["demo/chat"], "epochs": 3, "lora_target_modules": ["q_proj"]}
    changes = propose(settings_class("sft"), sft, ["underfitting"])
    assert changes["epochs"] == (3, 5) and "max_steps" not in changes and "lora_preset" not in changes
    ppo = {"datasets": ["demo/chat"], "lora_r": 8, "batch_size": 4, "mini_batch_size": 4}
    changes = propose(settings_class("ppo"), ppo, ["overfitting", "unstable"])
    assert "lora_dropout" not in changes and "gradient_accumulation_steps" not in changes
    pretrain = {"model": {"dropout": 0.05}}
    changes = propose(settings_class("pretrain"), pretrain, ["overfitting"])
    assert changes["model.dropout"] == (0.05, 0.1)
    assert changed(pretrain, {"model.dropout": 0.1}) == {"model": {"dropout": 0.1}}


def test_own_settings_are_those_that_somebody_set():
    recorded = {"lr": 1e-3, "seed": 42, "model": {"d_model": 64, "n_layers": 2}, "max_steps": 5}
    sources = {"lr": "x.yaml:1", "seed": "default", "model.d_model": "command line", "max_steps": "implied"}
    kind = settings_class("pretrain")
    assert own_settings(kind, recorded, sources) == {"lr": 1e-3, "model": {"d_model": 64}}


@pytest.mark.parametrize("status", ["running", "interrupted", "died"])
def test_a_run_that_is_not_finished_does_not_underfit(status):
    """Its loss falls later: rates are still warming up, and steps are left."""
    assert not diagnose(history(loss=falling(3, 2.95), eval_loss=[3.0, 2.5, 2.0], status=status))
    assert not diagnose(history(stage="ppo", reward=noisy([0.3] * 20, 0.02), status=status))


@pytest.mark.parametrize(
    ("stage", "loss"),
    [
        ("sft", [1.109, 1.739, 1.579, 1.183, 1.275, 0.98, 0.884, 0.855, 1.006, 0.92, 1.112]),  # one batch a value
        ("reward", [0.7, 0.5, 0.3, 0.1, 0.0002, 0.43, 0.01, 0.3, 0.02, 0.2, 0.01]),  # pairs: near 0, and noisy
    ],
)
def test_noise_is_no_instability(stage, loss):
    assert not diagnose(history(stage=stage, loss=loss))
