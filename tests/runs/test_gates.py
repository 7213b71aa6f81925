"""Gates during training: they change nothing of it, choose the best checkpoint where asked, and take a tenth of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import Trainer

from llmlab.evaluation.gates import Scores
from llmlab.runs import gates as gates_module
from llmlab.runs.gates import GateCallback
from llmlab.runs.record import read_metrics
from llmlab.settings.errors import UserError
from llmlab.stages import STAGES


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"How loudly {k}: the cow?", "answer": "The cow moos loudly."} for k in range(12)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entry(name, prompts, **more):
    return {"name": name, "prompts": str(prompts), "n": 10, "max_new_tokens": 6, **more}


def losses(folder):
    names = ("loss", "eval_loss", "grad_norm", "reward", "kl")
    return [
        {k: v for k, v in line.items() if k in (*names, "step")} for line in read_metrics(folder) if "loss" in line
    ]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "orpo", "grpo", "ppo"])
def test_gates_are_logged_and_change_nothing(stage, tiny_settings, prompts, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(gates_module, "SHARE", 0.99)  # a tiny run has no time for them
    of_text = entry("perplexity", prompts) | {"prompts": {"name": str(prompts), "column": "answer"}}
    sampled = entry("length", prompts, temperature=1.0, parameters={"target": 5})
    gates = [sampled, entry("distinct_n", prompts), of_text]
    if stage == "pretrain":  # which continues texts
        gates = [{**gate, "prompts": of_text["prompts"]} for gate in gates]
    dropout = {} if stage in ("pretrain", "ppo") else {"use_lora": True, "lora_dropout": 0.3}
    plain = {"max_steps": 5, "log_every": 2, **dropout}
    function = STAGES[stage].function
    without = function(tiny_settings(stage, tmp_path / "without", **plain), console=quiet)
    result = function(tiny_settings(stage, tmp_path / "with", **plain, gates=gates, gate_every=2), console=quiet)
    assert losses(result.folder) == losses(without.folder)
    lines = [line for line in read_metrics(result.folder) if "gate/length" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {"gate/distinct_n", "gate/perplexity"} <= lines[0].keys()
    assert result.metrics["gate/perplexity"] == lines[-1]["gate/perplexity"] > 1
    assert len({line["gate/perplexity"] for line in lines}) == 3  # of the weights at that step


def test_the_best_checkpoint_by_a_gate(sft_settings, prompts, quiet, monkeypatch):
    values = iter([0.2, 0.9, 0.3])

    def measure(gates, model, tokenizer, *, seed, most):
        assert not model.training and most == 10
        return {gate.label: Scores(np.array([next(values)]), np.ones(1)) for gate in gates}

    monkeypatch.setattr(gates_module, "measure", measure)
    monkeypatch.setattr(gates_module, "FEWEST", 10)
    own = {"gates": [entry("json_valid", prompts)], "metric_for_best_model": "gate json_valid"}
    settings = sft_settings(max_steps=6, eval_every=2, gate_every=2, save_best_only=True, **own)
    result = STAGES["sft"].function(settings, console=quiet)
    state = json.loads(max(result.folder.glob("checkpoint-6/trainer_state.json")).read_text())
    assert (state["best_metric"], state["best_global_step"]) == (0.9, 4)
    assert result.metrics["gate/json_valid"] == 0.9  # of the weights that were kept
    evaluations = [line["eval_loss"] for line in read_metrics(result.folder) if "eval_loss" in line]
    assert result.metrics["eval_loss"] == evaluations[1] > evaluations[2]


def test_lower_is_better_for_perplexity(sft_settings, prompts, quiet):
    of_text = entry("perplexity", prompts) | {"prompts": {"name": str(prompts), "column": "answer"}}
    own = {"gates": [of_text], "metric_for_best_model": "gate perplexity"}
    settings = sft_settings(max_steps=4, eval_every=2, gate_every=1, save_best_only=True, **own)
    result = STAGES["sft"].function(settings, console=quiet)
    scores = {
        line["step"]: line["eval_gate/perplexity"] for line in read_metrics(result.folder) if "eval_loss" in line
    }
    assert result.metrics["gate/perplexity"] == min(scores.values()) == scores[4]


class Clock:
    """Time that passes by the step and by the prompt."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def make_callback(monkeypatch):
    """Returns a function that makes a callback, its clock, the counts that it measures, and what it says."""

    def make(cost, best):
        clock, counts, said = Clock(), [], []
        monkeypatch.setattr(gates_module, "time", clock)
        gate = SimpleNamespace(label="a", examples=[None] * 100)
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
        trainer = SimpleNamespace(is_fsdp_enabled=False, accelerator=accelerator)
        callback = GateCallback(trainer, [gate], 10, gate if best else None, said.append)

        def measure_on(count):
            callback.cost = cost(clock.now)
            clock.now, callback.spent = clock.now + callback.cost * count, callback.spent + callback.cost * count
            counts.append(count)
            return {"a": 0.5}

        monkeypatch.setattr(callback, "measure_on", measure_on)
        callback.on_train_begin()
        return callback, clock, counts, said

    return make


