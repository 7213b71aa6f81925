"""`llmlab monitor`: what it shows of running, died and finished runs, on every size of terminal, and what it reads."""

import json
import os
import pty
import re
import select
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from llmlab.cli.app import main
from llmlab.cli.runs import draw
from llmlab.runs import history
from llmlab.terminal import Terminal, draw_sparkline


def make_run(folder, stage="sft", status="running", steps=400, done=40, silent=0, started=0, events=()):
    """A run folder that logged each of so many steps, half a second apart, and that silent seconds ago last."""
    folder.mkdir(parents=True)
    now = datetime.fromtimestamp(1_700_000_000 + started, timezone.utc).isoformat()
    record = {"stage": stage, "status": status, "started": now, "steps": steps, "settings": {}}
    (folder / "llmlab.json").write_text(json.dumps(record))
    lines = [
        {"step": s, "tokens": 100 * s, "seconds": s / 2, "loss": 1 + 40 / s, "grad_norm": 1.5, "learning_rate": 1e-4,
         "tokens_per_second": 2048.0}
        for s in range(1, done + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "health.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for name in ("llmlab.json", "metrics.jsonl"):
        os.utime(folder / name, (time.time() - silent,) * 2)
    return folder


SPIKE = {"step": 30, "symptom": "loss_spike", "metric": "loss", "value": 9.0, "message": "loss 9 \x1b[31m[red]now"}


def lines_of(folder, width=80, height=24, runs=None):
    console = Terminal(width=width, height=height, color_system=None)
    runs = history.find_runs(folder) if runs is None else runs
    drawn = console.render_lines(draw(folder, runs, width, height), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in drawn]


def test_running_runs_come_first_with_progress_time_left_and_health(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", status="finished", steps=40, started=9)
    make_run(tmp_path / "b" / "sft", events=[SPIKE])
    make_run(tmp_path / "c", stage="ppo", silent=3600, started=5)
    make_run(tmp_path / "d", status="finished", steps=40, started=3)
    title, heading, *rows = lines_of(Path(), width=130)
    assert "1 died  1 running  2 finished" in title and heading.split()[:4] == ["run", "stage", "status", "step"]
    died, running, last, first = (row.split() for row in rows)
    assert [row[0] for row in (died, running, last, first)] == ["c", "b/sft", "a", "d"]
    assert died[:4] == ["c", "ppo", "died", "40/400"]
    assert running[2:4] == ["running", "40/400"]
    minutes, seconds = re.fullmatch(r"(\d)m (\d\d)s", " ".join(running[4:6])).groups()
    assert 175 <= 60 * int(minutes) + int(seconds) <= 180  # 360 steps of half a second
    assert running[6:8] == ["loss", "2"] and running[-3:] == ["loss_spike", "at", "30"]
    assert last[3] == "40" and len(last[-1]) == 12 and last[-1].endswith("▁▁▁")  # 1 + 40 / s falls


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 14), (140, 50), (40, 10), (20, 5)])
def test_it_fits_the_terminal(tmp_path, width, height):
    for number in range(30):
        make_run(tmp_path / f"some-long-folder-{number:02}", done=20, started=-number, events=[SPIKE])
    lines = lines_of(tmp_path, width, height)
    assert max(map(len, lines)) <= width and len(lines) == min(height, 32)


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    folders = [make_run(tmp_path / name, started=number) for number, name in enumerate("abc")]
    runs = history.find_runs(tmp_path)
    lines_of(tmp_path, runs=runs)
    read = []
    for name in ("read_record", "read_metrics", "read_events"):
        original = getattr(history, name)
        monkeypatch.setattr(history, name, lambda folder, f=original, **k: read.append(folder.name) or f(folder, **k))
    runs = history.find_runs(tmp_path, runs)
    lines_of(tmp_path, runs=runs)
    assert read == []
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 80, "tokens": 1, "seconds": 40.0, "loss": 0.5}) + "\n")
    runs = history.find_runs(tmp_path, runs)
    assert "80/400" in lines_of(tmp_path, runs=runs)[3] and set(read) == {"b"}


