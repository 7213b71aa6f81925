"""Twelve faults in runs of the real stages: all are caught in time, and those that can be cured end as a clean run."""

import json
import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from llmlab.health.checks import not_finite
from llmlab.health.symptoms import Event
from llmlab.runs import gates as gates_module
from llmlab.runs import run as run_module
from llmlab.runs.callbacks import StageMetrics
from llmlab.runs.health import Health
from llmlab.runs.history import open_run
from llmlab.runs.record import RunRecord, read_events, read_metrics, read_record
from llmlab.runs.start import changed_by, changes_since_start
from llmlab.runs.trainer import Guard
from llmlab.settings.errors import Diverged, Unhealthy
from llmlab.stages import STAGES
from tests.conftest import VOICES

BOTH = {"on_warning": "rollback", "on_critical": "rollback"}
TEXT = {"max_steps": 90, "lr": 0.02, "eval_every": 10, "save_best_only": False}
ONLINE = {  # a toy policy becomes another one: its divergence is no symptom
    **{"max_steps": 36, "save_every": 10, "learning_rate": 0.015, "ent_coef": 0.03, "max_new_tokens": 4},
    **{"batch_size": 8, "mini_batch_size": 32, "seed": 6, "health": {"kl_high": 8.0, "kl_too_high": 9.0}},
}
WITHIN = 0.02


@pytest.fixture
def train(tiny_settings, tmp_path, quiet):
    """Returns a function that runs a stage into a folder of its name."""

    def run(stage, name="run", **changes):
        return STAGES[stage].function(tiny_settings(stage, tmp_path / name, **changes), console=quiet)

    return run


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory):
    """Returns a function that runs a stage without a fault and returns its folder; no symptom is seen there."""
    from rich.console import Console

    def run(stage, **changes):
        settings = tiny_settings(stage, tmp_path_factory.mktemp("clean") / stage, **changes)
        folder = STAGES[stage].function(settings, console=Console(quiet=True)).folder
        assert not read_events(folder)
        return folder

    return run


@pytest.fixture(scope="module")
def text(finished):
    """A pretraining without a fault."""
    return finished("pretrain", **TEXT)


@pytest.fixture(scope="module")
def grpo(finished):
    """Policy optimization without a fault."""
    return finished("grpo", **ONLINE)


@pytest.fixture
def fault(monkeypatch):
    """Returns functions that put a fault into training steps: `data` into a step's batch each time that it is trained
    on, `once` into the first training alone."""

    class Faults:
        trainers = []

        @staticmethod
        def data(steps, change):
            def training_step(self, model, inputs, *args, **kwargs):
                if self.state.global_step + 1 in steps:
                    return change(self, model, inputs, *args, **kwargs)
                return original(self, model, inputs, *args, **kwargs)

            original = Trainer.training_step
            monkeypatch.setattr(Trainer, "training_step", training_step)
            return original

        @classmethod
        def once(cls, first, change):
            def training_step(self, *args, **kwargs):
                if self not in cls.trainers:
                    cls.trainers.append(self)
                if self is cls.trainers[0] and self.state.global_step + 1 >= first:
                    change(self)
                return original(self, *args, **kwargs)

            cls.trainers = []
            original = Trainer.training_step
            monkeypatch.setattr(Trainer, "training_step", training_step)

    return Faults


def caught(folder, symptom, by):
    """Checks that a symptom is found no later than a step; returns the record."""
    steps = [event.step for event in read_events(folder) if event.symptom == symptom]
    assert steps and steps[0] <= by, read_events(folder)
    return read_record(folder)


def last(folder, metric, lines=10):
    return fmean([line[metric] for line in read_metrics(folder) if metric in line][-lines:])


def assert_like_clean(folder, clean_folder, metric="eval_loss", lines=1):
    expected = last(clean_folder, metric, lines)
    assert abs(last(folder, metric, lines) - expected) <= WITHIN * abs(expected), (
        last(folder, metric, lines),
        expected,
    )


# Of numbers and data -------------------------------------------------------------------------------------------------


def test_nan_batch(train, text, fault):
    step = fault.data({65}, lambda self, model, *rest: step(self, model, *rest) * math.nan)
    folder = train("pretrain", **TEXT, **BOTH).folder
    record = caught(folder, "loss_not_finite", by=65)
    assert record["rollbacks"][0]["to"] == 60 and record["settings"]["lr"] == TEXT["lr"] / 2
    lines = {line["step"]: line for line in read_metrics(folder) if "loss" in line}
    assert [*lines] == [*range(1, TEXT["max_steps"] + 1)] and lines[65]["updates_left_out"] == 1
    assert_like_clean(folder, text)


