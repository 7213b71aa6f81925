"""Trackers get what `metrics.jsonl` holds: read back from trackio's database and TensorBoard's event files."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from llmlab.health.symptoms import Event
from llmlab.runs.callbacks import trackers
from llmlab.runs.record import RunRecord, read_metrics
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings
from llmlab.settings.trust import destinations
from llmlab.training.sft import sft

SQLiteStorage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
pytest.importorskip("tensorboard")


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch):
    """Where trackio keeps its databases in this test."""
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path / "trackio"


def points(lines):
    """(series, step) -> value, as trackers call the series of metrics.jsonl."""
    found = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "tokens", "seconds"):
                section, short = (
                    ("eval/", name.removeprefix("eval_")) if name.startswith("eval_") else ("train/", name)
                )
                assert (section + short, line["step"]) not in found
                found[section + short, line["step"]] = value
    return found


def read_events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}


def read_database(project):
    found = {}
    for run in SQLiteStorage.get_runs(project):
        for line in SQLiteStorage.get_logs(project, run):
            for name, value in line.items():
                if name not in ("step", "timestamp"):
                    assert (run, name, line["step"]) not in found
                    found[run, name, line["step"]] = value
    return found


def test_both_trackers_hold_the_series_of_metrics_jsonl_once(tiny_settings, tmp_path, trackio_folder, monkeypatch):
    start = RunRecord.start

    def start_with_a_spike(record, *args):
        start(record, *args)
        log = record.log

        def log_and_find(step, tokens, metrics):
            log(step, tokens, metrics)
            if step == 3 and "loss" in metrics:
                record.log_event(Event(3, "loss_spike", "loss", 9.5, "loss 9.5 at step 3.", "critical", "halved lr"))

        record.log = log_and_find

    monkeypatch.setattr(RunRecord, "start", start_with_a_spike)
    folder = tmp_path / "mine" / "runs" / "sft"
    settings = tiny_settings("sft", folder, report_to="trackio,tensorboard", max_steps=4, eval_every=2)
    with (tmp_path / "plan").open("w") as plan:
        sft(settings, console=Console(file=plan, width=300))
    expected = points(read_metrics(folder))
    names = {name for name, _ in expected}
    assert {"train/loss", "train/tokens_per_second", "eval/loss", "eval/perplexity"} <= names and len(expected) > 30

    found = read_events_of(folder / "tensorboard")
    assert found.keys() == expected.keys()
    assert all(math.isclose(value, expected[key], rel_tol=1e-6) for key, value in found.items())

    stored = read_database("mine")
    assert {(name, step): value for (_, name, step), value in stored.items()} == expected
    (run,) = {run for run, _, _ in stored}
    assert run.startswith("sft 20")
    (alert,) = SQLiteStorage.get_alerts("mine")
    assert (alert["title"], alert["text"]) == ("loss_spike", "loss 9.5 at step 3. halved lr")
    assert (alert["level"], alert["step"], alert["run"]) == ("error", 3, run)
    plan = (tmp_path / "plan").read_text()
    assert "trackio show --project 'mine'" in plan and f"tensorboard --logdir {folder}" in plan
    assert "WANDB_PROJECT" not in os.environ and "TRACKIO_PROJECT" not in os.environ

    # resumed: the same run of trackio, and no point of a step that was taken again
    longer = settings.model_copy(update={"max_steps": 6, "report_to": ["tensorboard"]})
    sft(longer, resume=folder / "checkpoint-2", console=Console(quiet=True))
    assert read_events_of(folder / "tensorboard") == pytest.approx(points(read_metrics(folder)), rel=1e-6)


def test_a_package_that_is_missing_is_one_sentence_before_the_folder_is_claimed(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.hardware.find_spec", lambda package: None)
    with pytest.raises(UserError) as caught:
        sft(tiny_settings("sft", tmp_path / "run", report_to=["wandb"]), console=Console(quiet=True))
    assert str(caught.value) == "report_to = wandb: it needs wandb, which is not installed: pip install wandb"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("none", []),
        (None, []),
        ("trackio", ["trackio"]),
        (["trackio", "tensorboard, trackio"], ["trackio", "tensorboard"]),
    ],
)
def test_one_name_several_or_none(value, names):
    assert SFTSettings(report_to=value).report_to == names
    with pytest.raises(SettingsError, match="expected one of none, trackio, tensorboard, wandb, mlflow; did you"):
        resolve(SFTSettings, Layer("command line", {"report_to": "tensorbord"}))


@pytest.mark.parametrize(
    ("folder", "project"),
    [("runs/quickstart/sft", "quickstart"), ("runs/sft", "here"), ("sft", "here"), ("/runs/sft", "llmlab")],
)
def test_projects_and_runs_are_named_after_folders(tmp_path, monkeypatch, folder, project):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer = SimpleNamespace(args=SimpleNamespace(report_to=[]))
    record = RunRecord(tmp_path, stage="sft")
    record.values["started"] = "2026-11-22T05:13:58+00:00"
    with trackers(trainer, record, Path(folder), 0):
        assert trainer.args.project == os.environ["WANDB_PROJECT"] == project
    assert trainer.args.run_name == "sft 2026-11-22 05:13:58" and "WANDB_PROJECT" not in os.environ
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    with trackers(trainer, record, Path(folder), 0):
        assert trainer.args.project == "mine"


def test_the_plan_says_where_trackio_sends_when_its_environment_says_so(monkeypatch):
    assert destinations({}, "run", ["trackio", "tensorboard"]) == []
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://a?write_token=secret")
    (row,) = destinations({}, "run", ["trackio"])
    assert row == ("publishes", "metrics or alerts by trackio, since TRACKIO_SERVER_URL is set")
