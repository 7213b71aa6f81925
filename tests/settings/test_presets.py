"""Shipped presets: what they set for each stage, where, and how a machine's batch fits what everybody else set."""

import os
from functools import cache
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.model import build_config, from_llmlab, measure, new_model
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.presets import HARDWARE_PRESETS, PASSES, RECIPE_FOLDER, SECTIONS, for_stage, presets, read_preset
from llmlab.stages import STAGES

EVERYWHERE = ("quick", "production", "small", "medium", "large")
GUIDE = {  # section 5; pairs from section 2, online (prompts of a rollout, mini-batch, accumulation) from section 4
    "m1_max_64gb": {"rows": (1, 16), "pairs": (1, 16), "online": (16, 1, 16)},
    "rtx_4090": {"rows": (4, 4), "pairs": (2, 8), "online": (16, 2, 8)},
    "a100_40gb": {"rows": (8, 2), "pairs": (4, 4), "online": (16, 4, 4)},
    "a100_80gb": {"rows": (8, 2), "pairs": (8, 2), "online": (32, 8, 2)},
    "multi_gpu_ddp": {"rows": (4, 1), "pairs": (4, 1), "online": (16, 4, 1)},
    "multi_gpu_fsdp": {"rows": (4, 1), "pairs": (4, 1), "online": (16, 4, 1)},
}
MACHINES = {  # device, tf32, checkpointing, workers, length: the issue's
    "m1_max_64gb": ("mps", None, True, 2, 4096),
    "rtx_4080": ("cuda", True, True, 4, 4096),
    "rtx_4090": ("cuda", True, True, 4, 4096),
    "a100_40gb": ("cuda", True, False, 8, 8192),
    "a100_80gb": ("cuda", True, False, 8, 8192),
    "h100_80gb": ("cuda", True, False, 8, 8192),
    "h200_141gb": ("cuda", True, False, 8, 8192),
}


@pytest.fixture(scope="module", autouse=True)
def read_once():
    with patch("llmlab.settings.presets.read_layer", cache(read_layer)):
        yield


def make(stage, *, hardware=None, preset=None, processes=None, machines_own=False, **values):
    world = {} if processes is None else {"WORLD_SIZE": str(processes)}
    below = [read_preset(stage, preset)] if preset else []
    with patch.dict(os.environ, world):
        layers = [Layer("command line", values)]
        return STAGES[stage].resolve(layers, below=below, hardware=hardware, processes=None if machines_own else 1)


def rows_key(stage):
    return "batch_size" if SECTIONS[stage] in ("text", "rows") else "mini_batch_size"


def batch_of(found, stage, processes=1):
    """Rows of a forward pass, forward passes of an optimizer step, and rows of a step on all processes."""
    rows, passes = getattr(found, rows_key(stage)), found.gradient_accumulation_steps
    if SECTIONS[stage] == "pairs":
        passes = found.accumulation(processes)
    return rows, passes, rows * passes * processes


# What each file says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SECTIONS)
@pytest.mark.parametrize("name", HARDWARE_PRESETS)
def test_a_machine_in_each_stage(name, stage):
    processes = 4 if name.startswith("multi") else 1
    resolved = make(stage, hardware=name, processes=processes)
    found, section = resolved.settings, SECTIONS[stage].replace("text", "rows")
    rows, passes, effective = batch_of(found, stage, processes)
    assert effective == 16 and not resolved.warnings
    if name in GUIDE:
        assert (rows, passes) == GUIDE[name][section][-2:]
        assert section != "online" or found.batch_size == GUIDE[name][section][0]
    if name in MACHINES:
        device, tf32, checkpointing, workers, length = MACHINES[name]
        assert (found.device, found.tf32, found.gradient_checkpointing) == (device, tf32, checkpointing)
        assert (found.dataloader_num_workers, found.dtype, found.optimizer) == (workers, "auto", "adamw")
        lengths = {"text": (found.model.max_seq_len, 1024)} if stage == "pretrain" else {}
        where = "max_length" if section == "pairs" else "max_seq_len"
        seen, expected = lengths.get(SECTIONS[stage]) or (getattr(found, where), length)
        assert seen == expected
    if name.startswith("multi"):
        assert found.trainer_args == {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 25}
    assert resolved.sources[rows_key(stage)] == f"hardware {name}" + (", 4 processes" if processes > 1 else "")