def test_the_gate_that_decides_is_always_of_the_same_prompts(make_callback):
    callback, clock, counts, said = make_callback(lambda now: 0.2 if now < 1000 else 2.0, best=True)
    for _ in range(30):
        clock.now += 100.0
        assert callback.measure()
    affordable = (0.1 * (100 + 8 * 0.2) - 8 * 0.2) / 0.9 / 0.2
    assert counts == [8] + [int(0.8 * affordable)] * 30  # the first 8 say what a prompt costs
    assert callback.spent > 0.1 * clock.now and len(said) == 1
    assert "38 of 100 prompts from now on, or over 10%" in said[0] and "so it is never skipped" in said[0]


@pytest.mark.parametrize(("per_prompt", "best"), [(0.01, False), (0.2, False), (2.0, False), (2.0, True)])
def test_gates_take_at_most_a_tenth_of_the_time(per_prompt, best, make_callback):
    callback, clock, counts, said = make_callback(lambda now: per_prompt, best)
    measured = 0
    for _ in range(50):
        clock.now += 100.0  # ten steps
        measured += bool(callback.measure())
    if best:
        assert measured == 50 and set(counts) == {8}  # it decides about the best checkpoint, whatever it takes
    else:
        assert callback.spent <= 0.1 * clock.now + 8 * per_prompt
        assert callback.spent >= 0.05 * clock.now or measured == 50
    assert [len(said), counts[-1]] == {0.01: [0, 100], 0.2: [1, 38], 2.0: [1, 8]}[per_prompt]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gate_every": None}, "gates and gate_every need each other"),
        ({"metric_for_best_model": "gate length"}, "expected gate json_valid"),
        ({"metric_for_best_model": "accuracy"}, "expected gate json_valid"),
        ({"metric_for_best_model": "gate json_valid", "eval_every": 5}, "must be a multiple of gate_every = 2"),
    ],
)
def test_settings_that_contradict_each_other(changes, problem, sft_settings, prompts):
    with pytest.raises(ValueError, match=problem):
        sft_settings(**{"gates": [entry("json_valid", prompts)], "gate_every": 2, **changes})


def test_reward_models_have_no_gates(tiny_settings, prompts, tmp_path):
    with pytest.raises(ValueError, match="a reward model scores answers and writes none"):
        tiny_settings("reward", tmp_path, gates=[entry("json_valid", prompts)], gate_every=2)


def test_refusals_before_the_first_step(sft_settings, prompts, chat_file, quiet, monkeypatch):
    def refusal(gate, **changes):
        with pytest.raises(UserError) as error:
            STAGES["sft"].function(sft_settings(gates=[gate], gate_every=2, **changes), console=quiet)
        return str(error.value)

    monkeypatch.setattr(Trainer, "train", None)
    assert "the run trains on it; name held-out ones" in refusal(entry("json_valid", chat_file))
    assert "there is no split 'validation'" in refusal({"name": "json_valid"})
    assert "did you mean 'json_valid'" in refusal(entry("json_vald", prompts))
    assert "unknown parameter 'targt'" in refusal(entry("length", prompts, parameters={"targt": 1}))
    assert "unknown parameter 'n'" in refusal(entry("distinct_n", prompts, parameters={"n": 1}))
    best = {"metric_for_best_model": "gate json_valid", "eval_every": 2, "validation_fraction": 0}
    assert "there is no validation data" in refusal(entry("json_valid", prompts), **best)
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    )
    with pytest.raises(UserError, match="not supported with FSDP and ZeRO-3"):
        GateCallback(trainer, [SimpleNamespace(examples=[1])], 2, None, print)
