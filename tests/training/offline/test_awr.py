"""AWR: the weights, the weighted loss whatever the batch is split into, unit weights as SFT, and learning."""

import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmlab.data.samples import Sample, read_samples
from llmlab.runs.record import read_metrics
from llmlab.training.offline import awr as module
from llmlab.training.offline.awr import WeightMetrics, awr, weigh
from llmlab.training.offline.rs_sft import keep_best, rs_sft
from llmlab.training.sft import LLMLabSFTTrainer

FEW = {"max_prompts": 8, "num_samples_per_prompt": 4}


@pytest.fixture(scope="module")
def drawn(tiny_settings, tmp_path_factory):
    """A folder with samples of 8 prompts."""
    return awr(
        tiny_settings("awr", tmp_path_factory.mktemp("drawn") / "run", **FEW, max_steps=1, warmup_steps=1),
        console=Console(quiet=True),
    ).folder


@pytest.fixture
def train(tiny_settings, drawn, tmp_path, quiet):
    """Trains on these samples and returns the run folder."""

    def train(folder, **changes):
        return awr(tiny_settings("awr", tmp_path / folder, samples=str(drawn), **changes), console=quiet).folder

    return train


def sample(prompt_id, k, reward, ended=True, **more):
    message = [{"role": "assistant", "content": "a"}]
    return Sample(
        prompt_id=prompt_id, sample=k, prompt=[], prompt_ids=[1], completion_ids=[2], completion=message,
        reward=reward, ended=ended, **more,
    )  # fmt: skip


def weights_of(tiny_settings, rewards, **changes):
    """The weights of the samples of prompts with these rewards."""
    samples = [sample(number, k, reward) for number, group in enumerate(rewards) for k, reward in enumerate(group)]
    rows, _ = weigh(samples, tiny_settings("awr", "run", **changes))
    assert [each for each, _ in rows] == samples
    return [weight for _, weight in rows]


def scaled(weights):
    return pytest.approx([weight * len(weights) / sum(weights) for weight in weights], rel=1e-12)


def test_weights_are_those_of_the_formula(tiny_settings):
    rewards = [[0.0, 1.0], [0.5, 0.5, 0.8]]
    advantages = [-0.5, 0.5, -0.1, -0.1, 0.2]  # less 0.5 and 0.6, the means
    raw = [min(math.exp(2 * a), 1.6) for a in advantages]
    plain = {"advantage_beta": 2, "normalize_advantage": False}
    assert weights_of(tiny_settings, rewards, clip_advantage=1.6, **plain) == scaled(raw)
    deviation = math.sqrt(sum(a * a for a in advantages) / 5)
    raw = [min(math.exp(2 * a / deviation), 4) for a in advantages]
    assert weights_of(tiny_settings, rewards, advantage_beta=2, clip_advantage=4) == scaled(raw)
    assert weights_of(tiny_settings, [[0.0, 1e9]], **plain) == pytest.approx([0, 2], abs=1e-8)  # no overflow
    assert weights_of(tiny_settings, rewards, advantage_beta=0) == [1] * 5


def test_samples_without_reward_or_advantage_are_left_out(tiny_settings):
    settings = tiny_settings("awr", "run")
    rows, left_out = weigh([sample(0, 0, 1.0), sample(0, 1, None), sample(0, 2, 0.0, ended=False)], settings)
    assert [each.sample for each, _ in rows] == [0, 2] and left_out == {"without a reward": 1}
    rows, left_out = weigh([sample(0, 0, 1.0), sample(0, 1, 1.0), sample(1, 0, 0.0)], settings)
    assert (rows, left_out) == ([], {"with the reward of all samples of its prompt": 3})
    # 0.7 less the mean of three is 1e-16, and no advantage; an episode without room for a turn has no token
    assert weigh([sample(0, k, 0.7) for k in range(3)], settings)[0] == []
    empty = sample(0, 3, 0.2)
    empty.completion_ids = []
    rows, left_out = weigh([sample(0, 0, 1.0), sample(0, 1, 0.0), empty], settings)
    assert len(rows) == 2 and left_out == {"without a sampled token": 1}
    assert weigh([], settings) == ([], {})


def test_an_episode_that_failed_is_not_kept():
    failed, solved = sample(0, 0, 0.9), sample(0, 1, 0.7)
    failed.success, solved.success = False, True
    rows, left_out = keep_best([failed, solved], 0.6)
    assert [each.sample for each, _ in rows] == [1] and left_out == {"episodes that failed": 1}