def test_a_run_that_was_rolled_back_is_resumed_with_its_first_settings(train, fault, tiny_settings, tmp_path, quiet):
    """With another optimizer too, whose first rollback is to a checkpoint that has the state of the one before."""
    short = {**TEXT, "max_steps": 12, "eval_every": 5}
    step = fault.data({8, 14}, lambda self, model, *rest: step(self, model, *rest) * math.nan)
    folder = train("pretrain", **short, **BOTH).folder
    longer = tiny_settings("pretrain", folder, **{**short, "max_steps": 14, "optimizer": "sophia"}, **BOTH)
    assert longer.lr == TEXT["lr"]
    STAGES["pretrain"].function(longer, resume=folder, load_optimizer=False, console=quiet)
    record = read_record(folder)
    assert record["settings"]["lr"] == TEXT["lr"] / 4 and [each["to"] for each in record["rollbacks"]] == [5, 12]
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == [*range(1, 15)]


def rollbacks(folder, *entries):
    """Writes a record with rollbacks, each a tuple of `to`, the value of `lr` before, and after."""
    entries = [{"step": 9, "to": to, "changes": {"lr": [before, after]}} for to, before, after in entries]
    (folder / "llmlab.json").write_text(json.dumps({"rollbacks": entries}))
    return folder


def test_a_rollback_changes_what_a_resumed_run_was_told(tmp_path):
    folder = rollbacks(tmp_path, (5, 0.02, 0.01), (5, 0.004, 0.002))  # resumed in between with lr=0.004
    assert changes_since_start(folder, SimpleNamespace(lr=0.004)) == {"lr": 0.002}
    assert changes_since_start(folder, SimpleNamespace(lr=0.003)) == {}
    folder = rollbacks(tmp_path, (5, 0.02, 0.01), (5, 0.01, 0.005))
    assert changes_since_start(folder, SimpleNamespace(lr=0.02)) == {"lr": 0.005}


def test_a_checkpoint_lacks_all_changes_since_it_was_written(tmp_path):
    folder = rollbacks(tmp_path, (20, 0.05, 0.1), (10, 0.1, 0.2))
    assert (changed_by(folder, "lr", 10), changed_by(folder, "lr", 15)) == (4, 1)  # 15 is from after both


def test_a_run_that_ends_is_not_rolled_back(tiny_settings, tmp_path):
    settings = tiny_settings("pretrain", tmp_path / "run", on_warning="rollback")
    trainer, record = SimpleNamespace(settings=settings, is_deepspeed_enabled=False), RunRecord(tmp_path)
    health = Health(trainer, "pretrain", tmp_path, record, lambda text: None)
    health.respond(Event(5, "loss_spike", "loss", 9.0, "spike"), not_finite(5, "eval_loss", math.nan))
    assert [event.action for event in read_events(tmp_path)] == ["the run ends", ""]


def test_a_loss_scaler_takes_steps_that_are_passed_over(train, monkeypatch):
    """As with fp16 on a GPU: it accepts no step without a scaled loss and gradients."""

    def begin(self, **kwargs):
        original(self, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def unscale(self, optimizer=None):
        self.scaler.unscale_(self._optimizers[0].optimizer)

    original = Guard.__init__
    monkeypatch.setattr(Guard, "__init__", begin)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    monkeypatch.setattr(run_module, "steps_to_pass_over", lambda folder, stage: {1, 3})
    folder = train("pretrain", **{**TEXT, "max_steps": 4, "eval_every": 2}).folder
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines if line.get("updates_left_out")] == [1, 3]
    losses = [line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line]
    assert losses[-1] < losses[0]


def test_rollbacks_that_do_not_help_end_the_run(train, monkeypatch, tmp_path):
    original = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda self, *rest, **more: original(self, *rest, **more) * math.nan)
    with pytest.raises(Diverged) as ended:
        train("pretrain", **TEXT, **BOTH, max_rollbacks=2)
    assert ended.value.exit_code == 4 and open_run(tmp_path / "run").status == "diverged"
    events = read_events(tmp_path / "run")
    assert len(events) == 3 and events[-1].action == "the run ends after 2 rollbacks"
    assert not [*(tmp_path / "run").glob("*.safetensors")]