def test_names_and_their_files():
    expected = {*MACHINES, *GUIDE, "cpu"}
    assert set(HARDWARE_PRESETS) == expected
    for stage in SECTIONS:
        assert set(EVERYWHERE) <= set(presets(stage))
    assert not presets("merge") and not presets("tokenizer")
    files = [*(RECIPE_FOLDER / "sizes").iterdir(), *(RECIPE_FOLDER / "presets").iterdir()]
    for path in [*files, *HARDWARE_PRESETS.values()]:
        text = path.read_text()
        assert (
            text.startswith("# ") and "`" in text.splitlines()[0] and ("ource" in text or "reasons are ours" in text)
        )
    # what the out-of-memory message may say
    assert read_layer(HARDWARE_PRESETS["m1_max_64gb"]).values["out_of_memory"] == {"max_seq_length": 2048}


@pytest.mark.parametrize(("name", "millions"), [("small", 100), ("medium", 1000), ("large", 7000)])
def test_a_size_has_its_shape(name, millions):
    shape = make("pretrain", preset=name).settings.model
    assert measure(build_config(shape)).total / 1e6 == pytest.approx(millions, rel=0.06)


@pytest.mark.parametrize("name", ["speedrun", "exportable"])
def test_presets_for_speed_are_small_and_one_converts(name):
    """They are for minutes on a CPU, with 5 to 30 million parameters beside a vocabulary of 4,096."""
    shape = make("pretrain", preset=name).settings.model.model_copy(update={"vocab_size": 4096})
    model = new_model(build_config(shape))
    assert 5e6 < model.num_parameters() < 30e6
    if name == "speedrun":
        with pytest.raises(UserError, match="value_embeddings = True, which qwen3 cannot express"):
            from_llmlab(model, "qwen3")
        return
    assert from_llmlab(model, "qwen3").config.model_type == "qwen3"
    plain = new_model(build_config(shape.model_copy(update={"qk_norm": False})))
    assert from_llmlab(plain, "llama").config.model_type == "llama"


SIZES = {  # "Quick Reference" of the LLM-Lab document: learning rate, batch, and the range of steps
    ("small", "pretrain"): (5e-4, 8, 128, 10_000, 50_000),
    ("medium", "pretrain"): (3e-4, 4, 128, 100_000, 500_000),
    ("large", "pretrain"): (1e-4, 1, 128, 500_000, 500_000),
    ("small", "sft"): (1e-5, 4, 64, 3_000, 5_000),
    ("medium", "sft"): (5e-6, 2, 64, 5_000, 10_000),
    ("large", "sft"): (1e-6, 1, 64, 5_000, 10_000),
    **{("small", stage): (2e-5, 16, 64, 5_000, 10_000) for stage in ("dpo", "orpo", "reward", "ppo", "grpo")},
    **{("medium", stage): (1e-5, 32, 128, 10_000, 20_000) for stage in ("dpo", "orpo", "reward", "ppo", "grpo")},
    **{("large", stage): (5e-6, 16, 64, 10_000, 20_000) for stage in ("dpo", "orpo", "reward", "ppo", "grpo")},
}


@pytest.mark.parametrize(("name", "stage"), SIZES)
def test_a_size_in_each_stage(name, stage):
    rate, rows, batch, least, most = SIZES[name, stage]
    resolved = make(stage, preset=name)
    found = resolved.settings
    assert (found.lr if stage == "pretrain" else found.learning_rate) == rate
    assert batch_of(found, stage)[0] == rows and least <= found.max_steps <= most
    assert getattr(found, "epochs", None) is None
    # `batch_size` of online stages is a rollout
    assert (found.batch_size if SECTIONS[stage] == "online" else batch_of(found, stage)[2]) == batch
    assert not resolved.warnings and resolved.sources["max_steps"] == f"preset {name}"


