"""Compiling is chosen where a run is long enough, explained, and refused clearly where tools are missing."""

import io
import re

import pytest
import torch
from rich.console import Console

from llmlab.model import LLMLabConfig, LLMLabForCausalLM
from llmlab.runs import policy as compiling
from llmlab.runs.policy import compile_layers, decide_compile
from llmlab.settings.errors import UserError
from llmlab.settings.preference import DPOSettings
from llmlab.settings.rl import GRPOSettings
from llmlab.settings.training import SFTSettings
from llmlab.training.online.grpo import grpo
from llmlab.training.preference.dpo import dpo
from llmlab.training.sft import sft

RUN = {"device_type": "cpu", "tokens_per_step": 4096, "parameters": 135_000_000}


@pytest.fixture
def all_tools(monkeypatch):
    monkeypatch.setattr(compiling, "missing_tool", lambda device_type: None)


def test_long_runs_compile_and_short_ones_do_not(all_tools):
    choices = [decide_compile("auto", steps=steps, **RUN)[0] for steps in (1, 10, 100, 1000, 10_000, 100_000)]
    assert choices == sorted(choices)
    assert not choices[0]
    assert choices[-1]


@pytest.mark.parametrize("more", [{"tokens_per_step": 2**20}, {"parameters": 10**11}])
def test_more_work_a_step_tips_the_scale(all_tools, more):
    assert not decide_compile("auto", steps=10, **RUN)[0]
    assert decide_compile("auto", steps=10, **{**RUN, **more})[0]


def test_the_time_saved_is_worth_the_wait_with_margin(all_tools):
    for steps in range(1, 3000, 50):
        chosen, reason = decide_compile("auto", steps=steps, **RUN)
        units = {"s": 1, "m": 60, "h": 3600}
        saved, waited = (
            sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([smh])\b", part))
            for part in reason.split("up to")
        )
        rounding = 30 if saved >= 3600 else 1
        assert (saved + rounding >= 1.25 * waited) if chosen else (saved - rounding <= 1.25 * waited), reason


def test_wishes_are_followed(all_tools):
    assert decide_compile(True, steps=1, **RUN) == (True, "on, as asked")
    assert decide_compile(False, steps=10**9, **RUN) == (False, "off, as asked")


def test_unknown_devices_stay_eager(all_tools):
    chosen, reason = decide_compile("auto", steps=10**9, **{**RUN, "device_type": "mps"})
    assert not chosen
    assert "mps" in reason


@pytest.mark.parametrize(
    ("device", "variable", "word"), [("cpu", "CXX", "C++ compiler"), ("cuda", "CC", "C compiler")]
)
def test_a_missing_compiler_turns_auto_off_and_true_down(monkeypatch, device, variable, word):
    monkeypatch.setenv(variable, "no-such-compiler")
    run = {**RUN, "device_type": device, "steps": 10**9}
    chosen, reason = decide_compile("auto", **run)
    assert not chosen
    assert word in reason
    assert "no-such-compiler" in reason
    with pytest.raises(UserError, match=rf"compile = true.*{re.escape(word)} \(no-such-compiler\)"):
        decide_compile(True, **run)
    assert decide_compile(False, **run) == (False, "off, as asked")


def test_missing_headers_turn_auto_off(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "headers" in decide_compile("auto", steps=10**9, **RUN)[1]
    (tmp_path / "Python.h").touch()
    assert decide_compile("auto", steps=10**9, **RUN)[0]


def test_compiled_layers_keep_their_names_and_share_one_compilation(monkeypatch):
    config = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LLMLabForCausalLM(LLMLabConfig(**config, num_hidden_layers=5, max_position_embeddings=16))
    names = list(model.state_dict())
    graphs = []
    compile_one = torch.nn.Module.compile

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_one(self, **{**options, "backend": backend})
    )
    torch._dynamo.reset()
    compile_layers(model)
    tokens = torch.arange(12).view(2, 6)
    model(tokens, labels=tokens, return_logits=False).loss.backward()
    assert len(graphs) == 1
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", [SFTSettings, DPOSettings, GRPOSettings])
def test_every_stage_compiles_where_it_pays(
    kind, all_tools, sft_settings, preference_settings, base_folder, chat_file, tmp_path, monkeypatch
):
    """Here on a machine so slow that a single step earns the warm-up back, and another where none does."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    online = {"policy_checkpoint": str(base_folder), "datasets": [{"name": str(chat_file)}], "validation_fraction": 0,
              "batch_size": 4, "mini_batch_size": 4, "max_new_tokens": 4, "ppo_epochs": 1, "dtype": "fp32",
              "rewards": "length", "num_proc": 1, "cache_dir": str(tmp_path.parent / "cache")}  # fmt: skip
    for speed, count in ((1e20, 0), (1e-3, 2)):
        monkeypatch.setitem(compiling.SPEED, "cpu", speed)
        console = Console(file=io.StringIO(), width=200)
        changes = {"max_steps": 1, "output_dir": str(tmp_path / f"{count}"), "device": "cpu"}
        if kind is SFTSettings:
            sft(sft_settings(**changes), console=console)
        elif kind is DPOSettings:
            dpo(preference_settings(kind, **changes), console=console)
        else:
            grpo(GRPOSettings(**{**online, **changes}), console=console)
        assert compiled == [{"dynamic": True}] * count  # one a layer
        assert re.search(
            r"compile +" + ("on: saves about" if count else "off: this run would save"), console.file.getvalue()
        )
