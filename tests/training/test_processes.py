"""Signals, kills and several processes, as real processes meet them."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.runs import checkpoints
from llmlab.runs.record import read_metrics, read_record
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.errors import UserError
from llmlab.training import pretrain as stage
from llmlab.training.pretrain import pretrain

ROOT = Path(__file__).parents[2]


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def start(script, *arguments, launcher=(), **how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **how)


@pytest.fixture
def script(tmp_path):
    """A program that trains as the command line does, and slowly: it says each step."""
    path = tmp_path / "train.py"
    path.write_text(
        "import sys, time\n"
        "from llmlab.cli.app import main\n"
        "from llmlab.runs import callbacks\n"
        "def slowly(self, args, state, control, **kwargs):\n"
        "    print('step', state.global_step, flush=True)\n"
        "    time.sleep(0.05)\n"
        "callbacks.MetricsLog.on_step_begin = slowly\n"
        "main(sys.argv[1:])\n"
    )
    return path


@pytest.fixture
def file(settings, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(settings(max_steps=400, eval_every=3, eval_steps=1).model_dump_json(exclude_unset=True))
    return path


def wait_for(line, lines):
    seen = []
    for text in lines:
        seen.append(text)
        if line in text:
            return
    raise AssertionError("".join(seen[-20:]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_term_and_hangup_save_as_ctrl_c_does(number, code, settings, quiet, interrupt_after, tmp_path):
    whole = pretrain(settings(output_dir=str(tmp_path / "whole")), console=quiet)
    undo = interrupt_after(stage.PretrainTrainer, 7, number)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as left:
        pretrain(settings(), console=quiet)
    undo()
    folder = tmp_path / "run"
    assert left.value.code == code and read_record(folder)["status"] == "interrupted"
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert checkpoints.checkpoints(folder)[-1].name == "checkpoint-7"
    pretrain(settings(), resume=folder, console=quiet)
    assert losses(folder) == losses(whole.folder)


def test_a_closed_terminal_ends_a_run_that_is_saved(script, file, tmp_path):
    ours, theirs = pty.openpty()
    process = start(script, "pretrain", "--config", file, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lead)
    os.close(theirs)
    with open(ours, closefd=False, errors="replace") as screen:
        wait_for("step 4", screen)
    os.close(ours)  # as when the window is closed: writing to it fails from now on
    assert process.wait(60) == 129
    folder = tmp_path / "run"
    assert read_record(folder)["status"] == "interrupted" and checkpoints.checkpoints(folder)


def lead():
    """Makes the terminal the process's own, which then gets its hangup."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_after_nohup_a_hangup_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals(interrupt):
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


HOLD = """
import sys
from pathlib import Path
from llmlab.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_live_run_is_not_resumed_and_a_killed_one_is(settings, quiet, tmp_path):
    folder = pretrain(settings(max_steps=4), console=quiet).folder
    (tmp_path / "hold.py").write_text(HOLD)
    live = start(tmp_path / "hold.py", folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for("held", live.stdout)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"another run \(process {live.pid} on .*\) is writing into this folder"):
        pretrain(settings(max_steps=6), resume=folder, console=quiet)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    live.kill()
    live.communicate()
    assert (folder / ".llmlab.lock").exists()  # and holds nothing
    pretrain(settings(max_steps=6), resume=folder, console=quiet)
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6] and not (folder / ".llmlab.lock").exists()


# Two processes of one run -------------------------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d")
BEGIN = """
import signal, sys
from pathlib import Path
from accelerate import PartialState
from transformers import TrainerCallback
from rich.console import Console
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_layer
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.sources import resolve
from llmlab.training.pretrain import PretrainTrainer, pretrain
from llmlab.runs.start import begin

settings = resolve(PretrainSettings, read_layer(sys.argv[1])).settings
process = PartialState(cpu=True)
assert process.num_processes == 2
for number in range(30):
    place = Path(sys.argv[2]) / str(number) / "deep" / "run"
    if number % 3 == 1:
        place.mkdir(parents=True, exist_ok=True)
        (place / "notes.txt").write_text("mine")
    process.wait_for_everyone()  # released together
    said = "begun"
    given = settings.model_copy(update={"output_dir": str(place)})
    resume = place if number % 3 == 2 else None
    how = {"load_optimizer": True, "allow_changed_data": False, "console": Console(quiet=True)}
    try:
        with begin(given, resume=resume, **how) as start:
            assert start.folder.is_dir()
            process.wait_for_everyone()
    except UserError as error:
        said = str(error).rpartition(": ")[2]
    process.wait_for_everyone()
    with open(f"{sys.argv[2]}/said-{process.process_index}", "a") as log:
        log.write(f"{number % 3} {said} {place.exists()}\\n")

class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if process.process_index == 1 and state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)  # the other one hears nothing of it

original = PretrainTrainer.__init__
def init(self, *args, **kwargs):
    original(self, *args, **kwargs)
    self.add_callback(Stop())
PretrainTrainer.__init__ = init
try:
    pretrain(settings, console=Console(quiet=True))
except SystemExit as left:
    with open(f"{sys.argv[2]}/said-{process.process_index}", "a") as log:
        log.write(f"left {left.code}\\n")
"""


def test_two_ranks_agree_on_the_folder_and_stop_after_the_same_step(file, tmp_path):
    script = tmp_path / "begin.py"
    script.write_text(BEGIN)
    process = start(script, file, tmp_path, launcher=TORCHRUN, stderr=subprocess.PIPE)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1] and len(said[0]) == 31
    assert set(said[0][:30]) == {
        "0 begun False",  # a run that writes nothing leaves nothing
        "1 it already holds other files; choose another folder True",
        "2 there is no such run folder False",
    }
    folder = tmp_path / "run"
    assert said[0][30] == "left 143" and read_record(folder)["status"] == "interrupted"
    assert max(losses(folder)) == 4 and (folder / "checkpoint-4" / "rng_state_1.pth").is_file()
    assert checkpoints.checkpoints(folder)[-1].name == "checkpoint-4"
