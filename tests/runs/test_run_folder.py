"""Records, checkpoints and failures of a run folder, without any training."""

import errno
import json
import math
import os
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from llmlab.runs import checkpoints
from llmlab.runs.failures import check_disk, record_failures
from llmlab.runs.progress import ProgressLine
from llmlab.runs.record import RunRecord, read_metrics, read_record
from llmlab.runs.start import find_checkpoint
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.training import PretrainSettings
from llmlab.terminal import human


def record_of(folder, settings=None):
    settings = settings or PretrainSettings(output_dir=str(folder))
    return RunRecord(
        folder, stage="pretrain", settings=settings.model_dump(mode="json"), sources={}, parents=[], hardware={}
    )


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def progress():
    return ProgressLine(Console(quiet=True), tokens_per_step=1, flops_per_token=None, peak_flops=None)


def test_record_and_metrics(tmp_path):
    record = record_of(tmp_path)
    record.start()
    assert read_record(tmp_path)["status"] == "running"
    for step in (1, 2, 3):
        record.log(step, step * 10, {"loss": 1 / step})
    record.finish("finished", metrics={"loss": 1 / 3})
    values = read_record(tmp_path)
    assert values["status"] == "finished" and values["metrics"]["loss"] == 1 / 3 and values["versions"]["torch"]
    assert [(line["step"], line["tokens"]) for line in read_metrics(tmp_path)] == [(1, 10), (2, 20), (3, 30)]


