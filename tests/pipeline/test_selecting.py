"""Choosing what of a pipeline runs: `--from`, `--only`, what changed, and what depends on what."""

import json
from pathlib import Path

import pytest

from llmlab.cli.app import main
from llmlab.pipeline import execute, plan, read_pipeline
from llmlab.runs.record import RunResult
from llmlab.settings.errors import SettingsError, UserError
from llmlab.stages import STAGES

PIPELINE = """
output_dir: {output}
stages:
  tokenizer: {{datasets: [demo/stories], vocab_size: 300}}
  other:
    stage: tokenizer
    datasets: [{text}]
  pretrain: {{tokenizer_name: "${{tokenizer}}", datasets: [demo/stories], max_steps: 5}}
  more: {{stage: pretrain, init_from: "${{pretrain}}", datasets: [demo/stories]}}
"""
SKIP_ALL = {"tokenizer": "skip", "other": "skip", "pretrain": "skip", "more": "skip"}


@pytest.fixture
def path(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    path = tmp_path / "p.yaml"
    path.write_text(PIPELINE.format(output=tmp_path / "out", text=text))
    return path


@pytest.fixture
def stages(monkeypatch):
    """Replaces what stages do: notes (stage, resumed) in `done`, and stops a stage named in `fails` half way."""

    class Stages:
        done: list[tuple[str, bool]] = []
        fails: set[str] = set()

    record = Stages()
    record.done, record.fails = [], set()

    def function(resolved, resume=None):
        folder = Path(resolved.settings.output_dir)
        (folder / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        status = "interrupted" if folder.name in record.fails else "finished"
        (folder / "llmlab.json").write_text(json.dumps({"status": status}))
        record.done.append((folder.name, resume is not None))
        if folder.name in record.fails:
            raise KeyboardInterrupt
        return RunResult(folder, {})

    for stage in STAGES.values():
        monkeypatch.setattr(type(stage), "function", property(lambda self: function))
    return record


def run(path, *overrides, **choice):
    pipeline = read_pipeline(path, list(overrides))
    for _ in execute(pipeline, plan(pipeline, **choice)):
        pass


def steps(path, *overrides, **choice):
    return {step.stage.name: step for step in plan(read_pipeline(path, list(overrides)), **choice)}


def actions(path, *overrides, **choice):
    return {name: step.action for name, step in steps(path, *overrides, **choice).items()}


# What depends on what -----------------------------------------------------------------------------------------------


def test_only_what_depends_on_a_change_runs_again_directly_or_not(path, stages):
    run(path)
    assert actions(path, "tokenizer.vocab_size=400") == SKIP_ALL | {
        "tokenizer": "run",
        "pretrain": "run",
        "more": "run",
    }
    assert actions(path, "other.vocab_size=400") == SKIP_ALL | {"other": "run"}
    assert steps(path, "tokenizer.vocab_size=400")["more"].reason == "'pretrain' runs again"


def test_a_run_folder_that_is_written_out_is_a_dependency_too(path, stages, tmp_path):
    path.write_text(path.read_text().replace('"${pretrain}"', str(tmp_path / "out" / "pretrain" / "checkpoint-3")))
    assert read_pipeline(path).stages[-1].needs == ("pretrain",)
    run(path)
    assert actions(path) == SKIP_ALL
    assert actions(path, "pretrain.lr=1")["more"] == "run"


def test_what_was_made_from_an_earlier_run_of_a_stage_runs_again(path, stages):
    run(path)
    stages.fails.add("more")
    with pytest.raises(KeyboardInterrupt):
        run(path, first="pretrain")
    assert actions(path) == SKIP_ALL | {"more": "resume"}  # it was begun from the new pretrain
    stages.fails = {"pretrain"}
    with pytest.raises(KeyboardInterrupt):
        run(path, first="pretrain")
    stages.fails = set()
    assert actions(path) == SKIP_ALL | {"pretrain": "resume", "more": "run"}
    run(path, only="pretrain")
    assert steps(path)["more"].reason == "'pretrain' was rerun since" and steps(path)["more"].action == "run"
    run(path)
    assert stages.done[-2:] == [("pretrain", True), ("more", False)]
    assert actions(path) == SKIP_ALL


def test_a_file_beside_the_run_folders_is_an_input(path, stages, tmp_path):
    text = tmp_path / "out" / "text.txt"
    text.parent.mkdir()
    text.write_text("Some words.")
    run(path, f"other.datasets=[{text}]")
    text.write_text("Some other words.")
    step = steps(path, f"other.datasets=[{text}]")["other"]
    assert (step.action, step.reason) == ("run", f"its input files changed ({text})")


# What changed -------------------------------------------------------------------------------------------------------


def test_changed_settings_are_named_with_both_values(path, stages, tmp_path):
    run(path)
    step = steps(path, "pretrain.max_steps=6", "pretrain.d_model=64", "pretrain.n_heads=2")["pretrain"]
    assert step.reason.startswith("its settings changed (")
    for change in ("max_steps 5 → 6", "model.d_model 896 → 64", "model.n_heads 14 → 2"):
        assert change in step.reason
    assert steps(path)["pretrain"].action == "skip"
    state = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    state["pretrain"]["inputs"]["versions"]["torch"] = "1.0"
    (tmp_path / "out" / "pipeline.json").write_text(json.dumps(state))
    step = steps(path)["pretrain"]
    assert step.reason.startswith("its versions changed (torch 1.0 → ")


def test_a_record_of_another_version_is_a_sentence(path, stages, tmp_path):
    run(path)
    file = tmp_path / "out" / "pipeline.json"
    file.write_text(json.dumps({name: {"status": "finished"} for name in json.loads(file.read_text())}))
    with pytest.raises(UserError, match="damaged, or of another version of llmlab; remove it"):
        actions(path)


# --from and --only --------------------------------------------------------------------------------------------------


def test_from_runs_a_stage_and_every_later_one_again(path, stages):
    run(path)
    assert actions(path, first="other") == {"tokenizer": "skip", "other": "run", "pretrain": "run", "more": "run"}
    stages.done.clear()
    run(path, first="pretrain")
    assert stages.done == [("pretrain", False), ("more", False)]


def test_from_runs_earlier_stages_that_are_not_finished_and_starts_over_what_was_interrupted(path, stages):
    stages.fails.add("pretrain")
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert actions(path)["pretrain"] == "resume"
    assert actions(path, first="pretrain")["pretrain"] == "run"
    assert actions(path, first="more") == SKIP_ALL | {"pretrain": "resume", "more": "run"}


def test_only_runs_one_stage(path, stages):
    run(path)
    stages.done.clear()
    run(path, only="pretrain")
    assert stages.done == [("pretrain", False)]
    assert actions(path) == SKIP_ALL | {"more": "run"}


def test_only_resumes_what_was_interrupted(path, stages):
    stages.fails.add("pretrain")
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert actions(path, only="pretrain")["pretrain"] == "resume"


def test_only_needs_finished_and_unchanged_stages_before_it(path, stages):
    with pytest.raises(SettingsError) as caught:
        plan(read_pipeline(path), only="more")
    first, second = caught.value.problems  # 'other' is not needed
    assert first.startswith("--only more: it needs 'tokenizer' finished and unchanged") and "not run yet" in first
    assert second.startswith("--only more: it needs 'pretrain'")
    run(path)
    with pytest.raises(UserError, match=r"'pretrain'.*its settings changed \(max_steps 5 → 6\)"):
        plan(read_pipeline(path, ["pretrain.max_steps=6"]), only="more")
    assert actions(path, "other.vocab_size=400", only="more") == SKIP_ALL | {"more": "run"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"first": "pretrian"}, "--from pretrian: expected one of .*; did you mean 'pretrain'?"),
        ({"only": "mor"}, "--only mor: expected one of .*; did you mean 'more'?"),
        ({"first": "more", "only": "more"}, "contradict each other"),
    ],
)
def test_a_wrong_choice_is_a_sentence(path, choice, message):
    with pytest.raises(UserError, match=message):
        plan(read_pipeline(path), **choice)


def test_a_broken_stage_is_not_called_missing_by_those_after_it(path):
    with pytest.raises(SettingsError) as caught:
        read_pipeline(path, ["pretrain.lrr=1"])
    assert len(caught.value.problems) == 1


def test_the_dry_run_prints_a_table_and_starts_nothing(path, stages, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run(path)
    stages.done.clear()
    with pytest.raises(SystemExit) as caught:
        main(["run", str(path), "pretrain.max_steps=6", "--from", "pretrain", "--dry-run"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert not caught.value.code and not stages.done
    assert " skip " in rows["tokenizer"] and "finished" in rows["tokenizer"]
    assert "asked for by --from" in rows["pretrain"]
    with pytest.raises(SystemExit) as caught:
        main(["run", str(path), "--only", "mor"])
    assert caught.value.code == 2 and "did you mean 'more'?" in capsys.readouterr().err
