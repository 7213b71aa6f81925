"""Plans: their parts are what the shapes say, real runs go on as without them, and suggested changes fit."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import Gemma3TextConfig, LlamaConfig
from typer.testing import CliRunner

import llmlab.runs.plan as planning
from llmlab.cli.app import build_app
from llmlab.data.tokenizer import load_tokenizer
from llmlab.hardware import describe_machine, probe
from llmlab.model import measure
from llmlab.runs.plan import count_steps, fitting_changes, make_plan, needs_checkpointing, read_scene
from llmlab.runs.rehearsal import Scene, _rehearsals, are_alike, cut_layers, rehearse, shorten
from llmlab.settings.errors import UserError
from llmlab.settings.presets import PASSES
from llmlab.stages import STAGES

PLANNED = [name for name, stage in STAGES.items() if stage.resumes]


@pytest.fixture
def planned(tiny_settings, tmp_path):
    """Returns a function that rehearses a stage's tiny run: the run and its settings."""

    def run(stage, **changes):
        settings = tiny_settings(stage, tmp_path / "run", **changes)
        return rehearse(STAGES[stage].function, settings, probe("cpu", settings.dtype), read_scene(settings)), settings

    return run


def of_model(run):
    model = run.trainer.model
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", PLANNED)
def test_states_are_exact(planned, stage):
    run, _ = planned(stage, gradient_accumulation_steps=... if stage in ("dpo", "orpo", "reward") else 1)
    most, (total, trained) = run.ledger.most, of_model(run)
    own = sum(p.numel() for p in run.trainer.critic.parameters()) if stage == "ppo" else 0
    assert 0 <= most["weights"] - 4 * (total - own) < 1000  # rotary frequencies
    assert most["gradients"] == 4 * trained
    assert 0 <= most["optimizer"] - 8 * trained < 5 * len(list(run.trainer.model.parameters()))  # and step counts
    assert most.get("value model", 0) == 4 * own
    assert ("reference" in most) == (stage in ("dpo", "grpo", "ppo"))


def test_frozen_weights_have_the_dtype_of_the_run_and_adapters_fp32(planned):
    run, settings = planned("sft", use_lora=True, lora_r=4, dtype="bf16")
    total, trained = of_model(run)
    width, kv = 32, 16  # of the model; of its keys and values
    assert trained == 2 * 4 * ((width + width) + (width + kv))  # two layers' queries and values
    # copies for autocast; none of the head, which TRL's loss would copy in fp32
    assert 0 <= run.ledger.most["weights"] - 2 * (total - trained) - 4 * trained < 5000
    assert run.ledger.most["optimizer"] >= 8 * trained


def test_four_bit_weights(planned):
    run, _ = planned("sft", use_lora=True, use_qlora=True, dtype="bf16")
    matrices = [shape for part, shape in measure(run.scene.config).shapes if part in ("attention", "mlp")]
    linear = sum(math.prod(shape) for shape in matrices if len(shape) == 2)
    packed = sum(p.nbytes for p in run.trainer.model.parameters() if p.dtype == torch.uint8)
    assert packed == pytest.approx(4.13 / 8 * linear, rel=0.01)
    assert run.ledger.most["weights"] >= packed and run.ledger.flops["backward"] > 0


def test_logits_grow_with_the_rows_of_a_rollout(planned):
    sizes = {}
    for rows in (3, 6):
        run, _ = planned("grpo", batch_size=rows, group_size=2, mini_batch_size=2)
        sizes[rows] = run.ledger.most["logits"]
    assert sizes[6] == pytest.approx(2 * sizes[3], rel=0.1)
    # no stage keeps the logits of the rows that it trains on
    assert not any("logits" in planned(stage)[0].ledger.most for stage in ("pretrain", "sft", "dpo", "orpo", "awr"))


def test_key_value_cache_of_a_rollout(planned):
    run, settings = planned("grpo", batch_size=6, group_size=2, mini_batch_size=2, max_prompt_length=20)
    rows, tokens = 6 * 2, 20 + settings.max_new_tokens
    whole = rows * tokens * 2 * 2 * 16 * 4  # keys and values, two layers, one head of 16, fp32
    assert whole <= run.ledger.most["KV cache"] <= whole * 1.6  # a layer's is copied when it grows by a token
    assert run.ledger.flops["sampling"] > 0 < run.ledger.flops["scoring"]


