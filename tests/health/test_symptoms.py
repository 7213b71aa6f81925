"""The table of symptoms: complete, and its changes are the guides' examples."""

import pytest

from llmlab.health.symptoms import Change, changes_of, load_table
from llmlab.settings import settings_class
from llmlab.settings.base import spellings_of


def settings(stage, **values):
    return settings_class(stage)(datasets=["demo/chat"], output_dir="run", policy_checkpoint="base", **values)


def test_every_symptom_has_a_condition_and_every_change_a_setting():
    symptoms, conditions = load_table()
    assert {symptom.condition for symptom in symptoms.values()} == set(conditions)
    known = set().union(*(spellings_of(settings_class(stage)) for stage in ("pretrain", "sft", "ppo", "grpo", "dpo")))
    assert {change.setting for each in conditions.values() for change in each.changes} <= known


def test_changes_are_those_of_the_guide():
    guide = {"learning_rate": 5e-6, "use_lora": True, "lora_r": 16, "epochs": 3, "weight_decay": 0.01}
    sft = settings("sft", **guide, lora_dropout=0.05)
    more, less = changes_of("underfitting", sft), changes_of("overfitting", sft)
    assert more["learning_rate"] == (5e-6, 1e-5) and more["lora_r"] == (16, 32) and more["epochs"] == (3, 5)
    assert less["learning_rate"] == (5e-6, 3e-6) and less["epochs"] == (3, 2)
    assert less["weight_decay"] == (0.01, 0.05) and less["lora_dropout"] == (0.05, 0.1)
    ppo = settings("ppo", learning_rate=1e-6)
    assert changes_of("drift", ppo) == {
        "init_kl_coef": (0.05, 0.1),
        "learning_rate": (1e-6, 5e-7),
        "clip_range": (0.2, 0.1),
    }
    assert changes_of("unstable", ppo)["max_grad_norm"] == (1.0, 0.5)
    own_rate = settings("sft", embedding_lr=0.2)
    assert changes_of("unstable", own_rate)["embedding_lr"] == (0.2, 0.1)
    assert "head_lr" not in changes_of("unstable", own_rate)


def test_lora_settings_change_only_where_lora_is_used():
    assert not {name for name in changes_of("underfitting", settings("sft")) if name.startswith("lora_")}


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (Change("a", times=0.5), 3, 2),
        (Change("a", times=2, at_most=5), 4, 5),
        (Change("a", times=2, at_most=5), 7, 7),
        (Change("a", times=0.5, at_least=0.1), 0.05, 0.05),
        (Change("a", to="bf16", source="fp16"), "fp16", "bf16"),
        (Change("a", to="bf16", source="fp16"), "fp32", "fp32"),
        (Change("a", times=2), None, None),
    ],
)
def test_bounds_of_a_change(change, before, after):
    assert change.apply(before) == after