@pytest.mark.parametrize("stage", SECTIONS)
def test_quick_and_production_in_each_stage(stage):
    quick, production = (make(stage, preset=name) for name in ("quick", "production"))
    assert not quick.warnings and not production.warnings
    assert batch_of(quick.settings, stage) == (1, 8, 8)
    assert batch_of(production.settings, stage) == ((4, 16, 64) if stage == "pretrain" else (4, 4, 16))
    quick, production, online = quick.settings, production.settings, SECTIONS[stage] == "online"
    assert (quick.eval_every, production.eval_every) == (50, 100)
    assert (production.save_total_limit, production.save_best_only) == (5, True)
    if stage == "pretrain":
        assert quick.max_steps * 8 == 1000 and (quick.lr, production.lr) == (6e-4, 3e-4)
        return
    assert (quick.epochs, quick.max_samples, quick.save_every, production.save_every) == (1, 1000, 100, 200)
    assert (quick.learning_rate, production.learning_rate) == ((2e-6, 1e-6) if online else (1e-5, 5e-6))
    assert production.num_episodes == 50_000 if online else production.epochs == 3


# How layers meet -----------------------------------------------------------------------------------------------------


def test_a_machine_fills_only_what_is_unset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("max_seq_len: 99\ntrainer_args: {ddp_bucket_cap_mb: 7}\n")
    layers = [read_layer(path), Layer("command line", {"optimizer": "lion", "gradient_checkpointing": False})]
    below = [read_preset("sft", "small")]
    with patch.dict(os.environ, {"WORLD_SIZE": "4"}):
        resolved = STAGES["sft"].resolve(layers, below=below, hardware="multi_gpu_ddp")
    found, sources = resolved.settings, resolved.sources
    assert (found.max_seq_len, sources["max_seq_len"]) == (99, f"{path}:1")
    assert (found.optimizer, found.gradient_checkpointing) == ("lion", False)
    assert (found.tf32, sources["tf32"]) == (True, "hardware multi_gpu_ddp, 4 processes")
    assert (found.learning_rate, sources["learning_rate"]) == (1e-5, "preset small")
    assert found.trainer_args == {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 7}
    # the size's effective batch of 64 stays: 4 x 4 x 4 processes
    assert batch_of(found, "sft", 4) == (4, 4, 64) and sources["batch_size"] == "preset small"


@pytest.mark.parametrize(
    ("stage", "values", "expected"),
    [
        ("sft", {}, (4, 4)),
        ("sft", {"batch_size": 2}, (2, 8)),
        ("sft", {"per_device_train_batch_size": 8}, (8, 2)),
        ("sft", {"gradient_accumulation_steps": 2}, (8, 2)),
        ("sft", {"batch_size": 5, "gradient_accumulation_steps": 7}, (5, 7)),
        ("pretrain", {"batch_size": 16}, (16, 1)),
        ("dpo", {"batch_size": 64}, (2, 32)),
        ("dpo", {"mini_batch_size": 8}, (8, 2)),
        ("dpo", {"gradient_accumulation_steps": 4}, (4, 4)),
        ("dpo", {"batch_size": 12, "gradient_accumulation_steps": 4}, (3, 4)),
        ("dpo", {"batch_size": 7}, (1, 7)),
        ("ppo", {"mini_batch_size": 8}, (8, 2)),
        ("grpo", {"batch_size": 6, "group_size": 3}, (2, 9)),  # 18 completions: 18 a step is nearer to 16 than 9
    ],
)
def test_the_effective_batch_is_kept_around_what_is_set(stage, values, expected):
    resolved = make(stage, hardware="rtx_4090", **values)
    assert batch_of(resolved.settings, stage)[:2] == expected


def test_the_nearest_batch_is_said():
    resolved = make("sft", hardware="rtx_4090", batch_size=3)
    assert batch_of(resolved.settings, "sft") == (3, 5, 15)
    assert resolved.warnings == ("hardware rtx_4090: an effective batch of 15 (3 x 5) is the nearest to 16",)
    resolved = make("grpo", hardware="rtx_4090", group_size=3, mini_batch_size=8)
    assert resolved.settings.batch_size == 16  # 48 completions are 3 steps of 16
    resolved = make("ppo", hardware="rtx_4090", mini_batch_size=5)
    assert resolved.settings.batch_size == 15 and len(resolved.warnings) == 2