def test_checkpointing_saves_activations_and_costs_a_forward_pass(planned):
    changes = {"max_length": 128, "max_prompt_length": 64, "mini_batch_size": 4}
    plain, _ = planned("reward", **changes)
    saving, _ = planned("reward", gradient_checkpointing=True, **changes)
    assert saving.ledger.most["activations"] < 0.8 * plain.ledger.most["activations"]
    forward = plain.ledger.flops["forward"]
    assert plain.ledger.flops["backward"] == pytest.approx(2 * forward, rel=0.15)
    assert saving.ledger.flops["backward"] > plain.ledger.flops["backward"] + 0.5 * forward


def test_auto_recomputes_activations_only_where_memory_needs_it(tiny_settings, tmp_path, monkeypatch):
    changes = {"max_length": 128, "max_prompt_length": 64, "mini_batch_size": 4, "max_steps": 1}
    plain, saving = (
        plan_of(tiny_settings, tmp_path, "reward", changes | {"gradient_checkpointing": on}).total
        for on in (False, True)
    )
    assert saving < plain
    settings = tiny_settings("reward", tmp_path / "run", gradient_checkpointing="auto", **changes)
    for memory, needed in ((plain, False), ((plain + saving) // 2, True), (1, True)):
        hardware = replace(probe("cpu", "fp32"), memory=memory)
        run = SimpleNamespace(settings=settings, hardware=hardware, function=STAGES["reward"].function)
        assert needs_checkpointing(run, None) == needed
    asked = []
    monkeypatch.setattr("llmlab.runs.run.needs_checkpointing", lambda run, rows: asked.append(len(rows)) or True)
    STAGES["reward"].function(settings, console=Console(file=(printed := io.StringIO()), width=120))
    assert asked and "activations are computed again" in printed.getvalue()


def plan_of(tiny_settings, folder, stage, changes, **options):
    settings = tiny_settings(stage, folder / "run", **changes)
    return make_plan(STAGES[stage].function, settings, probe("cpu", "fp32"), **options)


def test_sharding_and_8_bit_states(tiny_settings, tmp_path):
    one = plan_of(tiny_settings, tmp_path, "sft", {})
    zero = plan_of(tiny_settings, tmp_path, "sft", {}, processes=4, sharding="zero2")
    full = plan_of(tiny_settings, tmp_path, "sft", {}, processes=4, sharding="fsdp2")
    assert zero.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 4, rel=0.01)
    assert zero.parts["weights"] == one.parts["weights"]
    assert full.parts["weights"] == pytest.approx(one.parts["weights"] / 4, rel=0.01)
    small = plan_of(tiny_settings, tmp_path, "sft", {"optimizer": "adamw_8bit"})
    assert 0.2 < small.parts["optimizer"] / one.parts["optimizer"] < 1  # small tensors and embeddings stay in fp32


def test_steps_tokens_and_time(tiny_settings, tmp_path):
    assert count_steps(1000, rows_per_batch=1, accumulation=16, epochs=3) == 189  # 3 x ceil(1000 / 16)
    assert count_steps(1000, rows_per_batch=4, accumulation=4, epochs=0.5) == 32  # ceil(0.5 x 63)
    changes = {"epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 16}
    plan = plan_of(tiny_settings, tmp_path, "sft", changes, rows=1000, mean=40)
    assert plan.steps == 189 and plan.tokens == 189 * 16 * 40
    slow = plan_of(tiny_settings, tmp_path, "sft", changes, rows=1000, mean=40, utilization=0.01)
    assert slow.seconds == pytest.approx(50 * plan.seconds, rel=0.05)
    unknown = plan_of(tiny_settings, tmp_path, "sft", changes)
    assert unknown.steps is None and unknown.seconds is None and "--rows" in unknown.notes[0]


def test_suggested_changes_fit(tiny_settings, tmp_path):
    settings = tiny_settings("sft", tmp_path / "run", batch_size=8, gradient_accumulation_steps=2)
    function, machine = STAGES["sft"].function, probe("cpu", "fp32")
    plan = make_plan(function, settings, machine)
    memory = plan.total - 1
    (change,) = fitting_changes(function, settings, machine, memory, at_most=1)
    assert change == "batch_size = 4 with gradient_accumulation_steps = 4"
    halved = settings.model_copy(update={"batch_size": 4, "gradient_accumulation_steps": 4})
    assert make_plan(function, halved, machine).total <= memory


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("sft", {"use_lora": True, "lora_preset": "all", "dtype": "bf16"}),
        ("sft", {"optimizer": "adamw_8bit", "gradient_accumulation_steps": 1}),
        ("ppo", {}),
    ],
)
def test_few_layers_tell_of_all(tiny_settings, tmp_path, monkeypatch, stage, changes):
    """Two and four layers give the very plan of all eight."""
    settings = tiny_settings(stage, tmp_path / "run", **changes)
    if stage == "pretrain":
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"n_layers": 8})})
    else:
        config = json.loads((Path(settings.policy_checkpoint) / "config.json").read_text())
        deep = {**config, "num_hidden_layers": 8, "layer_types": config["layer_types"][:1] * 8}
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "config.json").write_text(json.dumps(deep))
        settings = settings.model_copy(update={"policy_checkpoint": str(tmp_path / "deep")})
    plans, machine = [], probe("cpu", settings.dtype)
    for few in ((2, 4), (90, 91)):
        monkeypatch.setattr("llmlab.runs.rehearsal.FEW_LAYERS", few)
        _rehearsals.clear()
        plans.append(make_plan(STAGES[stage].function, settings, machine, rows=1000, utilization=0.5))
        assert {len(found.runs) for found in _rehearsals.values()} == {2 if few == (2, 4) else 1}
    assert plans[0].parts == plans[1].parts and plans[0].phase == plans[1].phase
    assert plans[0].flops == pytest.approx(plans[1].flops, rel=1e-9)


