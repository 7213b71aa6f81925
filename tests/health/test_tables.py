"""The seeds' tables: every printed band is there, what the user set outside is named, shipped recipes are quiet."""

import pytest
import yaml

from llmlab.health.tables import bands_for, find_outside, load_bands
from llmlab.settings import settings_class
from llmlab.settings.base import spellings_of
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.presets import RECIPE_FOLDER, for_stage, presets
from llmlab.stages import STAGES

TINY, SMALL, MEDIUM, LARGE = 7e5, 1.35e8, 1e9, 7e9
PRINTED = {  # setting, stage, parameters: bands that the seeds print
    ("beta", "dpo", 0): [(0.01, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.5), (0.5, float("inf")), (0.1, 0.5)],
    ("beta", "orpo", 0): [(0.05, 0.2)],
    ("advantage_beta", "awr", 0): [(1, 3), (3, 5), (5, 10), (10, float("inf"))],
    ("learning_rate", "ppo", LARGE): [(5e-7, 5e-6), (1e-6, 5e-5), (1e-6, 5e-6)],
    ("learning_rate", "dpo", MEDIUM): [(1e-6, 1e-5)],
    ("clip_range", "ppo", 0): [(0.1, 0.3)],
    ("ent_coef", "grpo", 0): [(0.001, 0.1)],
    ("init_kl_coef", "ppo", 0): [(0.01, 0.1)],
    ("ppo_epochs", "ppo", 0): [(2, 8)],
    ("group_size", "grpo", 0): [(2, 8)],
    ("grpo_temperature", "grpo", 0): [(0.7, 1.2)],
    ("gamma", "ppo", 0): [(0.9, 1.0)],
    ("gae_lambda", "ppo", 0): [(0.9, 0.99)],
    ("effective batch", "pretrain", SMALL): [(64, 512)],
    ("effective batch", "sft", SMALL): [(16, 128)],
    ("effective batch", "grpo", LARGE): [(64, 256)],
    ("lora_r", "sft", 0): [(4, 8), (8, 16), (32, 64)],
    ("lora_r", "dpo", 0): [(16, 32)],
    ("lora_alpha / lora_r", "sft", 0): [(2, 2)],
    ("lora_dropout", "sft", 0): [(0.0, 0.1)],
    ("learning_rate", "pretrain", SMALL): [(5e-4, 1e-3)],
    ("learning_rate", "pretrain", MEDIUM): [(1e-4, 3e-4)],
    ("learning_rate", "pretrain", LARGE): [(3e-5, 1e-4)],
    ("learning_rate", "sft", MEDIUM): [(1e-6, 1e-5)],
    ("max_steps", "pretrain", SMALL): [(10000, 50000)],
    ("max_steps", "sft", SMALL): [(2000, 10000), (3000, 5000)],
    ("max_steps", "grpo", LARGE): [(5000, 20000), (10000, 20000)],
    ("max_grad_norm", "sft", 0): [(0.5, 2.0)],
    ("weight_decay", "pretrain", 0): [(0.01, 0.1)],
    ("adamw_beta2", "sft", 0): [(0.95, 0.999)],
    ("muon_momentum", "pretrain", 0): [(0.9, 0.95)],
    ("sophia_rho", "pretrain", 0): [(0.03, 0.05)],
}


def outside(stage, parameters=SMALL, **values):
    layer = Layer("x.yaml", {"datasets": ["demo/chat"], **values})
    resolved = STAGES[stage].resolve([layer], below=[])
    return find_outside(stage, resolved.settings, resolved.sources, parameters=parameters, processes=1)


def test_every_printed_band_is_there():
    for (setting, stage, parameters), printed in PRINTED.items():
        found = {(band.low, band.high) for band in bands_for(stage, setting, parameters)}
        assert found >= set(printed), (setting, stage)


def test_every_band_is_of_a_setting_and_has_a_source():
    for band in load_bands()[0]:
        assert band.source.startswith(("LLM-Lab", "guide")) and band.low <= band.high
        for stage in band.stages:
            assert " " in band.setting or band.setting in spellings_of(settings_class(stage)), (band.setting, stage)


