"""Signals and kills, as one process meets them; `test_several_processes.py` has two."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmlab.runs import checkpoints
from llmlab.runs.record import read_metrics, read_record
from llmlab.runs.signals import Interrupted, handle_signals, interrupt
from llmlab.runs.start import lost_processes_named
from llmlab.settings.errors import UserError
from llmlab.training.pretrain import pretrain

ROOT = Path(__file__).parents[2]


SLOWLY = """
import runpy, sys, time
from transformers import TrainerCallback
from llmlab.cli.app import main

class Slowly(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.05)

with runpy.run_path("{ranks}")["every_trainer"](Slowly):
    main(sys.argv[1:])
"""


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def start(script, *arguments, **how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **how)


@pytest.fixture
def script(tmp_path):
    """A program that trains as the command line does, and slowly: it says each step."""
    path = tmp_path / "train.py"
    path.write_text(SLOWLY.format(ranks=str(ROOT / "tests" / "training" / "ranks.py")))
    return path


@pytest.fixture
def file(settings, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(settings(max_steps=400, eval_every=3, eval_steps=1).model_dump_json(exclude_unset=True))
    return path


def wait_for(line, lines):
    seen = []
    with suppress(OSError):  # a terminal whose program is gone
        for text in lines:
            seen.append(text)
            if line in text:
                return
    raise AssertionError("".join(seen[-20:]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_term_and_hangup_save_as_ctrl_c_does(number, code, settings, quiet, cut_off, tmp_path):
    whole = pretrain(settings(output_dir=str(tmp_path / "whole")), console=quiet)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with cut_off(7, number) as left:
        pretrain(settings(), console=quiet)
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
    assert process.wait(240) == 129
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
from contextlib import suppress
from pathlib import Path
from llmlab.runs.checkpoints import locked
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


def test_the_launcher_cannot_end_a_process_before_it_named_the_loss():
    """A launcher stops the other processes as soon as one died, while they may be about to say so."""
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    try:
        with pytest.raises(UserError, match="another process of this run ended"), lost_processes_named(two):
            raise lost
        signal.raise_signal(signal.SIGTERM)  # ignored from now on
        for first, expected in ((lost, UserError), (ValueError(), Interrupted)):
            with pytest.raises(expected), lost_processes_named(two):
                try:
                    raise first
                except (RuntimeError, ValueError):
                    signal.raise_signal(signal.SIGTERM)  # while it handles the loss
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with lost_processes_named(two):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, earlier)