def test_layers_that_differ_are_all_followed():
    config = Gemma3TextConfig(num_hidden_layers=12, hidden_size=32, vocab_size=64)
    few = [cut_layers(config, count) for count in (2, 4)]
    assert few[0].num_hidden_layers == len(few[0].layer_types) == 2
    assert not are_alike(Scene(config, None, 16), None, few, 5.0)


def test_several_devices_are_suggested_where_one_cannot_hold_the_model(tmp_path):
    settings = STAGES["pretrain"].settings_class(
        output_dir=str(tmp_path / "run"),
        model={"vocab_size": 32000, "d_model": 4096, "n_layers": 8, "n_heads": 32, "n_kv_heads": 32, "d_ff": 11008},
        optimizer="adamw_8bit",
        batch_size=1,
    )
    function, machine = STAGES["pretrain"].function, describe_machine("a100_40gb")
    one, two, four = (
        make_plan(function, settings, machine, processes=n, sharding="fsdp2" if n > 1 else "none") for n in (1, 2, 4)
    )
    for part in ("weights", "optimizer"):
        assert four.parts[part] == pytest.approx(one.parts[part] / 4, abs=2)
    room = (two.total + four.total) // 2
    settings = settings.model_copy(update={"gradient_checkpointing": True})
    room = min(room, make_plan(function, settings, machine, processes=2, sharding="fsdp2").total - 1)
    assert fitting_changes(function, settings, machine, room) == ["4 such GPUs with --accelerate fsdp2"]


def test_a_local_tokenizer_gives_the_vocabulary(tiny_settings, tmp_path):
    settings = tiny_settings("pretrain", tmp_path / "run")
    shape = type(settings.model)(tokenizer_name=settings.model.tokenizer_name, d_model=32, n_heads=2, n_kv_heads=1)
    scene = read_scene(settings.model_copy(update={"model": shape}))
    assert scene.config.vocab_size == len(load_tokenizer(shape.tokenizer_name))


def test_a_planned_run_trains_as_an_unplanned_one(tiny_settings, tmp_path, monkeypatch, capsys, quiet):
    losses = []
    for least in (0, 1e30):
        monkeypatch.setattr(planning, "PLANNED_BYTES", least)
        monkeypatch.setattr(planning, "PLANNED_FLOPS", least)
        settings = tiny_settings("sft", tmp_path / f"run{least}", max_steps=3, lora_dropout=0.1, dtype="bf16")
        losses.append(STAGES["sft"].function(settings).metrics["loss"])
    printed = capsys.readouterr().out
    assert losses[0] == losses[1]
    assert "activations" in printed and "not planned further" in printed.replace("\n", " ").replace("  ", " ")


