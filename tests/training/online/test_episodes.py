"""GRPO and PPO in environments: they learn which call is rewarded, and train only tokens that they sampled."""

import json

import pytest

from llmlab.episodes import Episode
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.rl import GRPOSettings, PPOSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.simulator.tasks import Curriculum
from llmlab.training.online import rollouts
from llmlab.training.online.grpo import grpo
from llmlab.training.online.ppo import ppo
from llmlab.training.sft import sft
from tests.conftest import make_base

LEVERS = '''
"""Levers: one of them is worth something."""


class Levers:
    done, success, reward_range = False, None, (0.0, 2.0)
    resets = []

    def reset(self, **row):
        self.resets.append(row)
        self.done, self.success, self.rewards = False, False, {"pulls": 0.0, "prize": 0.0}
        self.worth = row["worth"]
        return " Go."

    def pull(self, name: str) -> str:
        """Pulls a lever.

        Args:
            name: its name.
        """
        self.rewards["pulls"] += 0.5
        self.rewards["prize"] += float(name == self.worth)
        self.success = name == self.worth
        self.done = self.success
        return "ok"

    def get_reward(self) -> float:
        return sum(self.rewards.values())
'''


def turn(name):
    arguments = {"name": "pull", "arguments": {"name": name}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": arguments}]}


@pytest.fixture(scope="module")
def levers(tmp_path_factory, tokenizer_folder):
    """A policy that pulls either lever, an environment in which one is worth something, and prompts."""
    from llmlab.simulator.environment import load_environment, schemas_of

    folder = tmp_path_factory.mktemp("levers")
    base = make_base(tokenizer_folder, folder / "base", max_seq_len=1024, d_model=48)
    (folder / "levers.py").write_text(LEVERS)
    spec = f"{folder / 'levers.py'}:Levers"
    tools = schemas_of(load_environment(spec, allow_code=True))
    asked = {"role": "user", "content": "Pull. Go."}
    rows = [{"messages": [asked, turn(name)], "tools": tools} for name in ("cat", "dog") for _ in range(20)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": [{"role": "user", "content": "Pull."}], "worth": "dog", "number": k} for k in range(32)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    trained = sft(
        SFTSettings(
            policy_checkpoint=str(base), datasets=[{"name": str(folder / "sft.jsonl")}], num_proc=1,
            output_dir=str(folder / "sft"), validation_fraction=0, batch_size=4, gradient_accumulation_steps=1,
            max_steps=140, learning_rate=1e-2, warmup_steps=5, max_seq_len=1024, dtype="fp32", report=False,
        )
    )  # fmt: skip
    common = {
        "policy_checkpoint": str(trained.folder), "datasets": [{"name": str(folder / "prompts.jsonl")}],
        "environment": spec, "allow_code": True, "validation_fraction": 0, "num_proc": 1, "max_steps": 16,
        "batch_size": 8, "mini_batch_size": 16, "ppo_epochs": 1, "max_new_tokens": 80, "max_seq_len": 1024,
        "learning_rate": 1.5e-3, "warmup_steps": 1, "log_every": 1, "init_kl_coef": 0, "dtype": "fp32",
        "max_episode_length": 2, "scheduler": "none", "report": False,
    }  # fmt: skip
    return folder, common


def run(stage, levers, folder, quiet, **changes):
    kind = {grpo: GRPOSettings, ppo: PPOSettings}[stage]
    own = {"group_size": 4, "learning_rate": 6e-4} if stage is grpo else {"batch_size": 32, "cliprange_value": None}
    return stage(kind(**{**levers[1], **own, "output_dir": str(folder), **changes}), console=quiet)


@pytest.mark.parametrize("stage", [grpo, ppo])
def test_the_rewarded_lever_is_learned(stage, levers, tmp_path, quiet):
    changes = {"max_steps": 20, "learning_rate": 8e-4 if stage is grpo else 7e-4}
    result = run(stage, levers, tmp_path / "run", quiet, **changes)
    lines = [line for line in read_metrics(result.folder) if "success_rate" in line]
    right = [line["reward/prize"] / (2 * line["reward/pulls"]) for line in lines]  # of the pulls that are well-formed
    assert right[0] < 0.6 and sum(right[-3:]) / 3 > 0.8, right
    assert lines[-1]["success_rate"] > lines[0]["success_rate"] + 0.2
    # a reward of 0.5 a pull and 1 for the prize, of at most 2, is normalized
    for line in lines:
        assert line["reward"] == pytest.approx((line["reward/pulls"] + line["reward/prize"]) / 2, abs=1e-6)


def test_tokens_of_tools_are_masked_and_turns_are_not(levers, tmp_path, quiet, monkeypatch):
    seen = []
    original = rollouts.play

    def play(tasks, sample, tokenizer, **options):
        episodes = original(tasks, sample, tokenizer, **options)
        seen.append(episodes)
        return episodes

    masks = []
    monkeypatch.setattr(rollouts, "play", play)
    kept = rollouts.Rollouts._generate_and_score_completions
    monkeypatch.setattr(
        rollouts.Rollouts,
        "_generate_and_score_completions",
        lambda self, inputs: masks.append(kept(self, inputs)) or masks[-1],
    )
    run(grpo, levers, tmp_path / "run", quiet, max_steps=1)
    (episodes,), (batch,) = seen, masks
    assert any(0 in episode.mask for episode in episodes)
    for row, episode in enumerate(episodes):
        length = len(episode.completion_ids)
        assert batch["completion_ids"][row, :length].tolist() == episode.completion_ids
        assert batch["tool_mask"][row, :length].tolist() == episode.mask
        assert batch["completion_mask"][row].sum() == length
        assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == episode.prompt_ids


def test_environments_are_reset_once_an_episode_in_rollouts_of_any_size(levers, tmp_path, quiet, monkeypatch):
    played = []
    original = rollouts.play

    def play(tasks, *args, **options):
        played.extend(tasks)
        return original(tasks, *args, **options)

    monkeypatch.setattr(rollouts, "play", play)
    run(grpo, levers, tmp_path / "run", quiet, max_steps=2, validation_fraction=0.4, eval_every=1)
    assert len(played) == len(type(played[0].environment).resets) > 2 * 8 * 4


def test_a_resumed_run_goes_on_as_if_never_stopped(levers, tmp_path, quiet, cut_off):
    whole = run(grpo, levers, tmp_path / "whole", quiet, max_steps=6, save_every=2)
    with cut_off(4):
        run(grpo, levers, tmp_path / "cut", quiet, max_steps=6, save_every=2)
    settings = GRPOSettings(**read_record(tmp_path / "cut")["settings"], allow_code=True)
    resumed = grpo(settings, resume=tmp_path / "cut", console=quiet)
    for name in ("loss", "reward", "success_rate", "episode_length"):
        assert resumed.metrics[name] == pytest.approx(whole.metrics[name], abs=1e-6)


def test_several_environments_by_column(levers, tmp_path, quiet):
    folder, common = levers
    rows = [
        {"prompt": [{"role": "user", "content": "Pull."}], "worth": "dog", "environment": name}
        for name in ("a", "b") * 8
    ]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = common["environment"]
    data = {"datasets": [{"name": str(path)}], "max_steps": 1}
    run(grpo, levers, tmp_path / "run", quiet, **data, environment={"a": spec, "b": spec})
    with pytest.raises(UserError, match="environment = b: a row of the data names none of a, c"):
        run(grpo, levers, tmp_path / "other", quiet, **data, environment={"a": spec, "c": spec})


def test_log_probabilities_lie_at_the_sampled_tokens():
    episode = Episode(None, [], [1, 2], [3, 4, 5, 6, 7], [1, 1, 0, 0, 1])
    known = {(1, 2, 3, 4): [-0.1, -0.2], (1, 2, 3, 4, 5, 6, 7): [-0.3]}
    assert rollouts._log_probs(episode, known) == [-0.1, -0.2, 0.0, 0.0, -0.3]


def test_settings_of_episodes():
    printed = {
        "environment": "simulator",
        "reward_config": {"task_complete": 12.0, "kl_weight": 0.07},
        "wrong_tool": -4.0,
    }
    settings = resolve(GRPOSettings, Layer("file", printed)).settings
    assert settings.init_kl_coef == 0.07 and settings.reward_config.task_complete == 12
    assert settings.reward_config.wrong_tool == -4 and settings.max_episode_length == 20
    assert settings.all_rewards() == []
    for values, message in (
        ({"max_episode_length": 3}, "max_episode_length applies only when environment is set"),
        ({"task_complete": 3.0}, "reward_config applies only when environment is simulator"),
        ({"environment": "gymnasium:Taxi-v3", "curriculum": "success"}, "only the simulator has tasks of several"),
    ):
        with pytest.raises(SettingsError, match=message):
            resolve(GRPOSettings, Layer("file", values))


def test_the_curriculum_by_hand():
    rising = Curriculum("episodes", 96)
    levels = []
    for _ in range(12):
        levels.append(rising.level)
        rising.update([False] * 8)
    # a third of the first half for each of the first three
    assert levels == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4]
    by_rate = Curriculum("success", 0)
    by_rate.update([True] * 63)
    assert by_rate.level == 1
    by_rate.update([True])
    assert by_rate.level == 2
    again = Curriculum("success", 0)
    again.load_state(by_rate.state())
    again.update([False] * 52 + [True] * 12)
    assert again.level == 1 and by_rate.level == 2


def test_paths_of_environments_start_at_the_file_that_names_them(levers, tmp_path):
    folder, _ = levers
    for environment in ("levers.py:Levers", {"a": "levers.py:Levers", "b": "simulator"}):
        file = folder / "settings.yaml"
        file.write_text(json.dumps({"environment": environment}))
        located = locate_rewards(resolve(GRPOSettings, read_layer(file))).settings.environments
        assert set(located.values()) - {"simulator"} == {f"{(folder / 'levers.py').resolve()}:Levers"}