@pytest.mark.parametrize(
    ("stage", "values", "words"),
    [
        (
            "dpo",
            {"beta": 0.8},
            "beta = 0.8: above the usual 0.01 to 0.5 of dpo, which keeps the policy so close to its reference",
        ),
        ("awr", {"advantage_beta": 12}, "overfitting to outliers"),
        ("awr", {"advantage_beta": 0.5}, "advantage_beta = 0.5: below the usual 1 to 10"),
        ("sft", {"learning_rate": 1e-3}, "above the usual 1e-06 to 0.0001 of sft; recommended 1e-05"),
        ("sft", {"lora_r": 8, "lora_alpha": 64}, "lora_alpha / lora_r = 8: above the usual 2"),
        ("sft", {"batch_size": 1, "gradient_accumulation_steps": 2}, "effective batch = 2: below the usual 16 to 128"),
        ("ppo", {"ppo_epochs": 16}, "ppo_epochs = 16: above the usual 2 to 8 of ppo; recommended 4"),
        ("pretrain", {"optimizer": "sophia", "sophia_rho": 0.2}, "above the usual 0.03 to 0.05"),
        ("pretrain", {"grad_clip": 0}, "max_grad_norm = 0: below the usual 0.5 to 2"),
    ],
)
def test_what_lies_outside_is_one_sentence(stage, values, words):
    (sentence,) = outside(stage, **values)
    assert words in sentence


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        *((stage, {}) for stage in ("pretrain", "sft", "dpo", "orpo", "awr", "rs-sft", "ppo", "grpo")),
        ("dpo", {"beta": 0.5}),
        ("sft", {"learning_rate": 5e-4, "lora_r": 8}),  # adapters take ten times the rate
        ("ppo", {"init_kl_coef": 0, "ent_coef": 0}),  # off
        ("sft", {"max_steps": 20}),  # a trial
    ],
)
def test_defaults_and_usual_values_are_quiet(stage, values):
    assert not outside(stage, **values)


def test_what_depends_on_the_size_is_not_judged_for_tiny_or_unknown_models():
    assert not outside("sft", TINY, learning_rate=1e-2, batch_size=1) and not outside("sft", 0, learning_rate=1e-2)
    assert len(outside("sft", TINY, max_grad_norm=9.0)) == 1


def stages_of(path):
    values = yaml.safe_load(path.read_text())
    for name, stage in values["stages"].items() if "stages" in values else [(values.get("stage"), values)]:
        kind = stage.get("stage", (name or "").replace("_", "-"))
        if kind in STAGES and STAGES[kind].resumes:
            yield kind, {key: "runs/x" if "${" in str(value) else value for key, value in stage.items()}


def test_shipped_recipes_are_quiet_at_their_models():
    """But for the guide's configuration for rapid experimentation, whose batch is `smaller for speed`."""
    unusual = {"quick.yaml": ["effective batch = 8"]}
    folder, seen = RECIPE_FOLDER, 0
    for path in sorted(folder.rglob("*.yaml")):
        kind = path.relative_to(folder).parts[0]
        if kind in ("cluster", "hardware", "presets", "sizes"):
            continue
        size = {"rl_guide": LARGE, "tool_agent.yaml": SMALL}.get(kind, TINY)
        for stage, values in stages_of(path):
            layer = for_stage(Layer(str(path), values, path=path), stage)
            resolved = STAGES[stage].resolve([layer], below=[])
            found = find_outside(stage, resolved.settings, resolved.sources, parameters=size, processes=1)
            assert [line[:19] for line in found] == unusual.get(path.name, []), path
            seen += 1
    assert seen > 10


def test_presets_are_not_the_users():
    for stage in ("pretrain", "sft", "dpo", "grpo"):
        for name, path in presets(stage).items():
            if path.parent.name in ("presets", "sizes"):
                layer = for_stage(read_layer(path), stage)
                resolved = STAGES[stage].resolve([], below=[Layer(f"preset {name}", layer.values, path=path)])
                sources = {key: f"preset {name}" if str(path) in at else at for key, at in resolved.sources.items()}
                assert not find_outside(stage, resolved.settings, sources, parameters=SMALL, processes=1)