def test_infinite_gradient(train, text, fault):
    def poison(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return loss

    step = fault.data({65}, poison)
    folder = train("pretrain", **TEXT, **BOTH).folder
    caught(folder, "loss_not_finite", by=65)
    assert_like_clean(folder, text)


def test_an_update_that_the_optimizer_leaves_out_by_itself(train, text, fault, monkeypatch, tmp_path):
    """As on a GPU: the decision is a tensor of the fused optimizer, and the numbers are read one step later."""
    monkeypatch.setattr(Guard, "skipping_optimizer", lambda self: self.optimizer.optimizer)
    step = fault.data({65}, lambda self, model, inputs, *rest: step(self, model, scramble(inputs), *rest))
    folder = train("pretrain", **TEXT, skip_spikes=6).folder
    assert (65, "update left out") in [(event.step, event.action) for event in read_events(folder)]
    assert_like_clean(folder, text)
    before = fault.data({20}, lambda self, model, *rest: before(self, model, *rest) * math.nan)
    with pytest.raises(Diverged, match="the loss is nan"):
        train("pretrain", "nan", **{**TEXT, "log_every": 50})
    assert caught(tmp_path / "nan", "loss_not_finite", by=21)["status"] == "diverged"


def scramble(inputs):
    """Returns a batch with labels that have nothing to do with its tokens."""
    draw = torch.Generator().manual_seed(0)
    return {**inputs, "labels": torch.randint(20, 300, inputs["labels"].shape, generator=draw)}


def test_corrupt_row(train, text, fault):
    step = fault.data({65}, lambda self, model, inputs, *rest: step(self, model, scramble(inputs), *rest))
    folder = train("pretrain", **TEXT, skip_spikes=6).folder
    caught(folder, "loss_spike", by=65)
    assert "update left out" in read_events(folder)[0].action
    assert_like_clean(folder, text)


def test_label_noise(train, text, fault):
    noisy = {82, 83, 84, 85}
    step = fault.data(noisy, lambda self, model, inputs, *rest: step(self, model, scramble(inputs), *rest))
    folder = train("pretrain", **TEXT, **BOTH).folder
    caught(folder, "loss_spike", by=82)
    assert_like_clean(folder, text)


def test_learning_rate_100_times(train, text, fault, tmp_path):
    with pytest.raises(Unhealthy, match="loss rises consistently.*on_warning = stop") as ended:
        train("pretrain", "typed", **{**TEXT, "lr": 100 * TEXT["lr"]}, on_warning="stop")
    assert ended.value.exit_code == 4 and open_run(tmp_path / "typed").status == "failed"
    caught(tmp_path / "typed", "loss_rising", by=10)

    def multiply(trainer):
        for group in trainer.optimizer.param_groups:
            group["lr"] = 100 * TEXT["lr"]

    fault.once(61, multiply)
    folder = train("pretrain", **TEXT, **BOTH).folder
    caught(folder, "loss_spike", by=65)
    assert_like_clean(folder, text)


def test_dead_source(train, monkeypatch, tmp_path):
    def add_metrics(self, logs, prefix, state):
        if "loss" in logs:
            logs["loss/empty"] = 0.0
        original(self, logs, prefix, state)

    original = StageMetrics.add_metrics
    monkeypatch.setattr(StageMetrics, "add_metrics", add_metrics)
    with pytest.raises(Unhealthy, match="loss/empty"):
        train("pretrain", **TEXT, on_warning="stop")
    caught(tmp_path / "run", "source_dead", by=5)


def test_overfitting_small_data(train, tmp_path, corpus_file):
    rows = corpus_file.read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:1]) + "\n")
    (tmp_path / "others.jsonl").write_text("\n".join(rows[100:140]) + "\n")
    data = {"datasets": [str(tmp_path / "few.jsonl")], "validation_datasets": [str(tmp_path / "others.jsonl")]}
    settings = {**TEXT, **data, "eval_every": 5, "save_best_only": True}
    expected = train("pretrain", "best", **settings).metrics["eval_loss"]  # that of the best checkpoint
    result = train("pretrain", **settings, on_warning="rollback", max_rollbacks=1)
    caught(result.folder, "overfitting", by=60)
    (rollback,) = read_record(result.folder)["rollbacks"]
    assert rollback["symptom"] in ("overfitting", "perplexity_low") and rollback["changes"]["lr"] == [0.02, 0.012]
    assert result.metrics["eval_loss"] <= (1 + WITHIN) * expected


@pytest.fixture
def text_gate(tmp_path, monkeypatch):
    """A gate on the perplexity of texts."""
    monkeypatch.setattr(gates_module, "SHARE", 0.99)  # a tiny run has no time for it
    path = tmp_path / "held-out.jsonl"
    lines = (f"The {animal} {voice} loudly." for animal, voice in VOICES.items())
    path.write_text("".join(json.dumps({"answer": line}) + "\n" for line in lines))
    prompts = {"name": str(path), "column": "answer"}
    return {"gates": [{"name": "perplexity", "prompts": prompts, "n": 6}], "gate_every": 3}


