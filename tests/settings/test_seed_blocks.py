"""Every fenced block of the seed documents, as printed: what it is, where it loads, and what it says there."""

import json
import re
from pathlib import Path

import pytest

from llmlab.data.chat.conversations import recognize
from llmlab.rewards.compose import compose
from llmlab.settings.files import read_layer
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES

BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", Path(__file__).with_name("seed_blocks.md").read_text(), re.S | re.M)
CONFIGURATIONS = {block.split()[0]: block for block in BLOCKS if re.match(r"\w+ = \{", block)}

ONLINE = ("grpo", "ppo")
PAIRS = ("dpo", "orpo", "reward")
OFFLINE = ("rs-sft", "awr")
TUNING = ("sft", *PAIRS, *ONLINE, *OFFLINE)
EVERY = ("pretrain", *TUNING)

STAGES_OF = {
    "lora_config": TUNING,  # "All Stages" of the guide, whose first one starts from a trained model
    **dict.fromkeys(("base_config", "m1_config", "rtx4090_config", "a100_config", "multi_gpu_config"), EVERY),
    **dict.fromkeys(("quick_config", "prod_config"), EVERY),
    "orpo_config": ("orpo",),
    "dpo_config": ("dpo",),
    "ppo_config": ("ppo",),
    "grpo_config": ("grpo",),
    "reward_weights": (*ONLINE, *OFFLINE),
    "reward_config": ONLINE,
    "rssft_config": ("rs-sft",),
    "awr_config": ("awr",),
}
CASES = [(name, stage) for name, stages in STAGES_OF.items() for stage in stages]


def load(folder, stage, *names):
    """Resolves blocks as they are printed, each a Python file, later ones winning."""
    for name in names:
        (folder / f"{name}.py").write_text(CONFIGURATIONS[name], encoding="utf-8")
    return resolve(STAGES[stage].settings_class, *(read_layer(folder / f"{name}.py") for name in names))


def keys_of(name):
    return set(re.findall(r'^    "(\w+)":', CONFIGURATIONS[name], re.M))


def unused(resolved):
    """Returns the keys that a warning says have no effect."""
    return {key for line in resolved.warnings if "no effect here" in line for key in re.findall(r"'(\w+)'", line)}


def test_every_configuration_is_known():
    assert STAGES_OF.keys() == CONFIGURATIONS.keys()


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_block_loads_as_printed_in_each_stage_that_it_is_for(name, stage, tmp_path):
    resolved = load(tmp_path, stage, name)
    assert len(resolved.warnings) <= 2, resolved.warnings  # what has no effect is one line
    without_effect = {
        "lora_config": {"task_type"},
        "multi_gpu_config": {"distributed_strategy", "num_processes"},
        "grpo_config": {"vf_coef", "gamma", "lam"},
        "reward_weights": {"max_possible", "min_possible"},
        "quick_config": {"num_train_epochs", "save_steps", "max_samples"} if stage == "pretrain" else set(),
        "prod_config": {"pretrain": {"num_train_epochs", "save_steps"}}.get(
            stage, {"metric_for_best_model"} if stage in ONLINE else set()
        ),
    }
    assert unused(resolved) == without_effect.get(name, set())


@pytest.mark.parametrize("stage", EVERY)
@pytest.mark.parametrize(
    ("name", "batch", "accumulation", "length", "checkpointing", "workers", "dtype"),
    [
        ("m1_config", 1, 16, 4096, True, 2, "fp16"),
        ("rtx4090_config", 4, 4, 4096, True, 4, "auto"),
        ("a100_config", 8, 2, 8192, False, 8, "auto"),
    ],
)
def test_hardware_blocks(stage, name, batch, accumulation, length, checkpointing, workers, dtype, tmp_path):
    settings = load(tmp_path, stage, name).settings
    found = settings.trainer_arguments()
    assert (found["per_device_train_batch_size"], settings.gradient_accumulation_steps) == (batch, accumulation)
    assert (found["gradient_checkpointing"], found["dataloader_num_workers"]) == (checkpointing, workers)
    assert (settings.dtype, settings.tf32, settings.optimizer) == (
        dtype,
        None if name == "m1_config" else True,
        "adamw",
    )
    assert settings.device == ("mps" if name == "m1_config" else "cuda")
    where = settings.model if stage == "pretrain" else settings
    assert (where.max_length if stage in PAIRS else where.max_seq_len) == length


@pytest.mark.parametrize("stage", TUNING)
def test_quick_and_production_blocks(stage, tmp_path):
    quick = load(tmp_path, stage, "quick_config")
    assert (quick.settings.epochs, quick.settings.max_samples, quick.settings.learning_rate) == (1, 1000, 1e-5)
    assert (quick.settings.eval_every, quick.settings.save_every) == (50, 100)
    production = load(tmp_path, stage, "prod_config").settings
    assert (production.epochs, production.eval_every, production.save_every) == (3, 100, 200)
    assert (production.save_total_limit, production.save_best_only) == (5, True)
    # where `eval_steps` counts batches elsewhere, the run says that it does not here
    said = [line for line in quick.warnings if "eval_steps = 50 is set beside save_steps" in line]
    assert len(said) == (1 if stage == "sft" else 0)


