"""Which folders a pipeline may move and delete, what its stages may be called, and how two of them keep apart."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.pipeline import execute, plan, read_pipeline
from llmlab.runs import checkpoints
from llmlab.runs.record import RunResult
from llmlab.settings.errors import SettingsError, UserError
from llmlab.stages import STAGES


@pytest.fixture
def stages(monkeypatch):
    """Replaces what stages do by a file that holds how often they ran."""
    runs = []

    def function(resolved, resume=None):
        with checkpoints.claim(resolved.settings.output_dir, resume=resume is not None) as folder:
            runs.append(folder.name)
            (folder / "weights").write_text(str(len(runs)))
            (folder / "llmlab.json").write_text('{"status": "finished"}')
        return RunResult(folder, {})

    for stage in STAGES.values():
        monkeypatch.setattr(type(stage), "function", property(lambda self: function))
    return runs


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.yaml"
    path.write_text("output_dir: .\nstages:\n  tokenizer: {datasets: [demo/stories], vocab_size: 300}\n")
    return path


def run(path, *overrides):
    parsed = read_pipeline(path, list(overrides))
    for _ in execute(parsed, plan(parsed)):
        pass


def test_a_folder_of_the_users_is_neither_moved_nor_deleted(pipeline, stages, tmp_path):
    theirs = tmp_path / "tokenizer"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(SettingsError, match="stage 'tokenizer': tokenizer was not written by this pipeline"):
            run(pipeline)
    assert not stages and sorted(path.name for path in tmp_path.iterdir()) == ["p.yaml", "tokenizer"]
    assert (theirs / "notes.txt").read_text() == "mine"


def test_one_that_takes_the_place_of_a_run_folder_is_the_users_too(pipeline, stages, tmp_path):
    run(pipeline)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="was not written by this pipeline"):
        run(pipeline, "tokenizer.vocab_size=301")
    assert (tmp_path / "tokenizer" / "notes.txt").read_text() == "mine"


def test_a_previous_folder_of_the_users_stays(pipeline, stages, tmp_path):
    (tmp_path / "tokenizer.previous").mkdir()
    (tmp_path / "tokenizer.previous" / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="tokenizer.previous was not written"):
        run(pipeline)
    assert (tmp_path / "tokenizer.previous" / "notes.txt").read_text() == "mine"


def test_its_own_folders_are_set_aside_and_deleted(pipeline, stages, tmp_path):
    for size in (300, 301, 302):
        run(pipeline, f"tokenizer.vocab_size={size}")
    assert (tmp_path / "tokenizer" / "weights").read_text() == "3"
    assert (tmp_path / "tokenizer.previous" / "weights").read_text() == "2"
    assert not (tmp_path / ".llmlab.lock").exists()


def test_a_run_folder_that_a_live_run_writes_into_is_not_moved(pipeline, stages, tmp_path):
    run(pipeline)
    hold = "from llmlab.runs.checkpoints import locked\nimport sys\nfrom pathlib import Path\n"
    hold += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    for place, match in ((tmp_path / "tokenizer", "tokenizer: another run"), (tmp_path, "another run .process")):
        holder = subprocess.Popen(
            [sys.executable, "-c", hold, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=match):
            run(pipeline, "tokenizer.vocab_size=301")
        holder.kill()  # and the lock is gone with it
        holder.communicate()
    assert (tmp_path / "tokenizer" / "weights").read_text() == "1"
    run(pipeline, "tokenizer.vocab_size=301")
    assert (tmp_path / "tokenizer" / "weights").read_text() == "2"


def test_a_run_that_finished_before_the_record_said_so_is_not_done_again(pipeline, stages, tmp_path):
    run(pipeline)
    state = json.loads((tmp_path / "pipeline.json").read_text())
    state["tokenizer"]["status"] = "started"  # killed here
    (tmp_path / "pipeline.json").write_text(json.dumps(state))
    assert plan(read_pipeline(pipeline))[0].action == "skip"


@pytest.mark.parametrize(
    "name",
    ["../up", "/tmp/x", "a/b", "..", ".", "", " ", "a\\b", "a\u0007b", "pipeline.json", "sft.previous", "x" * 200],
)
def test_stage_names_are_names(name, tmp_path):
    path = tmp_path / "p.json"
    stages = {name: {"stage": "tokenizer", "datasets": ["demo/stories"]}}
    path.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "stages": stages}))
    with pytest.raises(SettingsError, match="stage name"):
        read_pipeline(path)


SLOW = """
import os, signal, sys, time
from llmlab.stages import STAGES
from llmlab.runs import checkpoints

def function(resolved, resume=None):
    with checkpoints.claim(resolved.settings.output_dir) as folder:
        print("training", flush=True)
        for _ in range(6000):  # a signal just before one long sleep would be heard after it
            time.sleep(0.01)

for stage in STAGES.values():
    type(stage).function = property(lambda self: function)
from llmlab.cli.app import main
main(["run", sys.argv[1]])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_pipeline_with_its_code(number, code, pipeline, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, pipeline],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    for line in process.stdout:
        if line == "training\n":
            break
    process.send_signal(number)
    assert process.wait(240) == code, process.stderr.read()
    assert json.loads((tmp_path / "pipeline.json").read_text())["tokenizer"]["status"] == "started"
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == [".llmlab.pipeline"]
    assert plan(read_pipeline(pipeline))[0].action == "run"