def test_the_best_above_the_threshold_is_kept():
    group = [sample(0, 0, 0.7), sample(0, 1, 0.9), sample(0, 2, 1.0, ended=False), sample(0, 3, None)]
    rows, left_out = keep_best([*group, sample(1, 0, 0.6), sample(2, 0, 0.8)], 0.6)
    assert [(each.prompt_id, each.sample, weight) for each, weight in rows] == [(0, 1, 1.0), (2, 0, 1.0)]
    assert left_out == {
        "not the best of its prompt": 1,
        "cut off at the length limit": 1,
        "without a reward": 1,
        "reward not above 0.6": 1,
    }


def test_the_loss_is_that_of_a_float64_loop(train, drawn, base_folder, tiny_settings, tmp_path, monkeypatch):
    """One step on all 32 samples: loss, gradient norm and effective sample size."""
    folder = train("run", batch_size=4, gradient_accumulation_steps=8, max_steps=1, warmup_steps=1, max_grad_norm=1e9)
    rows, _ = weigh(read_samples(drawn / "samples.jsonl"), tiny_settings("awr", tmp_path / "x"))
    assert len(rows) == 32
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64)
    tokens, total, mean = sum(len(each.completion_ids) for each, _ in rows), 0.0, sum(w for _, w in rows) / 32
    for each, weight in rows:
        ids = torch.tensor([each.prompt_ids + each.completion_ids])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = log_probs[range(ids.shape[1] - 1), ids[0, 1:]][len(each.prompt_ids) - 1 :]
        total = total - weight / mean * taken.sum() / tokens
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    (line, *_) = read_metrics(folder)
    assert line["loss"] == pytest.approx(total.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm, rel=2e-6)
    weights = [weight for _, weight in rows]
    share = sum(weights) ** 2 / sum(w * w for w in weights) / 32
    assert line["effective_sample_size"] == pytest.approx(share, rel=1e-6)


def test_how_a_step_is_split_changes_nothing(train):
    shapes = ((8, 1), (1, 8), (2, 4))
    runs = [train(str(k), batch_size=b, gradient_accumulation_steps=a, max_steps=4) for k, (b, a) in enumerate(shapes)]
    first, *others = [load_file(folder / "model.safetensors") for folder in runs]
    for other in others:
        assert max((first[name] - other[name]).abs().max().item() for name in first) < 2e-6
    sizes = [[line["effective_sample_size"] for line in read_metrics(folder)] for folder in runs]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)
    assert sizes[2] == pytest.approx(sizes[0], rel=1e-5)


def test_unit_weights_are_sft_exactly(train, monkeypatch):
    weighted = train("awr", advantage_beta=0, max_steps=5)

    class Plain(LLMLabSFTTrainer):
        shares = ()

    with monkeypatch.context() as patch:
        patch.setattr(module, "LLMLabAWRTrainer", Plain)
        plain = train("sft", advantage_beta=0, max_steps=5)
    assert (weighted / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_sophia_and_validation_take_weighted_rows(train, tiny_settings, tmp_path, quiet):
    settings = tiny_settings("awr", tmp_path / "v", **FEW, validation_fraction=0.1, eval_every=1, max_steps=2)
    assert awr(settings, console=quiet).metrics["eval_loss"] > 0
    assert train("sophia", optimizer="sophia", max_steps=2).is_dir()


def test_few_samples_that_carry_the_weight_are_warned_of(quiet):
    said = []

    class Progress:
        say = staticmethod(said.append)

    metrics = WeightMetrics(trainer := SimpleNamespace(), Progress)
    for _ in range(module.PATIENCE + 5):
        trainer.shares = [0.05, 0.07]
        metrics.add_metrics(logs := {"loss": 1.0}, "", None)
        assert logs["effective_sample_size"] == pytest.approx(0.06)
    (warning,) = said
    assert "lower advantage_beta or clip_advantage" in warning


@pytest.mark.parametrize("stage", ["rs-sft", "awr"])
def test_fresh_samples_have_higher_rewards(tiny_settings, share_file, tmp_path, quiet, stage):
    """A share of tokens in the first third: random models have a third, or less."""
    train, common = {"rs-sft": rs_sft, "awr": awr}[stage], {"max_prompts": 40, "num_samples_per_prompt": 8}
    data = {**common, "max_new_tokens": 12, "batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 150}
    data |= {"learning_rate": 1e-2, "sampling_batch_size": 320}
    own = {"reward_threshold": 0.0} if stage == "rs-sft" else {"clip_advantage": 50.0}
    first = train(tiny_settings(stage, tmp_path / "first", **data, **own), console=quiet).folder
    again = {**data, "policy_checkpoint": str(first), "seed": 9, "max_steps": 1, "warmup_steps": 1}
    second = awr(tiny_settings("awr", tmp_path / "second", **again), console=quiet).folder
    before, after = ([each.reward for each in read_samples(folder / "samples.jsonl")] for folder in (first, second))
    means = [sum(rewards) / len(rewards) for rewards in (before, after)]
    print(stage, means)
    assert means[1] > means[0] + 0.1
