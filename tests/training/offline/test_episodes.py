"""Episodes as samples: scored by their environment, kept with their masks, trained on what was sampled alone."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from llmlab.data.samples import read_samples
from llmlab.episodes import Episode
from llmlab.settings.errors import UserError
from llmlab.training.offline import sampling
from llmlab.training.offline.awr import awr
from llmlab.training.offline.rs_sft import rs_sft

WORLD = '''
class World:
    """Pays by what it is asked for."""

    reward_range, success, rewards = (-1.0, 3.0), True, {}

    def reset(self, **row):
        self.paid = float(len(row["question"]) % 3)
        self.rewards = {"pay": self.paid}

    def look(self) -> str:
        """Looks."""
        return "seen"

    def get_reward(self) -> float:
        return self.paid
'''


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Settings of episodes in that world: a call, its result, an answer; even ones are cut off."""
    (tmp_path / "world.py").write_text(WORLD)

    def play(tasks, sample, tokenizer, **limits):
        assert 2 in limits.pop("ends")
        assert limits == {"max_episode_length": 3, "max_new_tokens": 8, "max_length": 128, "tool_timeout": 30.0}
        episodes = []
        for k, task in enumerate(tasks):
            task.environment.reset(**task.columns)
            (ids,) = sample([[5, 6, 7]])
            turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "name": "look", "content": "seen"}]
            end, mask = "answer" if k % 2 else "length", [1] * len(ids) + [0, 0] + [1] * len(ids)
            messages = [*turns, turns[0]]
            episodes.append(
                Episode(task.environment, task.prompt, [5, 6, 7], [*ids, 8, 9, *ids], mask, messages, 1, end)
            )
        return episodes

    monkeypatch.setattr(sampling, "play", play)
    return {"environment": f"{tmp_path / 'world.py'}:World", "rewards": ..., "max_episode_length": 3, "max_steps": 2}


def test_episodes_are_samples(played, tiny_settings, tmp_path, quiet):
    result = rs_sft(tiny_settings("rs-sft", tmp_path / "run", **played), console=quiet)
    samples = read_samples(result.folder / "samples.jsonl")
    assert len(samples) == 48
    for each in samples:
        paid = float(len(each.columns["question"]) % 3)
        assert each.rewards == {"environment": (paid + 1) / 4, "environment/pay": paid}
        assert each.reward == (paid + 1) / 4 and each.success and each.calls == 1
        assert each.ended == (each.sample % 2 == 1)
        turn = (len(each.mask) - 2) // 2
        sampled = each.completion_ids[:turn]
        assert each.labels == [-100] * 3 + sampled + [-100] * 2 + sampled
    assert result.metrics["kept_share"] == 12 / 48  # one of each prompt, though half of them were cut off

    again = {
        "samples": str(result.folder),
        "rescore": True,
        "rewards": ["length"],
        "environment": played["environment"],
    }
    both = rs_sft(tiny_settings("rs-sft", tmp_path / "both", **{**played, **again}), console=quiet)
    for each, before in zip(read_samples(both.folder / "samples.jsonl"), samples, strict=True):
        assert each.rewards["environment"] == before.reward and each.rewards.keys() == {"length", *before.rewards}
        assert each.reward == pytest.approx((each.rewards["length"] + before.reward) / 2)


def test_an_unknown_environment_of_a_row(tiny_settings, played, tmp_path, quiet):
    settings = tiny_settings("awr", tmp_path / "run", **{**played, "environment": {"b": played["environment"]}})
    with pytest.raises(UserError, match="environment: a row names None; expected one of b"):
        awr(settings, console=quiet)
    assert not (tmp_path / "run").exists()


def test_vllm_gets_the_settings_and_a_seed_a_row(tiny_settings, tmp_path, quiet, monkeypatch):
    with pytest.raises(UserError, match=r"use_vllm = true: it takes vLLM \(pip install vllm\)"):
        awr(tiny_settings("awr", tmp_path / "none", use_vllm=True), console=quiet)
    vllm, seen = ModuleType("vllm"), []
    vllm.__spec__, vllm.SamplingParams = ModuleSpec("vllm", None), lambda **options: options

    class LLM:
        def __init__(self, **options):
            seen.append(options)

        def generate(self, prompts, params, use_tqdm):
            seen.extend(params)
            tokens = [[prompt["prompt_token_ids"][-1], 7 + 37 * k % 280] for k, prompt in enumerate(prompts)]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in tokens]

    vllm.LLM = LLM
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    settings = tiny_settings("awr", tmp_path / "run", use_vllm=True, top_k=5, max_steps=1)
    samples = read_samples(awr(settings, console=quiet).folder / "samples.jsonl")
    made, *params = seen
    assert made == {"model": settings.policy_checkpoint, "seed": 3} and len(params) == 48 == len(samples)
    assert len({each.pop("seed") for each in params}) == 48
    assert json.dumps(params[0]) == json.dumps(params[-1])
    assert {**params[0], "stop_token_ids": 0} == {
        **{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "top_k": 5, "max_tokens": 8},
        "stop_token_ids": 0,
    }