def test_gate_regression(train, text, text_gate, fault):
    def shake(trainer):
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    fault.once(64, shake)
    of_losses = dict.fromkeys(("loss_rising", "loss_spike", "gradient_norm_exploding", "gradient_norm_high"))
    folder = train("pretrain", **TEXT, **text_gate, **BOTH, health=of_losses).folder
    caught(folder, "gate_regression", by=72)
    assert_like_clean(folder, text)


# Of policies ---------------------------------------------------------------------------------------------------------


def test_a_policy_that_drifts(train, grpo, fault):
    def push(trainer):
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.2

    limits = {"kl_high": 2.5, "kl_too_high": 3.0}
    fault.once(31, push)
    folder = train("grpo", **{**ONLINE, "health": limits}, on_critical="rollback").folder
    record = caught(folder, "kl_too_high", by=36)
    assert record["settings"]["init_kl_coef"] == 0.1
    assert_like_clean(folder, grpo, "reward", lines=10)


def sharpen(trainer):
    """Makes a policy more certain with each step."""
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight *= 1.5


def test_collapsing_entropy(train, grpo, fault):
    fault.once(31, sharpen)
    folder = train("grpo", **ONLINE, **BOTH).folder
    record = caught(folder, "entropy_collapse", by=36)
    assert record["settings"]["ent_coef"] == 0.06 and record["settings"]["learning_rate"] == 0.0075
    assert_like_clean(folder, grpo, "reward", lines=10)


def test_exploding_value_loss(train, finished, fault):
    def swell(trainer):
        with torch.no_grad():
            for parameter in trainer.critic.trained().values():
                parameter.mul_(3)

    more = {"value_model": "shared", "batch_size": 32}
    clean = finished("ppo", **{**ONLINE, **more})
    fault.once(31, swell)
    limits = {**ONLINE["health"], "gradient_norm_exploding": None}
    folder = train("ppo", **{**ONLINE, **more, "health": limits}, on_critical="rollback").folder
    caught(folder, "value_loss_exploding", by=36)
    assert_like_clean(folder, clean, "reward", lines=10)


def test_reward_hacking(train, text_gate, tmp_path):
    """The reward is a share of tokens: to earn it the policy unlearns the language, and rises above that."""
    with pytest.raises(Unhealthy, match="on_warning = stop"):
        train("grpo", **ONLINE, **text_gate, on_warning="stop")
    caught(tmp_path / "run", "reward_hacking", by=30)


# Of none -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo", "orpo", "reward", "rs-sft", "awr"])
def test_a_clean_run_of_each_stage_has_no_event(stage, train):
    folder = train(stage, learning_rate=1e-4, max_steps=12, eval_every=4).folder
    assert not read_events(folder) and "rollbacks" not in read_record(folder)


def test_the_kl_coefficient_of_a_controller_is_doubled_by_a_rollback(train, fault):
    def push(trainer):
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.2

    fault.once(6, push)
    settings = {**ONLINE, "max_steps": 10, "save_every": 4, "adaptive_kl": True, "kl_horizon": 10**6}
    limits = {"kl_high": None, "kl_too_high": 2.0, "entropy_collapse": None}  # without the push it comes near to 1
    folder = train("grpo", **{**settings, "health": limits}, on_critical="rollback", max_rollbacks=1).folder
    lines = {line["step"]: line["kl_coef"] for line in read_metrics(folder) if "kl_coef" in line}
    (rollback,) = read_record(folder)["rollbacks"]
    before, after = lines[rollback["to"]], lines[rollback["to"] + 1]
    assert after == pytest.approx(2 * before, rel=0.01)


@pytest.mark.parametrize("stage", ["sft", "dpo", "orpo", "reward", "awr"])
def test_every_stage_passes_over_a_bad_batch(stage, train, fault):
    """Adapters of TRL's trainers, whose own metrics lack the steps without a forward pass."""
    adapters = {"use_lora": True} if stage != "reward" else {}
    step = fault.data({6}, lambda self, model, *rest: step(self, model, *rest) * math.nan)
    own = {} if stage == "awr" else {"save_every": 4}
    folder = train(stage, max_steps=8, auto_batch=True, **own, **adapters, **BOTH).folder
    record = caught(folder, "loss_not_finite", by=6)
    assert record["status"] == "finished" and [each["to"] for each in record["rollbacks"]] == [4 if own else 0]
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == [*range(1, 9)]