def test_several_processes():
    assert batch_of(make("sft", hardware="multi_gpu_ddp", processes=2).settings, "sft", 2) == (4, 2, 16)
    assert batch_of(make("sft", hardware="rtx_4090", processes=2).settings, "sft", 2) == (4, 2, 16)
    assert batch_of(make("sft", hardware="multi_gpu_fsdp", processes=8).settings, "sft", 8) == (2, 1, 16)
    alone = make("sft", hardware="multi_gpu_fsdp")
    assert batch_of(alone.settings, "sft") == (4, 4, 16)
    assert "it is for several processes, such as 4: start them with --accelerate fsdp2" in alone.warnings[0]
    planned = make("dpo", hardware="multi_gpu_ddp", machines_own=True)
    assert batch_of(planned.settings, "dpo", 4) == (4, 1, 16) and not planned.warnings
    assert planned.sources["batch_size"] == "hardware multi_gpu_ddp, 4 processes"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_choice_keeps_the_effective_batch_or_the_nearest(data):
    stage = data.draw(st.sampled_from(sorted(SECTIONS)))
    pairs, online, rows = SECTIONS[stage] == "pairs", SECTIONS[stage] == "online", rows_key(stage)
    hardware = data.draw(st.sampled_from(sorted(HARDWARE_PRESETS)))
    preset = data.draw(st.sampled_from([None, *EVERYWHERE]))
    processes = data.draw(st.integers(1, 6))
    keys = [rows, PASSES, *(["batch_size"] if pairs or online else [])]
    values = {key: data.draw(st.integers(1, 40)) for key in sorted(data.draw(st.sets(st.sampled_from(keys))))}
    if stage == "grpo" and data.draw(st.booleans()):
        values["group_size"] = data.draw(st.integers(2, 6))
    wanted = batch_of(make(stage, preset=preset).settings, stage)[2] if preset else 16
    wanted = values.get("batch_size", wanted) if pairs else wanted
    group = values.get("group_size", 4) if stage == "grpo" else 1
    completions = values.get("batch_size", 0) * group if online else 0

    # all that is possible: multiples of what the user chose that are, exactly, a pairs' batch or parts of a rollout
    unit = values.get(rows, 1) * values.get(PASSES, 1) * processes
    steps = (unit * k for k in range(1, 2 * -(-wanted // unit) + 1))
    exact = pairs and "batch_size" in values
    possible = [update for update in steps if completions % update == 0 and (update == wanted or not exact)]
    try:
        resolved = make(stage, hardware=hardware, preset=preset, processes=processes, **values)
        found = resolved.settings
        update = batch_of(found, stage, processes)[2]
        if online:
            found.rollout(processes)
    except UserError:
        assert not possible or {rows, PASSES} <= values.keys()
        return
    assert all(getattr(found, key) == value for key, value in values.items())
    if not {rows, PASSES} <= values.keys():
        assert abs(update - wanted) == min(abs(other - wanted) for other in possible)
        assert (update != wanted) == any("an effective batch" in note for note in resolved.warnings)


@pytest.mark.parametrize("value", [0, -3, "many", 2.5])
def test_what_is_no_batch_is_said_as_ever(value):
    with pytest.raises(SettingsError, match=r"command line: batch_size = .*: expected"):
        make("sft", hardware="rtx_4090", batch_size=value)


def test_unknown_names():
    with pytest.raises(UserError, match="hardware rtx_409: expected one of auto, .*; did you mean 'rtx_4090'"):
        make("sft", hardware="rtx_409")
    with pytest.raises(UserError, match="preset smal: expected one of .*; did you mean 'small'"):
        make("sft", preset="smal")


def test_the_machine_at_hand():
    found = make("sft", hardware="auto", device="cpu")
    assert found.sources["batch_size"].startswith("hardware ")


@pytest.mark.parametrize("path", [*(RECIPE_FOLDER / "sizes").iterdir(), *(RECIPE_FOLDER / "presets").iterdir()])
@pytest.mark.parametrize("stage", SECTIONS)
def test_preset_files_are_settings_files_too(path, stage):
    resolved = STAGES[stage].resolve([for_stage(read_layer(path), stage)], below=[])
    assert resolved.settings == make(stage, preset=path.stem).settings