@pytest.fixture
def large_model(tmp_path):
    """A folder with the configuration of the first layers of a 7B model, and no weights."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=32000
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_command(large_model, monkeypatch):
    monkeypatch.setattr("llmlab.runs.plan.fitting_changes", lambda *args, **options: ["a change"])
    words = ["plan", "sft", "--policy-checkpoint", str(large_model), "--use-lora", "--hardware", "rtx_4080"]
    words += ["--rows", "1000", "--json", "epochs=3", "max_seq_len=1024"]
    result = CliRunner().invoke(build_app("plan"), words, catch_exceptions=False)
    values = json.loads(result.output[result.output.index("{") :])
    assert values["steps"] == 189 and values["changes"] == ["a change"] * (not values["fits"])
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    count = 2 * layer + 2 * 32000 * 4096 + 4096
    assert values["parameters"] - values["trained"] == count
    head = 4 * 32000 * 4096  # its copy in fp32, of TRL's loss
    assert 2 * count < values["parts"]["weights"] < 2 * count + head + 1e7  # in bf16
    assert values["memory"] == describe_machine("rtx_4080").memory


def test_command_names_the_stages():
    with pytest.raises(UserError, match="expected one of pretrain, sft"):
        CliRunner().invoke(build_app("plan"), ["plan", "merge"], catch_exceptions=False)


def test_the_command_splits_the_batch_of_a_machine_for_its_processes(tiny_settings, tmp_path):
    """Whatever their number, a step has as many rows, and what the user says of sharding holds."""
    path = tmp_path / "settings.json"
    path.write_text(tiny_settings("pretrain", tmp_path / "run", max_steps=10).model_dump_json(exclude_unset=True))
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("batch_size", PASSES, "device")}))

    def states(hardware, *words):
        words = ["plan", "pretrain", "-c", str(path), "--hardware", hardware, "--rows", "1000", *words, "--json"]
        output = CliRunner().invoke(build_app("plan"), words, catch_exceptions=False).output
        plan = json.loads(output[output.index("{") :])
        assert plan["tokens"] == 10 * 16 * values["model"]["max_seq_len"]
        return plan["parts"]["optimizer"]

    whole = states("rtx_4090", "--processes", "2")
    assert states("multi_gpu_ddp") == states("multi_gpu_fsdp", "--sharding", "none") == whole
    assert states("multi_gpu_fsdp") < states("multi_gpu_fsdp", "--processes", "2") < whole
    assert states("multi_gpu_ddp", "--sharding", "zero2") < whole


def test_a_plan_publishes_nothing_and_starts_no_engine(tiny_settings, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan left this machine")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", refuse)
    settings = tiny_settings("sft", tmp_path / "run", trainer_args={"push_to_hub": True})
    assert make_plan(STAGES["sft"].function, settings, probe("cpu", "fp32")).total > 0
    online = tiny_settings("grpo", tmp_path / "online", trainer_args={"log_completions": True})
    shortened, _ = shorten(online.model_copy(update={"use_vllm": True}), str(tmp_path), 1)
    assert not shortened.use_vllm and not shortened.trainer_args


def test_a_named_reference_is_planned_as_one(tiny_settings, tmp_path):
    settings = tiny_settings("dpo", tmp_path / "run")
    named = settings.model_copy(update={"reference_checkpoint": settings.policy_checkpoint})
    plans = [make_plan(STAGES["dpo"].function, each, probe("cpu", "fp32")) for each in (settings, named)]
    assert plans[0].parts["reference"] == plans[1].parts["reference"] > 0


def test_changes_are_suggested_for_a_run_that_counts_in_episodes(tiny_settings, tmp_path):
    settings = tiny_settings("grpo", tmp_path / "run", num_episodes=16, mini_batch_size=4, batch_size=4)
    settings, machine = settings.in_steps(1), probe("cpu", "fp32")
    total = make_plan(STAGES["grpo"].function, settings, machine).total
    assert fitting_changes(STAGES["grpo"].function, settings, machine, total - 1, at_most=1)


def test_the_mean_is_at_most_the_longest_row(tiny_settings, tmp_path):
    settings = tiny_settings("sft", tmp_path / "run")
    with pytest.raises(UserError, match="--mean 5000: expected at most the longest row"):
        make_plan(STAGES["sft"].function, settings, probe("cpu", "fp32"), mean=5000)


def test_episodes_are_planned_as_completions_of_their_length(tiny_settings, tmp_path):
    options = {"environment": "simulator", "max_seq_len": 96, "max_prompt_length": 32, "normalize_rewards": False}
    episodes = tiny_settings("grpo", tmp_path, rewards=None, **options)
    completions = tiny_settings("grpo", tmp_path, max_new_tokens=64, max_prompt_length=32)
    cpu, stage = probe("cpu", "fp32"), STAGES["grpo"].function
    plans = [make_plan(stage, settings, cpu) for settings in (episodes, completions)]
    assert plans[0].parts == plans[1].parts and plans[0].flops == plans[1].flops
