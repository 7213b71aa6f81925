"""The learning-rate range test: where it stops, what it suggests, rows do not matter, and nothing is left."""

import math
import random
from types import SimpleNamespace

import pytest

from llmlab.cli.app import main
from llmlab.runs.lr_range import RangeTest, run_range_test
from llmlab.settings.sources import as_resolved
from llmlab.stages import STAGES


def take(test, loss, factors=None):
    """Feeds the losses of a rate, times what a step's rows make of them, until the test stops."""
    control = SimpleNamespace(should_training_stop=False)
    for step in range(test.steps):
        rate = test.low * (test.high / test.low) ** (step / (test.steps - 1))
        test.on_log(None, None, control, {"loss": loss(rate) * (factors[step] if factors else 1)})
        if control.should_training_stop:
            break
    return len(test.losses)


def valley(rate):
    """From 4 down to 1, steepest at 1e-3, and up from 1e-1 on."""
    return 4 - 3 / (1 + math.exp(-4 * (math.log10(rate) + 3))) + (100 * rate if rate > 1e-1 else 0)


def test_the_suggestion_is_midway_between_the_steepest_fall_and_the_lowest_loss():
    test = RangeTest(1e-6, 1.0, 120)
    take(test, valley)
    steepest, lowest = test.landmarks()
    assert steepest == pytest.approx(1e-3, rel=0.15) and 3e-2 < lowest < 0.2
    assert test.suggest() == pytest.approx(math.sqrt(steepest * lowest), rel=0.05)


def test_rows_do_not_matter():
    draw = random.Random(0)
    factors = [math.exp(draw.gauss(0, 0.7)) for _ in range(120)]
    alone = RangeTest(1e-6, 1.0, 120)
    take(alone, valley, factors)
    test = RangeTest(1e-6, 1.0, 120, before=[4 * factor for factor in factors])
    take(test, valley, factors)
    assert test.landmarks()[0] == pytest.approx(1e-3, rel=0.15) != alone.landmarks()[0]


def test_it_stops_where_the_smoothed_loss_exceeds_four_times_its_lowest():
    """After n steps at 1, a jump to 101 lifts a mean with weight 0.9 of the past to 11 at once."""
    test = RangeTest(1e-6, 1.0, 100)
    assert take(test, lambda rate: 1.0 if rate < 1e-3 else 101.0) == 51
    test = RangeTest(1e-6, 1.0, 100)
    assert take(test, lambda rate: 1.0 if rate < 1e-3 else 3.9) == 100


def test_nothing_is_suggested_where_the_loss_never_falls():
    test = RangeTest(1e-6, 1.0, 50)
    take(test, lambda rate: 2.0 + rate)
    assert test.suggest() is None


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_a_stage_is_tested_as_it_is(tiny_settings, tmp_path, quiet, stage):
    test = RangeTest(1e-6, 10.0, 25)
    settings = tiny_settings(stage, tmp_path / "run", max_steps=7)
    rate = settings.lr if stage == "pretrain" else settings.learning_rate
    resolved = as_resolved(settings.model_copy(update={"embedding_lr": 3 * rate}))  # which is lowered alike
    run_range_test(stage, STAGES[stage].function, resolved, test, quiet)
    assert len(test.before) == 25 and not (tmp_path / "run").exists()
    start = sum(test.before) / 25
    assert test.losses[:5] == pytest.approx([start] * 5, rel=5e-3)  # hardly anything is learned at such rates
    assert 1e-5 < test.suggest() < 1 and min(test.losses) < 0.95 * start


def test_the_command_writes_a_chart(tiny_settings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings("sft", tmp_path / "run")
    words = ["policy_checkpoint", "max_seq_len", "batch_size", "gradient_accumulation_steps", "dtype", "cache_dir"]
    words = [f"{name}={getattr(settings, name)}" for name in words] + [f"datasets=['{settings.datasets[0].name}']"]
    command = ["tune", "lr", "sft", "--steps", "20", "--low", "1e-5", "--plot", "found.svg", "num_proc=1", *words]
    with pytest.raises(SystemExit) as caught:
        main(command)
    output = capsys.readouterr().out
    assert not caught.value.code and "learning_rate: " in output and "lowest loss" in output
    assert (tmp_path / "found.svg").read_text().startswith("<?xml")
    assert [path.name for path in tmp_path.iterdir()] == ["found.svg"]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2 and "exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grpo"], "tune lr grpo: not supported: its loss is no measure of progress"),
        (["sfl"], "did you mean 'sft'?"),
        (["sft", "--low", "1", "--high", "0.1"], "--low 1: expected less than --high 0.1"),
        (["sft", "--plot", "x.gif"], "expected a name that ends in .png or .svg"),
        (["sft", "policy_checkpoint=nowhere", "datasets=demo/chat"], "nowhere"),
        (["awr", "policy_checkpoint=.", "datasets=demo/chat"], "it would draw samples first"),
    ],
)
def test_mistakes(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["tune", "lr", *words])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_test_publishes_nothing(tiny_settings, tmp_path, quiet, monkeypatch):
    def begin(run_class, stage, resolved, **options):
        assert resolved.settings.trainer_args == {"group_by_length": True} and resolved.settings.report_to == []
        raise InterruptedError

    monkeypatch.setattr("llmlab.runs.lr_range.begin", begin)
    arguments = {"push_to_hub": True, "hub_model_id": "me/x", "group_by_length": True}
    settings = tiny_settings("sft", tmp_path / "run", report_to=["wandb"], trainer_args=arguments)
    with pytest.raises(InterruptedError):
        run_range_test("sft", STAGES["sft"].function, as_resolved(settings), RangeTest(1e-6, 1.0, 20), quiet)