@pytest.mark.parametrize("stage", TUNING)
def test_lora_block(stage, tmp_path):
    resolved = load(tmp_path, stage, "lora_config")
    settings = resolved.settings
    assert settings.use_lora and (settings.lora_r, settings.alpha, settings.lora_bias) == (16, 32, "none")
    assert settings.lora_preset == "custom" and len(settings.lora_target_modules) == 7
    assert settings.lora_dropout == (0.0 if stage == "ppo" else 0.05)
    assert sum("lora_dropout" in line for line in resolved.warnings) == (1 if stage == "ppo" else 0)


def test_several_processes(tmp_path):
    settings = load(tmp_path, "sft", "multi_gpu_config").settings
    assert settings.trainer_args == {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 25}


@pytest.mark.parametrize("stage", ONLINE)
def test_reward_blocks(stage, tmp_path):
    weights = load(tmp_path, stage, "reward_weights").settings.all_rewards()
    # "max_possible = 6.5, min_possible = -2.5"
    reward = compose(weights)
    assert {name: part.weight for name, part in reward.components.items()}["guardrail_pass"] == 2.0
    assert len(reward.components) == 8 and reward.bounds == (-2.5, 6.5)
    assert load(tmp_path, stage, "reward_config").settings.init_kl_coef == 0.05


@pytest.mark.parametrize("stage", EVERY)
def test_blocks_of_one_run_merge_and_the_later_wins(stage, tmp_path):
    own = {"dpo": ["dpo_config"], "orpo": ["orpo_config"], "ppo": ["ppo_config"], "grpo": ["grpo_config"]}
    lora = ["lora_config"] if stage != "pretrain" else []
    for last in ("quick_config", "prod_config"):
        for machine in ("m1_config", "rtx4090_config", "a100_config"):
            settings = load(tmp_path, stage, "base_config", *lora, *own.get(stage, []), machine, last).settings
            # num_episodes of the stage's own block gave way to the epochs of the last
            epochs = {"quick_config": 1, "prod_config": 3}[last]
            assert stage == "pretrain" or (settings.epochs, getattr(settings, "num_episodes", None)) == (epochs, None)
            assert settings.seed == 42 and settings.device in ("mps", "cuda")


def test_all_fields_of_rlhf_config_load_in_each_of_its_algorithms(tmp_path):
    """The LLM-Lab document keeps PPO, DPO and GRPO in one file, which it does not print: every field it documents."""
    lora = {"use_lora": True, "lora_preset": "minimal", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    path = tmp_path / "rlhf_config.json"
    path.write_text(
        json.dumps(
            {
                **{"policy_checkpoint": "runs/sft", "reference_checkpoint": None, "reward_model_name": "some/model"},
                **{"ppo_epochs": 4, "clip_range": 0.2, "vf_coef": 0.1, "gamma": 1.0, "gae_lambda": 0.95},
                **{"batch_size": 128, "mini_batch_size": 32, "max_new_tokens": 128, "temperature": 0.9, "top_k": 0},
                **{"top_p": 1.0, "group_size": 4, "grpo_temperature": 1.1, **lora, "lora_target_modules": None},
                **{"optimizer": "adamw", "adamw_beta1": 0.9, "muon_momentum": 0.95, "sophia_rho": 0.04},
                **{"learning_rate": 1.4e-5, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_steps": 10000},
                **{"log_every": 10, "save_every": 500, "eval_every": 500, "datasets": ["Anthropic/hh-rlhf"]},
            }
        )
    )
    online = {"reward_model_name", "ppo_epochs", "max_new_tokens", "top_k", "top_p"}
    values, group = {"vf_coef", "gamma", "gae_lambda"}, {"group_size", "grpo_temperature"}
    expected = {"ppo": group, "grpo": values | {"temperature"}, "dpo": online | values | group | {"temperature"}}
    for stage, foreign in expected.items():
        resolved = resolve(STAGES[stage].settings_class, read_layer(path))
        assert unused(resolved) == foreign, stage
        assert len([line for line in resolved.warnings if "no effect" in line]) == 1
        assert resolved.settings.learning_rate == 1.4e-5 and resolved.settings.batch_size == 128
    assert resolved.settings.beta == 0.2  # "Beta (clip_range reused)"
    assert resolve(STAGES["grpo"].settings_class, read_layer(path)).settings.grpo_temperature == 1.1
    assert resolve(STAGES["ppo"].settings_class, read_layer(path)).settings.temperature == 0.9


def test_rows_and_sources_of_the_llm_lab_document():
    rows = [json.loads(block) for block in BLOCKS if block.startswith("{")]
    assert [recognize(row, "here").name for row in rows[:3]] == [
        "messages",
        "instruction/response",
        "prompt/completion",
    ]
    assert rows[3].keys() == {"prompt", "chosen", "rejected"}
    lines = next(block for block in BLOCKS if block.startswith("HuggingFaceFW")).splitlines()
    sources = STAGES["pretrain"].settings_class(datasets=lines).datasets
    assert [(source.subset, source.weight) for source in sources] == [(None, 1), ("fra_Latn", 1), ("spa_Latn", 2)]
