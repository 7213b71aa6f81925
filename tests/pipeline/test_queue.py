"""The queue: jobs are copies, one worker runs them in order, and a kill in the middle loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmlab.cli.app import main
from llmlab.pipeline import queue as jobs
from llmlab.settings.errors import SettingsError

RECIPE = "output_dir: out/{name}\nstages:\n  tokenizer: {{datasets: [words.txt], vocab_size: 270}}\n"
# what stands for `llmlab run`: it notes the job's number, where it runs, and does what the file `acts` says of it
PROGRAM = """
import json, os, pathlib, sys, time
recipe = pathlib.Path(sys.argv[1])
number = recipe.parent.name[:4]
with open("log", "a") as log:
    print(number, json.loads(recipe.read_text())["output_dir"], file=log)
act = json.loads(pathlib.Path("acts").read_text()).get(number, 0)
if isinstance(act, float):
    pathlib.Path("started").write_text(str(os.getpid()))
    time.sleep(act)
    act = 0
sys.exit(act)
"""
WORKER = "import sys; from pathlib import Path; from llmlab.pipeline.queue import work; " + (
    "[print(job.name, code, flush=True) for job, code in work(Path('queue'), [sys.executable, 'program.py'])]"
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with recipes a, b and c, in which jobs succeed."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=name))
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "acts").write_text("{}")
    return tmp_path


def add(*names):
    return [jobs.add(Path("queue"), Path(f"{name}.yaml"), copy(f"{name}.yaml")) for name in names]


def copy(path):
    return jobs.copy_recipe(Path(path), allow_code=False)


def run_all():
    return [(job.name, code) for job, code in jobs.work(Path("queue"), [sys.executable, "program.py"])]


def states():
    return {job.name: job.parent.name for job in jobs.find_jobs(Path("queue"))}


def await_file(path):
    for _ in range(1000):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(path)


def start_worker(**options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", WORKER], env=environment, **options)


def test_jobs_run_in_order_where_they_were_added_and_a_failure_stops_none(place, monkeypatch):
    (place / "acts").write_text('{"0002": 3}')
    first, second, _ = add("a", "b", "c")
    for name in "abc":
        (place / f"{name}.yaml").write_text("stages: {}")  # changed later: no matter
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    program = [sys.executable, str(place / "program.py")]
    seen = [(job.name, job.parent.name, code) for job, code in jobs.work(place / "queue", program)]
    assert seen == [
        ("0001-a", "running", None), ("0001-a", "done", 0),
        ("0002-b", "running", None), ("0002-b", "failed", 3),
        ("0003-c", "running", None), ("0003-c", "done", 0),
    ]  # fmt: skip
    assert (place / "log").read_text() == "0001 out/a\n0002 out/b\n0003 out/c\n"
    assert not (elsewhere / "log").exists()


def test_a_killed_worker_is_followed_by_one_that_waits_for_its_job_and_goes_on(place):
    (place / "acts").write_text('{"0001": 1.5}')
    add("a", "b")
    worker = start_worker()
    job = int(await_file(place / "started"))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    os.kill(job, 0)  # the job's process is still there
    assert states() == {"0001-a": "running", "0002-b": "waiting"}
    (place / "acts").write_text("{}")
    began = time.monotonic()
    assert run_all() == [("0001-a", None), ("0001-a", 0), ("0002-b", None), ("0002-b", 0)]
    assert time.monotonic() - began > 0.5  # it waited
    assert (place / "log").read_text().split()[::2] == ["0001", "0001", "0002"]
    assert set(states().values()) == {"done"}


def test_of_two_workers_one_works_and_also_runs_what_is_added_meanwhile(place):
    (place / "acts").write_text('{"0001": 1.0}')
    add("a")
    worker = start_worker(stdout=subprocess.PIPE, text=True)
    await_file(place / "started")
    add("b")
    assert run_all() == []
    assert worker.communicate()[0].split("\n")[:-1] == ["0001-a None", "0001-a 0", "0002-b None", "0002-b 0"]


def test_a_signal_ends_the_job_first_and_leaves_it_to_be_resumed(place):
    (place / "acts").write_text('{"0001": 30.0}')
    add("a", "b")
    worker = start_worker()
    job = int(await_file(place / "started"))
    worker.terminate()
    assert worker.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)
    assert states() == {"0001-a": "running", "0002-b": "waiting"}


def test_what_cannot_start_is_a_failure_of_its_job_alone(place):
    first, *_ = add("a", "b", "c")
    (first / "job.json").write_text("{")
    assert run_all()[1::2] == [("0001-a", 2), ("0002-b", 0), ("0003-c", 0)]
    assert json.loads(Path("queue/failed/0001-a/job.json").read_text())["problem"].endswith(
        "No such file or directory"
    )


def test_a_copy_holds_the_settings_files_that_its_recipe_names(place):
    (place / "recipes").mkdir()
    (place / "recipes" / "shape.json").write_text('{"d_model": 112}')
    base, sample = {"stage": "pretrain", "model": "shape.json", "datasets": ["x.txt"]}, {"model": "${base}"}
    recipe = {"stages": {"base": base, "sample": {**sample, "prompts": ["x.txt"]}}}
    (place / "recipes" / "mine.json").write_text(json.dumps(recipe))
    values = copy("recipes/mine.json")
    assert values["output_dir"] == "runs/mine"
    assert values["stages"]["base"]["model"] == {"d_model": 112}
    assert values["stages"]["sample"]["model"] == "${base}"


def test_the_command_adds_runs_and_lists(place, capfd, monkeypatch):
    (place / "words.txt").write_text("the cat sat on the mat\n" * 50)
    broken = place / "broken.yaml"
    broken.write_text("stages:\n  tokenizer: {vocabulary: 3}\n")
    with pytest.raises(SystemExit) as caught:
        main(["queue", "a.yaml", "broken.yaml"])
    assert caught.value.code == 2 and not (place / "runs").exists()
    assert "broken.yaml:2: unknown key 'vocabulary'" in capfd.readouterr().err
    (place / "b.yaml").write_text(RECIPE.format(name="b").replace("words.txt", "gone.txt"))
    with pytest.raises(SystemExit) as caught:
        main(["queue", "a.yaml", "b.yaml"])  # real runs of `llmlab run`
    output = capfd.readouterr()
    assert caught.value.code == 1
    assert "1 of 2 jobs failed: 0002-b (exit code 2)" in output.err and "gone.txt" in output.err
    assert (place / "out" / "a" / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(SystemExit) as caught:
        main(["queue"])
    assert not caught.value.code
    lines = capfd.readouterr().out.split("\n")
    found = {words[0]: words[1] for words in map(str.split, lines) if words and words[0][:4].isdecimal()}
    assert found == {"0001-a": "done", "0002-b": "failed"}


def test_options_without_anything_to_do(place, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["queue", "--run-options", "--allow-code"])
    assert caught.value.code == 2 and "--run-options: expected FILE" in capsys.readouterr().err


def test_a_recipe_may_not_publish(place):
    (place / "a.yaml").write_text("stages:\n  sft: {datasets: [x.jsonl], report_to: wandb}\n")
    with pytest.raises(SettingsError, match="report_to sends data off this machine"):
        copy("a.yaml")


def test_a_number_is_taken_by_a_job_that_is_damaged_or_was_just_added(place, monkeypatch):
    for folder in ("done/0001-a", "waiting/0002-a"):
        (place / "queue" / folder).mkdir(parents=True)
        (place / "queue" / folder / "recipe.json").write_text("{}")
    (job,) = add("a")
    assert job.name == "0003-a"
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [] if pattern.endswith("/*") else glob(path, pattern))
    (job,) = add("a")  # by another process, which saw no job
    assert job.name == "0001-a"
    assert [each.name for each in add("a")] == ["0004-a"]


def test_a_folder_that_is_no_text_is_a_failure_of_its_job_alone(place):
    first, _ = add("a", "b")
    (first / "job.json").write_text('{"cwd": 5}')
    assert run_all()[1::2] == [("0001-a", 2), ("0002-b", 0)]


def test_a_worker_waits_for_a_job_that_was_started_by_another_spelling_of_the_folder(place):
    (place / "acts").write_text('{"0001": 1.5}')
    add("a")
    (place / "link").symlink_to(place / "queue")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.Popen([sys.executable, "-c", WORKER.replace("'queue'", "'link'")], env=environment)
    await_file(place / "started")
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    (place / "acts").write_text("{}")
    began = time.monotonic()
    assert run_all() == [("0001-a", None), ("0001-a", 0)]
    assert time.monotonic() - began > 0.5
