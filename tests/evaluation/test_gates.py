"""Scores of completions of held-out prompts, and what is said of them."""

import json
import math

import numpy as np
import pytest
import torch

from llmlab.evaluation import gates as gates_module
from llmlab.evaluation.gates import Example, Scores, find_gates, judge, load_gates, measure
from llmlab.inference import context_length, load_for_inference
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.gates import EvaluateSettings, GateSettings


@pytest.fixture(scope="module")
def model(base_folder):
    return load_for_inference(base_folder, dtype="fp32", device="cpu")


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"How {k}: the cow?", "answer": "moos" if k % 2 else None} for k in range(9)]
    rows.append({"prompt": "Why? " * 200, "answer": "moos"})  # longer than the context
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(model, *entries, chats=True):
    settings = EvaluateSettings(gates=list(entries)).gates
    return load_gates(find_gates(settings), model[1], chats=chats, context=context_length(model[0]))


def scored(values):
    return Scores(np.array(values, float), np.ones(len(values)))


def gate_of(model, prompts, name="exact_match", **options):
    return load(model, {"name": name, "prompts": prompts, "max_new_tokens": 4, **options})[0]


def test_scores_of_completions(model, prompts, monkeypatch):
    asked = []

    def generate(model, tokenizer, rows, sampling, **options):
        asked.append((len(rows), sampling.temperature))
        assert options == {"batch_size": gates_module.BATCH}
        return [tokenizer("moos" if k % 3 else "quacks")["input_ids"] for k in range(len(rows))]

    monkeypatch.setattr(gates_module, "generate_tokens", generate)
    own = {"prompts": prompts, "num_samples": 3, "temperature": 0.7}
    gates = load(model, {"name": "exact_match", **own}, {"name": "distinct_n", **own}, {"name": "exact_match", **own})
    found = measure(gates, *model, seed=1)
    assert asked == [(27, 0.7)]  # once for all; the long prompt is left out
    assert list(found) == ["exact_match", "distinct_n", "exact_match_2"]
    assert found["exact_match"].weights.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]  # rows with an answer
    assert found["exact_match"].mean == pytest.approx(2 / 3)
    assert found["distinct_n"].values.shape == (9,)
    assert measure(gates[:1], *model, seed=1, most=4)["exact_match"].weights.tolist() == [0, 1, 0, 1]


def test_samples_depend_on_the_seed_alone(model, prompts):
    gate = gate_of(model, prompts, "length", temperature=1.0, parameters={"target": 8, "unit": "characters"})
    runs = [measure([gate], *model, seed=seed)["length"].values.tolist() for seed in (1, 2, 1)]
    assert runs[0] == runs[2] != runs[1]