def test_metrics_of_finished_runs_out_of_sight_are_not_read(tmp_path, monkeypatch):
    for number in range(40):
        make_run(tmp_path / f"r{number}", status="finished", done=3, started=number)
    read = []
    original = history.read_metrics
    monkeypatch.setattr(history, "read_metrics", lambda folder, **k: read.append(folder.name) or original(folder, **k))
    lines_of(tmp_path)
    assert set(read) == {f"r{number}" for number in range(18, 40)}  # the newest, of which 22 fit on 24 lines


def test_without_a_terminal_it_prints_once(tmp_path, capsys):
    make_run(tmp_path / "a", events=[SPIKE])
    make_run(tmp_path / "x\x1b[31m[b]", stage="[red]\x07", status="[/]\x1b]0;")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "llmlab.json").write_text("{")
    with pytest.raises(SystemExit) as caught:
        main(["monitor", str(tmp_path)])
    assert not caught.value.code
    output = capsys.readouterr().out
    assert "1 running  1 [/]\\x1b]0;  1 damaged" in output and "loss_spike at 30" in output and "\x1b" not in output
    with pytest.raises(SystemExit) as caught:
        main(["monitor", str(tmp_path / "c")])
    assert caught.value.code == 2


def test_a_long_folder_leaves_room_for_the_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("long" * 20) / "last"
    make_run(folder / "a")
    with pytest.raises(SystemExit):
        main(["monitor", str(folder)])
    title = capsys.readouterr().out.splitlines()[0]
    assert title.startswith("…") and title.rstrip().endswith("/last  1 running") and len(title) <= 80


def test_on_a_terminal_it_redraws_and_ctrl_c_leaves_it_as_it_was(tmp_path):
    import pyte

    folder = make_run(tmp_path / "live", done=10)
    pid, terminal = pty.fork()
    if pid == 0:  # what runs in the terminal
        os.environ |= {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80", "LINES": "24"}
        words = ["-m", "llmlab", "monitor", str(tmp_path), "--refresh", "0.2"]
        os.execv(sys.executable, [sys.executable, *words])
    view = pyte.Screen(80, 24)
    stream = pyte.ByteStream(view)
    raw = b""

    def read_until(
        text,
    ):
        nonlocal raw
        for _ in range(400):
            if select.select([terminal], [], [], 0.05)[0]:
                try:
                    part = os.read(terminal, 65536)
                except OSError:  # it has ended
                    return False
                raw += part
                stream.feed(part)
            if any(text in line for line in view.display):
                return True
        return False

    step = len((folder / "metrics.jsonl").read_text().splitlines())
    assert read_until(f"{step}/400")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step + 1, "tokens": 1, "seconds": 9.0, "loss": 0.5}) + "\n")
    assert read_until(f"{step + 1}/400")
    os.write(terminal, b"\x03")
    read_until("never shown")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert raw.count(b"\x1b[?1049h") == raw.count(b"\x1b[?1049l") == 1 and b"Traceback" not in raw
    os.close(terminal)


def test_sparklines():
    assert draw_sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert (
        draw_sparkline([3, 0, 0, 7], 2) == "▁█" and draw_sparkline([3, 3], 8) == "▁▁" and draw_sparkline([], 8) == ""
    )


@pytest.mark.parametrize(("steps", "loss"), [(10, 1e308), (10, -1e308), (10, 10**400), (1, 1.0), (-3, 1.0)])
def test_values_out_of_all_bounds_end_no_view(tmp_path, steps, loss):
    folder = make_run(tmp_path / "a", steps=steps, done=9)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10**9, "tokens": 1, "seconds": 9, "loss": loss}) + "\n")
    assert any("a" in line for line in lines_of(tmp_path))


def test_a_run_that_was_removed_since_the_last_look_ends_no_view(tmp_path):
    folder = make_run(tmp_path / "a")
    runs = history.find_runs(tmp_path)
    shutil.rmtree(folder)
    assert any("a" in line for line in lines_of(tmp_path, runs=runs))
