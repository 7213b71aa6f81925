"""Where a resumed run goes on, from where it may be started, and what refuses it."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from transformers import Trainer

from llmlab.cli.app import main
from llmlab.runs import checkpoints
from llmlab.runs import run as runs
from llmlab.runs.record import git_revision, read_metrics, read_record, started_in
from llmlab.runs.start import _is_same, check_deepspeed, find_checkpoint, sharding_of
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.preference import DPOSettings
from llmlab.training.sft import sft


def losses(folder) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


@pytest.fixture
def settings(sft_settings):
    """Returns a function that makes settings of six steps with a checkpoint after every second one."""

    def make(**changes):
        values = {
            "max_steps": 6,
            "save_every": 2,
            "save_best_only": False,
            "save_total_limit": None,
            "eval_every": 100,
        }
        if "epochs" in changes:
            del values["max_steps"]
        return sft_settings(**{**values, **changes})

    return make


def command(*words, code=0):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert (left.value.code or 0) == code


# From where ---------------------------------------------------------------------------------------------------------


def test_from_a_checkpoint_of_the_run(settings, quiet):
    whole = sft(settings(), console=quiet)
    expected = losses(whole.folder)
    resumed = sft(settings(), resume=whole.folder / "checkpoint-2", console=quiet)
    assert losses(resumed.folder) == expected
    assert read_record(resumed.folder)["resumed"][0]["step"] == 2
    # what came after it is of another run now, and kept
    assert [p.name for p in checkpoints.checkpoints(resumed.folder)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert {p.name for p in (resumed.folder / "superseded").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    with pytest.raises(UserError, match="no complete checkpoint; expected one of .*: checkpoint-2, checkpoint-4"):
        sft(settings(), resume=whole.folder / "checkpoint-3", console=quiet)


def test_killed_before_the_first_checkpoint_it_starts_again(settings, quiet, cut_off, tmp_path):
    whole = sft(settings(output_dir=str(tmp_path / "whole")), console=quiet)

    with cut_off.kill(within=(Trainer, "_save_optimizer_and_scheduler")):
        sft(settings(), console=quiet)
    folder = tmp_path / "run"
    assert read_record(folder)["status"] == "running" and not checkpoints.checkpoints(folder)
    assert (folder / "checkpoint-2").is_dir() and losses(folder)
    resumed = sft(settings(), resume=folder, console=quiet)
    assert losses(resumed.folder) == losses(whole.folder) and read_record(folder)["status"] == "finished"
    shutil.rmtree(folder / "superseded", ignore_errors=True)
    for checkpoint in checkpoints.checkpoints(folder):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="no complete checkpoint"):  # a finished run is not done again
        sft(settings(), resume=folder, console=quiet)


@pytest.mark.parametrize("changes", [{}, {"epochs": 0.1}, {"save_every": 100, "save_total_limit": 1}])
def test_killed_before_its_final_save_it_takes_no_step_more(changes, settings, quiet, cut_off, tmp_path):
    whole = sft(settings(**changes, output_dir=str(tmp_path / "whole")), console=quiet)

    with cut_off.kill(within=(runs, "save_policy")):
        sft(settings(**changes), console=quiet)
    folder = tmp_path / "run"
    files = [path / "model.safetensors" for path in (whole.folder, folder)]
    assert not files[1].exists() and read_record(folder)["status"] == "running"
    before = losses(folder)
    resumed = sft(settings(**changes), resume=folder, console=quiet)
    assert losses(folder) == before == losses(whole.folder) and read_record(folder)["status"] == "finished"
    assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]
    with pytest.raises(UserError, match="it already is at step 6"):
        sft(settings(**changes), resume=folder, console=quiet)


def test_from_any_folder_and_after_moving_its_tree(settings, chat_file, base_folder, tmp_path, monkeypatch):
    here, other = tmp_path / "here", tmp_path / "other"
    for folder in (here, other):
        folder.mkdir()
    shutil.copytree(base_folder, here / "base")
    shutil.copy(chat_file, here / "chat.jsonl")
    relative = {"policy_checkpoint": "base", "datasets": [{"name": "chat.jsonl"}], "cache_dir": "cache"}
    given = settings(**relative, output_dir="runs/a", save_best_only=True, eval_every=2)
    file = tmp_path / "s.json"
    file.write_text(given.model_dump_json(exclude_unset=True))
    monkeypatch.chdir(here)
    command("sft", "--config", file)
    monkeypatch.chdir(other)
    (other / "chat.jsonl").write_text("this is another file of the same name")
    command("sft", "--resume", "../here/runs/a", "max_steps=8")
    assert losses(here / "runs/a")[-1][0] == 8 and sorted(p.name for p in other.iterdir()) == ["chat.jsonl"]
    monkeypatch.chdir(tmp_path)
    here.rename(tmp_path / "moved")
    command("sft", "--resume", "moved/runs/a/checkpoint-8", "max_steps=10")
    run = tmp_path / "moved" / "runs" / "a"
    assert losses(run)[-1][0] == 10
    best = json.loads((checkpoints.checkpoints(run)[-1] / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).is_dir() and Path(best).resolve().parent == run.resolve()


def test_in_its_own_folder_alone(settings, quiet, tmp_path):
    whole = sft(settings(), console=quiet)
    with pytest.raises(UserError, match="a resumed run goes on in its own folder"):
        sft(settings(output_dir=str(tmp_path / "new")), resume=whole.folder, console=quiet)
    assert not (tmp_path / "new").exists()
    command("sft", "--resume", tmp_path / "nothing", code=2)
    command("dpo", "--resume", whole.folder, code=2)


def test_where_a_run_was_started(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    assert started_in(run, {"settings": {"output_dir": "runs/a"}, "cwd": "/gone"}) == tmp_path
    assert started_in(run, {"settings": {"output_dir": "runs/b"}, "cwd": str(tmp_path)}) == tmp_path  # renamed
    assert started_in(run, {"settings": {"output_dir": str(run)}, "cwd": str(tmp_path)}) == tmp_path
    assert started_in(run, {"settings": {"output_dir": str(run)}}) is None


# What may change ----------------------------------------------------------------------------------------------------


def test_changed_data_is_refused_unless_allowed(settings, chat_file, quiet, tmp_path, capsys):
    data = tmp_path / "chat.jsonl"
    data.write_text(chat_file.read_text())
    run = sft(settings(datasets=[{"name": str(data)}]), console=quiet).folder
    longer = settings(datasets=[{"name": str(data)}], max_steps=8)
    os.utime(data)  # the time alone is no change
    sft(longer, resume=run, console=quiet)
    same_size = data.read_text().replace("meows", "MEOWS")
    data.write_text(same_size)
    before = sorted(path.name for path in run.iterdir())
    longer = settings(datasets=[{"name": str(data)}], max_steps=10)
    with pytest.raises(SettingsError, match="chat.jsonl: this data file changed .*--allow-changed-data"):
        sft(longer, resume=run, console=quiet)
    assert sorted(path.name for path in run.iterdir()) == before
    command("sft", "--resume", run, "max_steps=10", code=2)
    command("sft", "--resume", run, "max_steps=10", "--allow-changed-data")
    assert "chat.jsonl: this data file changed since the run began" in capsys.readouterr().out
    sft(
        settings(datasets=[{"name": str(data)}], max_steps=12), resume=run, console=quiet
    )  # it is what was recorded now


def test_fewer_or_more_validation_batches(preference_settings, tmp_path):
    before = preference_settings(DPOSettings, output_dir=str(tmp_path), eval_batches=4)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7}')
    values = {"stage": "dpo", "status": "interrupted", "settings": before.recorded()}
    (tmp_path / "llmlab.json").write_text(json.dumps(values))
    after = before.model_copy(update={"eval_batches": 2})
    assert find_checkpoint(tmp_path, after, load_optimizer=True).name == "checkpoint-7"


@pytest.mark.parametrize(("keep", "left"), [(None, [2, 4, 6]), (2, [4, 6]), (1, [6])])
def test_so_many_checkpoints_are_kept(keep, left, settings, quiet, tmp_path):
    settings = partial(settings, validation_fraction=0)  # the newest are the best then
    folder = sft(settings(max_steps=2), console=quiet).folder
    for name in ("checkpoint-notes", "checkpoint-99"):
        (folder / name).mkdir()
    sft(settings(save_total_limit=keep), resume=folder, console=quiet)
    assert all((folder / name).is_dir() for name in ("checkpoint-notes", "checkpoint-99"))
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(folder)] == left


# The repository around it -------------------------------------------------------------------------------------------


def git(folder, *words):
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    who = ["-c", "user.name=x", "-c", "user.email=x@y"]
    run = subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True, env=environment
    )
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose configuration names commands for everything that git would run."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main/part")
    (folder / "a.txt").write_text("a")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    trap = f"touch {tmp_path / 'ran'}; false"
    (folder / ".gitattributes").write_text("* filter=trap diff=trap\n")
    with (folder / ".git" / "config").open("a") as config:
        config.write(f'[core]\nfsmonitor = "{trap}"\nsshCommand = "{trap}"\npager = "{trap}"\n')
        config.write(f'[filter "trap"]\nclean = "{trap}"\n[diff "trap"]\ntextconv = "{trap}"\n')
        config.write(f'[alias]\nrev-parse = "!{trap}"\nstatus = "!{trap}"\n')
    (folder / "a.txt").write_text("b")
    monkeypatch.chdir(folder)
    return folder


def test_the_revision_is_that_of_git_and_nothing_of_the_repositorys_runs(repository, tmp_path, monkeypatch):
    first = git_revision()
    (repository / "inner").mkdir()
    monkeypatch.chdir(repository / "inner")
    assert git_revision() == first
    assert not (tmp_path / "ran").exists()
    subprocess.run(["git", "status"], capture_output=True, cwd=repository, check=False)
    assert (tmp_path / "ran").exists()  # the trap works
    config = repository / ".git" / "config"
    config.write_text(config.read_text().partition("[core]\nfsmonitor")[0])
    assert first == {"revision": git(repository, "rev-parse", "HEAD")}
    git(repository, "pack-refs", "--all")
    assert git_revision() == first and not (repository / ".git/refs/heads/main/part").exists()
    git(repository, "worktree", "add", "-q", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "second")
    monkeypatch.chdir(tmp_path / "tree")
    second = git_revision()
    assert second == {"revision": git(tmp_path / "tree", "rev-parse", "HEAD")} and second != first
    git(tmp_path / "tree", "checkout", "-q", "--detach", "HEAD~")
    assert git_revision() == first


def test_what_is_no_revision_is_not_read(repository, tmp_path):
    (tmp_path / "secret").write_text("password")
    for head in ("ref: ../../secret", f"ref: {tmp_path / 'secret'}", "password", "ref: refs/heads/none", ""):
        (repository / ".git" / "HEAD").write_text(head)
        assert git_revision() is None
    (repository / ".git" / "HEAD").unlink()
    os.mkfifo(repository / ".git" / "HEAD")  # reading it would wait for ever
    assert git_revision() is None


# Two at once --------------------------------------------------------------------------------------------------------

CLAIM = """
import sys, time
from llmlab.settings.errors import UserError
from llmlab.runs.checkpoints import claim
for line in sys.stdin:  # the place, and when to go
    place, _, moment = line.rpartition(" ")
    while time.time() < float(moment):
        pass
    try:
        with claim(place, resume="resumed" in place) as folder:
            (folder / "llmlab.json").open("x").close()  # fails where two are in
            time.sleep(0.01)
            if "resumed" in place:
                (folder / "llmlab.json").unlink()
        print("trained", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("kind", ["fresh/deep/run", "resumed"])
def test_of_two_processes_released_together_one_gets_the_folder(kind, tmp_path):
    pair = [
        subprocess.Popen([sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = []
    for number in range(30):
        place = tmp_path / str(number) / kind
        if kind == "resumed":
            place.mkdir(parents=True)
        moment = time.time() + 0.01
        for process in pair:
            process.stdin.write(f"{place} {moment}\n")
            process.stdin.flush()
        both = [process.stdout.readline().strip() for process in pair]
        answers += both
        if kind != "resumed":  # one after the other may go on, but two may not begin
            assert both.count("trained") == 1, both
        assert not (place / ".llmlab.lock").exists()
    for process in pair:
        process.communicate()
    refused = [answer for answer in answers if answer != "trained"]
    assert len(refused) >= 15 and all("another run" in text or "already holds a run" in text for text in refused)


def test_data_files_of_earlier_records_compare_by_what_both_have():
    now = {"bytes": 3, "modified": 5, "hash": "a"}
    assert _is_same({"bytes": 3, "modified": 4, "hash": "a"}, now)  # touched, and the same
    assert _is_same({"bytes": 3, "modified": 5}, now) and not _is_same({"bytes": 3, "modified": 4}, now)
    assert not _is_same({"bytes": 3, "modified": 5, "hash": "b"}, now) and not _is_same({}, now)


# On other processes -------------------------------------------------------------------------------------------------


def test_the_rows_of_a_forward_pass_may_change_and_the_rest_follows(settings, quiet, capsys):
    """Batches of 4 x 2 go on as 2 x 4, with the same losses."""
    whole = sft(settings(gradient_accumulation_steps=2), console=quiet)
    expected = losses(whole.folder)
    command("sft", "--resume", whole.folder / "checkpoint-2", "batch_size=2")
    assert losses(whole.folder) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in expected]
    record = read_record(whole.folder)
    assert (record["settings"]["batch_size"], record["settings"]["gradient_accumulation_steps"]) == (2, 4)
    assert record["sources"]["gradient_accumulation_steps"] == "batch of the resumed run"
    assert record["batch"]["rows"] == 8
    assert "an optimizer step keeps its 8 rows, with gradient_accumulation_steps = 4" in capsys.readouterr().out


def test_what_deepspeed_wrote_or_did_not_write(tmp_path):
    (tmp_path / "global_step2").mkdir()
    check = partial(check_deepspeed, tmp_path, processes=2, load_optimizer=True)
    check(used=False)  # no checkpoint of DeepSpeed's
    with pytest.raises(UserError, match="reads only checkpoints that it wrote; resume without it"):
        check(used=True)
    for rank in (0, 1):
        (tmp_path / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check(used=True)
    check(used=False, load_optimizer=False)  # its weights are those of any checkpoint
    for changes in ({"used": False}, {"used": True, "processes": 4}):
        with pytest.raises(UserError, match="wrote it on 2 processes, and reads it on as many"):
            check(**changes)
    with pytest.raises(UserError, match="always restores the optimizer too"):
        check(used=True, load_optimizer=False)


def test_what_shards_a_run_is_known_before_a_model_is_loaded(sft_settings, monkeypatch):
    assert sharding_of(sft_settings()) is None
    assert sharding_of(sft_settings(trainer_args={"deepspeed": "zero2.json"})) == "DEEPSPEED"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_of(sft_settings()) == "FSDP"
    with pytest.raises(UserError, match="optimizer = adafactor: it cannot update weights that FSDP shards"):
        sft(sft_settings(optimizer="adafactor"))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match="fsdp_cpu_ram_efficient_loading: true"):
        sft(sft_settings())
    assert not Path(sft_settings().output_dir).exists()
