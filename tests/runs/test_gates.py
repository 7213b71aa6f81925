"""Gates during training: they change nothing of it, choose the best checkpoint where asked, and take a tenth of it."""

import json

import pytest

from llmlab.runs import gates as gates_module
from llmlab.runs.record import read_metrics
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
    sampled = entry("length", prompts, temperature=1.0, target=5)
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
