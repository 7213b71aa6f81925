"""`llmlab advise`: evidence and changes in the terminal, as JSON and as a settings file that loads as it stands."""

import json
from pathlib import Path

import pytest

from llmlab.settings.files import read_layer
from llmlab.settings.presets import for_stage
from llmlab.stages import STAGES
from tests.cli.test_runs import run_cli, write


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    return lambda *words: run_cli(capsys, "advise", *words)


def run_folder(name, losses, evaluated=(), **settings):
    lines = [{"step": 10 * n, "tokens": 0, "seconds": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    lines += [{"step": 20 * n, "tokens": 0, "seconds": n, "eval_loss": loss} for n, loss in enumerate(evaluated, 1)]
    values = {"datasets": [{"name": "demo/chat"}], "output_dir": name, "learning_rate": 5e-6, "lora_r": 16, **settings}
    record = {"settings": {**values, "seed": 42, "use_lora": True}, "step": 10 * len(losses)}
    return write(name, "sft", lines, **record, sources=dict.fromkeys(values, "x.yaml:1") | {"seed": "default"})


def test_overfitting_with_its_numbers_and_the_guides_changes(cli):
    run_folder("over", [3.0, 2.0, 1.5, 1.0, 0.8, 0.6], [2.1, 1.9, 2.4], epochs=3, weight_decay=0.01)
    code, output, _ = cli("over", "--apply", "new.yaml")
    assert code == 0 and "The model overfits" in output
    assert "validation loss rose from 1.9 at step 40, its best, to 2.4 at step 60" in output
    for line in ("learning_rate  5e-06  ->  3e-06", "weight_decay   0.01   ->  0.05", "epochs         3      ->  2"):
        assert line in output
    text = Path("new.yaml").read_text()
    assert "seed" not in text and "use_lora" not in text and "output_dir: over-2" in text
    stage = STAGES["sft"]
    resolved = stage.resolve([for_stage(read_layer("new.yaml"), "sft")], below=[])
    settings = resolved.settings
    assert not resolved.warnings and settings.use_lora and settings.lora_dropout == pytest.approx(0.1)
    assert (settings.learning_rate, settings.epochs, settings.weight_decay) == (3e-6, 2, 0.05)
    code, _, errors = cli("over", "--apply", "new.yaml")
    assert code == 2 and "it exists; choose another name, or --overwrite" in errors
    assert cli("over", "--apply", "new.yaml", "--overwrite")[0] == 0


def test_json_and_a_healthy_run(cli):
    run_folder("good", [3.0, 2.0, 1.5, 1.2, 1.0, 0.9], [2.1, 1.3, 1.25])
    _, output, _ = cli("good", "--json")
    (report,) = json.loads(output)
    assert report["healthy"] and report["changes"] == {} and report["looked_at"]["loss"] == 6
    assert "healthy" in cli("good")[1]
    code, _, errors = cli("good", "--apply", "new.yaml")
    assert code == 2 and "nothing in good calls for other settings" in errors
    run_folder("few", [3.0, 2.0])
    assert "too few values for trends" in " ".join(cli("few")[1].split())


def test_several_runs(cli):
    run_folder("a", [3.0, 2.0, 1.5, 1.2, 1.0], [1.5, 1.4])
    run_folder("b", [3.0, 2.9, 2.9, 2.9, 2.9], [2.9, 2.9])
    assert [report["healthy"] for report in json.loads(cli("a", "b", "--json")[1])] == [True, False]
    code, _, errors = cli("a", "b", "--apply", "x.yaml")
    assert code == 2 and "expected one run" in errors


def test_what_cannot_be_judged_is_one_sentence(cli):
    write("merged", "merge")
    write("odd", "sft", settings={"learning_rate": -1.0}, sources={"learning_rate": "x"})
    for folder, words in (
        ("merged", "nothing is trained in stage 'merge'"),
        ("odd", "learning_rate = -1"),
        ("no", "no such"),
    ):
        code, _, errors = cli(folder)
        assert code == 2 and words in errors and "Traceback" not in errors


def test_texts_of_records_steer_no_terminal(cli):
    folder = run_folder("x", [3.0, 2.0])
    event = {"step": 1, "symptom": "loss_spike", "metric": "loss", "value": 9.0, "message": "\x1b[2J[red]jump[/red]"}
    (folder / "health.jsonl").write_text(json.dumps(event) + "\n")
    output = cli("x")[1]
    assert "\x1b" not in output and "[red]jump[/red]" in output and "Training is unstable" in output
