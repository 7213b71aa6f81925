"""Runs whose numbers are no longer finite: they end as `diverged` with exit code 4, and save nothing of it."""

import io
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from llmlab.cli.app import main
from llmlab.model import load_model
from llmlab.runs.history import open_run
from llmlab.runs.trainer import StageTrainer
from llmlab.settings.errors import Diverged, UserError
from llmlab.settings.preference import DPOSettings
from llmlab.stages import STAGES
from llmlab.training.pretrain import PretrainTrainer, pretrain


def strict(text):
    """Reads JSON as the standard has it, without NaN and infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def diverged(folder):
    """Returns the record and metrics of a run that diverged, after checking what every such run leaves."""
    record = strict((folder / "llmlab.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    assert record["status"] == open_run(folder).status == "diverged" and "diverged" in record["reason"]
    assert not [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    for checkpoint in folder.glob("checkpoint-*"):
        for path in checkpoint.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    return record, [strict(line) for line in lines]


@pytest.fixture
def poison(monkeypatch):
    """Returns a function that puts a value into one gradient of a certain update, on its first forward pass."""

    def at(step, value):
        def training_step(self, model, *args, **kwargs):
            loss = super(StageTrainer, self).training_step(model, *args, **kwargs)
            if self.state.global_step == step - 1:
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
            return loss

        monkeypatch.setattr(StageTrainer, "training_step", training_step, raising=False)
        return lambda: monkeypatch.undo()

    return at


@pytest.mark.parametrize(
    ("value", "changes"),
    [(math.nan, {}), (math.inf, {"grad_clip": 0}), (math.nan, {"gradient_accumulation_steps": 2})],
)
def test_a_bad_gradient_ends_the_run_before_the_update(value, changes, settings, poison, quiet):
    chosen = settings(eval_every=2, save_best_only=False, save_total_limit=None, **changes)
    cure = poison(6, value)
    with pytest.raises(Diverged, match=f"step 5: the gradient norm is {value}.*lower lr = 0.003") as caught:
        pretrain(chosen, console=quiet)
    assert caught.value.exit_code == 4
    folder = open_run(chosen.output_dir).folder
    record, lines = diverged(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    cure()
    result = pretrain(chosen.model_copy(update={"lr": 1e-3}), resume=folder, load_optimizer=False, console=quiet)
    assert open_run(folder).status == "finished" and math.isfinite(result.metrics["loss"])


OPTIMIZERS = ["adamw", "adafactor", "lion", "sophia", "muon"]


# the last update is followed by no loss that would tell
@pytest.mark.parametrize(("optimizer", "steps"), [("adamw", 4), *((name, 1) for name in OPTIMIZERS)])
def test_weights_that_overflow_are_never_saved(optimizer, steps, settings, quiet):
    chosen = settings(lr=1e30, warmup_steps=0, scheduler="none", max_steps=steps, optimizer=optimizer)
    with pytest.raises(Diverged):
        pretrain(chosen, console=quiet)
    diverged(open_run(chosen.output_dir).folder)


@pytest.fixture
def start(tiny_settings, tmp_path, quiet):
    """Returns a function that runs a stage on tiny data."""

    def run(stage, **changes):
        if stage == "pretrain":
            changes["lr"] = changes.pop("learning_rate")
        return STAGES[stage].function(tiny_settings(stage, tmp_path / "run", **changes), console=quiet)

    return run


TRAINING = ["pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo"]


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("stage", TRAINING)
def test_every_stage_ends_as_diverged(stage, use_lora, start, tmp_path):
    if stage == "pretrain" and use_lora:
        pytest.skip("there are no adapters in pretraining")
    lora = {"use_lora": True} if use_lora else {}
    with pytest.raises(Diverged, match="lower (lr|learning_rate) = 1e"):
        start(stage, learning_rate=1e30, warmup_steps=0, scheduler="none", max_steps=4, optimizer="lion", **lora)
    diverged(tmp_path / "run")


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "grpo"])
def test_a_start_that_is_not_finite_is_refused(stage, start, base_folder, tmp_path):
    broken = tmp_path / "broken"
    model = load_model(base_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    shutil.copytree(base_folder, broken)
    model.save_pretrained(broken)
    with pytest.raises(
        UserError, match="policy_checkpoint = .*broken: its weights are not finite.*layers.1.mlp.up"
    ) as e:
        start(stage, learning_rate=1e-3, max_steps=1, policy_checkpoint=str(broken))
    assert e.value.exit_code == 2


def test_a_validation_loss_that_is_not_finite_is_no_best_and_ends_the_run(settings, monkeypatch):
    compute_loss = PretrainTrainer.compute_loss

    def lose(self, model, *args, **kwargs):
        loss = compute_loss(self, model, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 4 and not model.training else loss

    monkeypatch.setattr(PretrainTrainer, "compute_loss", lose)
    output = Console(file=io.StringIO(), width=200)
    chosen = settings(eval_every=2)
    with pytest.raises(Diverged, match="step 4: the validation loss is nan"):
        pretrain(chosen, console=output)
    folder = open_run(chosen.output_dir).folder
    _, lines = diverged(folder)
    assert [line["eval_loss"] for line in lines if "eval_loss" in line][1:] == [None]
    assert output.file.getvalue().count("best so far") == 1
    assert "checkpoint-2 is from before" in " ".join(output.file.getvalue().split())
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


def test_steps_that_a_gradient_scaler_skips_are_no_divergence():
    """In fp16 a scaled gradient overflows now and then: the scaler skips that update and halves its scale."""
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    trainer = object.__new__(StageTrainer)
    trainer.settings, trainer.state = DPOSettings(), SimpleNamespace(global_step=7)
    trainer.args, trainer.accelerator = SimpleNamespace(fp16=True), SimpleNamespace(scaler=scaler)
    trainer.on_nonfinite("grad_norm", math.inf)
    scaler.get_scale = lambda: 0.5  # what overflows now was not scaled up
    with pytest.raises(Diverged, match="step 7: the gradient norm is inf"):
        trainer.on_nonfinite("grad_norm", math.inf)
    trainer.args.fp16, trainer.accelerator.scaler = False, None
    with pytest.raises(Diverged):
        trainer.on_nonfinite("grad_norm", math.nan)


def test_the_command_and_a_pipeline_end_with_exit_code_4(corpus_file, tokenizer_folder, tmp_path, monkeypatch, capsys):
    pipeline = tmp_path / "p.yaml"
    shape = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "n_layers": 1, "max_seq_len": 32}
    stage = {
        "model": {"tokenizer_name": str(tokenizer_folder), **shape}, "datasets": [str(corpus_file)], "lr": 1e30,
        "max_steps": 6, "warmup_steps": 5, "batch_size": 2, "gradient_accumulation_steps": 1, "dtype": "fp32",
        "cache_dir": str(tmp_path.parent / "cache"), "num_proc": 1, "compile": False, "save_best_only": False,
        "eval_every": 1, "eval_steps": 1, "optimizer": "lion",
    }  # fmt: skip
    pipeline.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "stages": {"pretrain": stage}}))
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["run", str(pipeline)])
        assert ended.value.code == 4
        printed = capsys.readouterr()
        assert "error: step " in printed.err and "diverged" in printed.err
        assert strict((tmp_path / "out" / "pretrain" / "llmlab.json").read_text())["status"] == "diverged"
        diverged(tmp_path / "out" / "pretrain")
    assert "it diverged" in printed.out
    with pytest.raises(SystemExit):
        main(["runs", "list", str(tmp_path / "out")])
    assert "diverged" in capsys.readouterr().out