def test_resuming_drops_metrics_past_the_checkpoint_and_keeps_the_clock(tmp_path):
    record = record_of(tmp_path)
    record.start()
    for step in (1, 2, 3):
        record.log(step, step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 4, "los')  # a crash in the middle of a line
    seconds = read_metrics(tmp_path)[1]["seconds"]
    resumed = record_of(tmp_path)
    resumed.start(2)
    resumed.log(3, 3, {"loss": 0.5})
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert lines[2]["seconds"] >= seconds
    assert read_record(tmp_path)["resumed"][0]["step"] == 2


def test_checkpoints_cut_off_are_not_resumed_from_and_are_removed(tmp_path):
    for step in (2, 10):
        checkpoint(tmp_path, step)
    begun = tmp_path / "checkpoint-12"
    checkpoints.begin(begun)
    for file in ("model.safetensors", "trainer_state.json", "0-rollout.pt"):  # the last one is ours
        (begun / file).write_text("{}")
        assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert checkpoints.remove_partial(tmp_path) == [begun] and not begun.exists()
    checkpoints.begin(begun)
    (begun / "trainer_state.json").write_text("{}")
    checkpoints.complete(begun)
    assert checkpoints.checkpoints(tmp_path)[-1] == begun


def test_only_what_this_run_began_to_write_is_removed(tmp_path):
    """Of the user's folders beside them none is, whatever their names."""
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    theirs = [tmp_path / name for name in ("checkpoint-notes", "checkpoint-7", "checkpoint-best", "checkpoint-\u00b2")]
    for path in theirs:
        path.mkdir()
        (path / "notes.txt").write_text("kept")
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    checkpoints.begin(tmp_path / "checkpoint-9")
    (tmp_path / ".saving-x").mkdir()  # cut off in the middle of removing
    assert {path.name for path in checkpoints.remove_partial(tmp_path)} == {"checkpoint-9", ".saving-x"}
    checkpoints.rotate(tmp_path, 1, {}, best=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    assert all((path / "notes.txt").read_text() == "kept" for path in theirs)


def test_rotation_keeps_so_many_of_the_best_and_the_last(tmp_path):
    def left(keep, scores, best=None):
        for step in (1, 2, 3, 4):
            if not (tmp_path / f"checkpoint-{step}").exists():
                checkpoint(tmp_path, step)
        checkpoints.rotate(tmp_path, keep, scores, best=best and f"elsewhere/checkpoint-{best}")
        return [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)]

    assert left(3, {}) == [2, 3, 4]  # without scores the newest
    assert left(1, {}, best=2) == [2, 4]
    assert left(9, {}, best=1) == [1, 2, 3, 4]
    assert left(2, {1: -0.5, 2: -0.1, 3: -0.2, 4: -0.9}) == [2, 3, 4]
    assert left(1, {1: math.nan, 2: -5.0}) == [2, 4]


def test_staged_files_come_all_or_not_at_all(tmp_path):
    with pytest.raises(OSError), checkpoints.staged(tmp_path) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with checkpoints.staged(tmp_path) as folder:
        (folder / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_claiming_a_folder(tmp_path):
    folder = tmp_path / "deep" / "run"
    with checkpoints.claim(str(folder)) as claimed:
        assert claimed == folder and folder.is_dir()
    assert not folder.parent.exists()  # a run that is refused after this leaves nothing behind
    with checkpoints.claim(folder):
        (folder / "llmlab.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["llmlab.json"]

    def claim(path, **how):
        with checkpoints.claim(path, **how):
            pass

    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume"):
        claim(folder)
    claim(folder, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory|cannot be written: File exists"):
        claim(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="already holds other files"):
        claim(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_what_may_change_on_resume(tmp_path):
    before = PretrainSettings(output_dir=str(tmp_path), max_steps=10)
    record_of(tmp_path, before).start()
    path = checkpoint(tmp_path, 7)

    def find(load_optimizer=True, **changes):
        return find_checkpoint(tmp_path, before.model_copy(update=changes), load_optimizer=load_optimizer)

    assert find() == path
    assert find(max_steps=20, eval_every=3, log_every=1) == path
    assert find(max_steps=7) == path  # only its final save is left to do
    with pytest.raises(UserError, match="already is at step 7"):
        find(max_steps=6)
    with pytest.raises(SettingsError) as caught:
        find(lr=1.0, seed=2, optimizer="lion")
    assert len(caught.value.problems) == 3
    assert "the run to resume has 0.0003" in str(caught.value) and "--no-load-optimizer" in str(caught.value)
    assert find(load_optimizer=False, lr=1.0, optimizer="lion") == path


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(tmp_path):
    record = record_of(tmp_path)
    record.start()
    checkpoint(tmp_path, 2)
    with (
        pytest.raises(UserError, match="No space left on device"),
        record_failures("x", tmp_path, record, progress()),
    ):
        checkpoints.begin(tmp_path / "checkpoint-4")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert read_record(tmp_path)["status"] == "failed"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_full_disk_under_torch_save_is_a_sentence_too(tmp_path):
    with (
        pytest.raises(UserError, match="the disk is full or gone"),
        record_failures("x", tmp_path, None, progress()),
    ):
        torch.save(torch.zeros(1_000_000), "/dev/full")


def test_reading_that_fails_is_no_writing(tmp_path):
    def told(error):
        with pytest.raises(UserError) as caught, record_failures("sft", tmp_path, None, progress()):
            raise error
        return str(caught.value)

    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "data/rows.parquet")
    assert told(missing) == "data/rows.parquet: No such file or directory"
    assert told(OSError("Can't load tokenizer for 'x'.")) == "sft: Can't load tokenizer for 'x'"
    inside = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "checkpoint-3" / "x.bin"))
    assert told(inside).startswith(f"output_dir = {tmp_path}: writing stopped")
    with (
        pytest.raises(UserError, match="writing stopped.*No such file"),
        record_failures("sft", tmp_path, None, progress()),
    ):
        save_file({"x": torch.zeros(3)}, tmp_path / "gone" / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with (
        pytest.raises(UserError, match="^sft: Error while deserializing"),
        record_failures("sft", tmp_path, None, progress()),
    ):
        load_file(tmp_path / "broken.safetensors")


def test_other_errors_keep_their_type_and_are_recorded(tmp_path):
    record = record_of(tmp_path)
    record.start()
    with pytest.raises(ZeroDivisionError), record_failures("x", tmp_path, record, progress()):
        raise ZeroDivisionError
    assert read_record(tmp_path)["status"] == "failed"


def test_a_closed_output_is_an_interruption(tmp_path, monkeypatch):
    """As with `llmlab sft ... | head`: rich leaves the program then."""
    monkeypatch.setattr(sys, "stdout", (tmp_path / "stdout").open("w"))  # which it points elsewhere
    record = record_of(tmp_path)
    record.start()
    reader, writer = os.pipe()
    os.close(reader)
    console = Console(file=os.fdopen(writer, "w"))
    with pytest.raises(SystemExit), record_failures("x", tmp_path, record, progress()):
        console.print("a line of progress")
    ended = read_record(tmp_path)
    assert ended["status"] == "interrupted" and ended["reason"] == "its output was closed"


def test_check_disk(tmp_path):
    check_disk(tmp_path / "not" / "yet", needed=1)
    with pytest.raises(UserError, match=r"writes about 1\.0 EB"):
        check_disk(tmp_path, needed=10**18)


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 B"), (1500, "1.5 kB"), (134_515_008, "134.5 MB"), (2e12, "2.0 TB")]
)
def test_human_numbers(number, text):
    assert human(number, "B") == text