def test_perplexity_is_that_of_the_models_own_loss(model, prompts):
    source = {"name": prompts, "column": "prompt"}
    gate = load(model, {"name": "perplexity", "prompts": source, "n": 3})[0]
    scores = measure([gate], *model, seed=0)["perplexity"]
    losses, tokens = [], 0
    for example in gate.examples:
        ids = torch.tensor([[model[1].eos_token_id, *example.ids]])
        losses.append(model[0](input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        tokens += ids.shape[1] - 1
    assert scores.weights.sum() == tokens
    assert gate.score(scores.mean) == pytest.approx(math.exp(sum(losses) / tokens), rel=1e-4)


def test_models_of_text_continue_the_beginnings_of_texts(model, corpus_file):
    gate = load(model, {"name": "distinct_n", "prompts": str(corpus_file), "n": 5}, chats=False)[0]
    assert [len(example.ids) for example in gate.examples] == [32] * 5
    assert all(isinstance(example.prompt, str) for example in gate.examples)


def test_thresholds(model, prompts):
    gate = gate_of(model, prompts, min=0.5, max=0.8)
    options = {"tests": 1, "seed": 0, "draws": 1000}
    assert judge(gate, scored([1, 0, 0, 0]), **options).failures == ("0.25 is below min = 0.5",)
    assert judge(gate, scored([1, 1, 1, 1]), **options).failures == ("1 is above max = 0.8",)
    verdict = judge(gate, scored([1, 1, 1, 0] * 50), **options)
    assert verdict.failures == () and verdict.score == 0.75 and verdict.low < 0.75 < verdict.high
    assert verdict.needed == pytest.approx(2 * (1.96 + 1.881) ** 2 * 0.75 * 0.25 / (0.05 * 0.75) ** 2, rel=0.01)
    nothing = Scores(np.zeros(3), np.zeros(3))
    assert judge(gate, nothing, **options).failures == ("it applies to no prompt",)


def test_regressions_in_both_directions(model, prompts):
    options = {"tests": 1, "seed": 0, "draws": 1000}
    worse, better = scored([0] * 30 + [1] * 70), scored([0] * 10 + [1] * 90)
    gate = gate_of(model, prompts)
    lost = judge(gate, worse, better, **options)
    assert lost.failures == ("regressed by 0.2",) and lost.change == pytest.approx(-0.2) and lost.high < 0
    assert judge(gate, better, worse, **options).failures == ()
    similar = gate_of(model, prompts, "self_similarity")
    assert judge(similar, better, worse, **options).failures == ("regressed by 0.2",)
    assert judge(similar, worse, better, **options).failures == ()


def test_a_baseline_near_zero_loses_shares_of_a_tenth_of_the_range(model, prompts):
    gate = gate_of(model, prompts)
    before, after = scored([1] * 20 + [0] * 9980), scored([1] * 19 + [0] * 9981)
    assert judge(gate, after, before, tests=1, seed=0, draws=200).failures == ()
    # 5 % of 0.002 are 1e-4, which no number of prompts would show; of a tenth of the range 0.005
    variance = (1 + 1) / 10_000  # the one difference that there is, and one more
    needed = math.ceil((1.96 + 1.881) ** 2 * variance / 0.005**2)
    assert judge(gate, after, before, tests=1, seed=0, draws=200).needed == pytest.approx(needed, rel=0.01)


def test_perplexities_of_two_tokenizers_are_not_compared(model, prompts):
    gate = gate_of(model, {"name": prompts, "column": "prompt"}, "perplexity")
    with pytest.raises(UserError, match="another tokenizer"):
        judge(gate, Scores(np.ones(1), np.array([3.0])), Scores(np.ones(1), np.array([5.0])), tests=1, seed=0)
    grown = Scores(np.array([3.1, 4.1] * 20), np.ones(40))
    verdict = judge(gate, grown, Scores(np.array([3.0, 4.0] * 20), np.ones(40)), tests=1, seed=0, draws=1000)
    assert verdict.change == pytest.approx(math.exp(3.6) - math.exp(3.5))
    assert len(verdict.failures) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_fail(value, model, prompts):
    gate = gate_of(model, {"name": prompts, "column": "prompt"}, "perplexity")
    broken, sound = (Scores(np.array([3.0, each]), np.ones(2)) for each in (value, 3.0))
    options = {"tests": 1, "seed": 0, "draws": 100}
    assert judge(gate, broken, **options).failures == ("the score is not finite",)
    assert judge(gate, broken, sound, **options).failures == ("the score is not finite",)
    assert judge(gate, sound, broken, **options).failures == ("the baseline's score is not finite",)
    exploded = judge(gate, scored([900.0] * 9), scored([1.0] * 9), **options)  # exp(899) is no float
    assert exploded.failures and exploded.change == pytest.approx(math.e * math.expm1(700))


def applying(share, count, seed):
    weights = (np.random.default_rng(seed).random(count) < share).astype(float)
    return Scores(weights, weights)  # a score of 1 wherever it applies


def test_a_score_that_applies_to_fewer_prompts_than_the_baselines(model, prompts):
    gate, options = gate_of(model, prompts), {"tests": 1, "seed": 0, "draws": 500}
    few, many = Scores(*[np.array([1.0] * 40 + [0.0] * 60)] * 2), Scores(*[np.array([1.0] * 90 + [0.0] * 10)] * 2)
    assert judge(gate, few, many, **options).failures == ("it applies to 40 prompts, and the baseline's to 90",)
    assert judge(gate, many, few, **options).failures == ()
    nearly = Scores(*[np.array([1.0] * 980 + [0.0] * 20)] * 2)  # a certain loss of 2 %
    assert judge(gate, nearly, scored([1] * 1000), **options).failures == ()
    alarms = [judge(gate, applying(0.5, 50, k), applying(0.5, 50, -1 - k % 7 + 99), **options) for k in range(200)]
    assert sum(bool(verdict.failures) for verdict in alarms) <= 10  # 5 % where it is a matter of chance


def test_what_is_compared_is_of_the_same_prompts(model, prompts):
    gate, options = gate_of(model, prompts, min=0.3), {"tests": 1, "seed": 0, "draws": 100}
    after = Scores(np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 1, 1]))
    before = Scores(np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 0, 0]))
    verdict = judge(gate, after, before, **options)
    assert (verdict.prompts, verdict.score, verdict.baseline, verdict.change) == (2, 0.5, 1.0, -0.5)
    assert verdict.failures == ("0.25 is below min = 0.3",)  # of all prompts that it applies to


def test_episodes(model, prompts, monkeypatch):
    class Counter:
        def reset(self, **row):
            self.success = row["answer"] is not None

    def play(tasks, sample, tokenizer, **limits):
        assert limits["max_episode_length"] == 3 and limits["max_new_tokens"] == 4
        assert limits["max_length"] == context_length(model[0])
        assert model[1].eos_token_id in limits["ends"]
        for task in tasks:
            task.environment.reset(**task.columns)
        return tasks  # with their environments

    monkeypatch.setattr(gates_module, "play", play)
    monkeypatch.setattr(gates_module, "load_environment", lambda name, allow_code: {"toy": Counter}[name])
    parameters = {"environment": "toy", "max_episode_length": 3}
    gate = gate_of(model, prompts, "episode_success", parameters=parameters)
    assert measure([gate], *model, seed=0)["episode_success"].mean == pytest.approx(4 / 9)


def test_gates_that_cannot_be_measured(model, prompts):
    with pytest.raises(UserError, match="there is no such score; did you mean 'perplexity'"):
        gate_of(model, prompts, "perplexty")
    with pytest.raises(UserError, match="gate 'json_valid': prompts = .*nowhere.jsonl: there is no such file"):
        find_gates(EvaluateSettings(gates=[{"name": "json_valid", "prompts": "nowhere.jsonl"}]).gates)
    with pytest.raises(UserError, match="it has no prompts"):
        load(model, "json_valid")
    with pytest.raises(UserError, match="unknown parameter 'colum'; did you mean 'column'"):
        gate_of(model, prompts, parameters={"colum": "x"})
    with pytest.raises(UserError, match="this is Python code"):
        gate_of(model, prompts, f"{__file__}:scored")
    with pytest.raises(ValueError, match="with temperature 0 all samples are the same"):
        GateSettings(name="length", num_samples=2)


def test_prompts_that_do_not_fit(model, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "Why? " * 200}) + "\n")
    with pytest.raises(UserError, match="longer than the model's context of 128 tokens"):
        load(model, GateSettings(name="json_valid", prompts=DataSource(name=str(path))))
    assert Example([1], "a", {}).columns == {}
