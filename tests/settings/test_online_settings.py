"""Settings of the stages that learn from their own completions: the seeds' blocks, sizes, units, contradictions."""

import re

import pytest

from llmlab.settings.base import spellings_of
from llmlab.settings.errors import SettingsError
from llmlab.settings.files import Layer
from llmlab.settings.rewards import SEED_REWARD_MODEL
from llmlab.settings.rl import GRPOSettings, Rollout
from llmlab.settings.sources import resolve

GUIDE = """
# Model
learning_rate: 1e-6
batch_size: 16
mini_batch_size: 4
gradient_accumulation_steps: 4
# GRPO Algorithm
ppo_epochs: 4
clip_range: 0.2
vf_coef: 0.5
ent_coef: 0.01
max_grad_norm: 1.0
# GRPO-specific (group relative policy optimization)
group_size: 4
baseline_mode: "group_mean"
# KL Penalty
init_kl_coef: 0.05
target_kl: 0.1
adaptive_kl: True
# Episode
max_episode_length: 20
gamma: 0.99
lam: 0.95
# Training
num_episodes: 50000
log_interval: 100
eval_interval: 1000
save_interval: 2000
# Optimization
optim: "adamw_torch"
weight_decay: 0.01
"""


def settings(**values):
    return resolve(GRPOSettings, Layer("here", values)).settings


def test_the_guides_block_loads_as_printed(tmp_path):
    from llmlab.settings.files import read_layer

    path = tmp_path / "grpo.yaml"
    path.write_text(GUIDE)
    resolved = resolve(GRPOSettings, read_layer(path))
    given = resolved.settings
    (warning,) = resolved.warnings
    assert re.findall(r"'(\w+)'", warning) == ["vf_coef", "lam", "gamma"]
    # 16 prompts x 4 completions, in steps of 4 x 4 completions, four times
    assert given.rollout(1) == Rollout(completions=64, per_update=16, updates=16)
    steps = given.in_steps(1)
    # 782 rollouts of 64 are the first that hold 50,000 completions
    assert steps.max_steps == 782 * 16
    assert (steps.log_every, steps.eval_every, steps.save_every) == (25, 250, 500)
    assert given.trainer_arguments()["epsilon"] == 0.2 and given.trainer_arguments()["entropy_coef"] == 0.01
    again = resolve(GRPOSettings, Layer("record", steps.recorded())).settings
    assert again.in_steps(1) == steps and "max_steps" not in steps.recorded()


def test_the_seeds_defaults():
    given = settings()
    expected = {
        **{"group_size": 4, "grpo_temperature": 1.0, "batch_size": 128, "mini_batch_size": 32, "ppo_epochs": 4},
        **{"clip_range": 0.2, "max_new_tokens": 128, "top_k": 0, "top_p": 1.0, "learning_rate": 1.4e-5},
        **{"weight_decay": 0.0, "max_grad_norm": 1.0, "max_steps": 10000, "log_every": 10, "save_every": 500},
        **{"eval_every": 500, "optimizer": "adamw", "target_kl": 0.1, "init_kl_coef": 0.05},
    }
    assert {name: getattr(given, name) for name in expected} == expected
    assert given.datasets[0].name == "Anthropic/hh-rlhf"
    # 128 prompts "will generate batch_size x group_size total responses"
    assert given.rollout(1) == Rollout(512, 32, 4 * 16)


def test_rewards_and_the_reward_model():
    assert [reward.parameters for reward in settings().all_rewards()] == [{"model": SEED_REWARD_MODEL}]
    both = settings(rewards=["json_valid | 0.5"], reward_model_name="runs/reward").all_rewards()
    assert [(reward.name, reward.weight) for reward in both] == [("json_valid", 0.5), ("reward_model", None)]
    assert [reward.name for reward in settings(rewards="json_valid").all_rewards()] == ["json_valid"]
    assert SEED_REWARD_MODEL in spellings_of(GRPOSettings)["reward_model"].help


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("num_generations", "group_size"), ("temperature", "grpo_temperature"), ("epsilon", "clip_range")),
        *(("beta", "init_kl_coef"), ("kl_weight", "init_kl_coef"), ("num_iterations", "ppo_epochs")),
        *(("max_completion_length", "max_new_tokens"), ("entropy_coef", "ent_coef")),
    ],
)
def test_other_spellings(key, name):
    assert getattr(settings(**{key: 7}), name) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 10, "mini_batch_size": 32}, "batch_size = 10 x 4 completions is not a multiple of .* is 8$"),
        ({"batch_size": 1, "mini_batch_size": 32}, "the nearest is 8"),
        (
            {"batch_size": 6, "mini_batch_size": 4, "gradient_accumulation_steps": 4},
            "mini_batch_size = 4 x gradient_accumulation_steps = 4; the nearest is 8",
        ),
        ({"num_episodes": 10, "max_steps": 5}, "keep one"),
        ({"epochs": 1, "max_steps": 5}, "max_steps and epochs set one quantity"),
        ({"num_train_epochs": 1, "num_episodes": 5}, "epochs and num_episodes set one quantity"),
        ({"max_seq_length": 128}, "max_new_tokens = 128 leaves no room for a prompt in max_seq_len = 128"),
        ({"log_interval": 10, "log_every": 5}, "set one quantity in two units; keep one"),
        ({"adaptive_kl": True, "init_kl_coef": 0}, "adaptive_kl needs init_kl_coef above 0"),
        ({"reference_checkpoint": "x", "init_kl_coef": 0}, "reference_checkpoint needs init_kl_coef above 0"),
        ({"rewards": []}, "expected at least one"),
        ({"group_size": 1}, "group_size"),
        ({"target_kl": 0.2}, "adaptive_kl"),
    ],
)
def test_contradictions(values, message):
    with pytest.raises(SettingsError, match=message):
        settings(**values)


def test_more_processes_take_larger_rollouts():
    given = settings(batch_size=16, mini_batch_size=8)
    assert given.rollout(4) == Rollout(64, 32, 8)
    with pytest.raises(ValueError, match="batch_size = 16 x 4 completions .* on 3 processes; the nearest is 18"):
        given.rollout(3)


def test_epochs_are_passes_over_the_prompts():
    given = settings(num_train_epochs=2, batch_size=16, mini_batch_size=8)
    # 100 prompts twice are 200: 13 rollouts of 16, each of 4 x 16 x 4 / 8 gradient steps
    assert given.steps_for(100, processes=1) == 13 * 32
    assert given.steps_for(100, processes=2) == 13 * 16
    assert settings(max_steps=7).steps_for(100, processes=1) == 7
    again = resolve(GRPOSettings, Layer("record", given.recorded())).settings
    assert again.epochs == 2 and "max_steps" not in given.recorded()


def test_a_prompt_has_what_the_completion_leaves_of_the_context():
    assert settings().prompt_limit == 1024
    assert settings(max_seq_length=4096, max_new_tokens=256).prompt_limit == 1024
    assert settings(max_seq_length=600, max_new_tokens=256).prompt_limit == 344
    assert settings(max_seq_len=600, max_prompt_length=None).prompt_limit == 472
    assert settings(max_prompt_length=None).prompt_limit is None
