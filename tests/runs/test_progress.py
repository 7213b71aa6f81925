"""What a person sees of a run: on a terminal of any width, step and remaining time stay readable."""

import io
import re
from types import SimpleNamespace

import pytest

from llmlab.runs.progress import ProgressLine, print_plan
from llmlab.terminal import Terminal

LOGS = {"loss": 2.3456, "reward": 0.5, "learning_rate": 1e-4, "grad_norm": 12.34}


def lines_of(width, steps, done):
    """Returns what is on the screen after each redrawing of the line."""
    screen = io.StringIO()
    console = Terminal(file=screen, force_terminal=True, width=width, height=24)
    line = ProgressLine(console, tokens_per_step=4096, flops_per_token=1e9, peak_flops=1e15)
    state = SimpleNamespace(global_step=0, max_steps=steps, best_metric=None)
    line.on_train_begin(None, state, None)
    state.global_step = done
    line.on_step_begin(None, state, None)
    line.on_step_end(None, state, None)
    line.on_log(None, state, None, dict(LOGS))
    line.stop()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [part.rstrip() for part in re.split(r"[\r\n]", plain) if part.strip()]


@pytest.mark.parametrize(("width", "steps"), [(80, 10), (80, 1_000_000), (60, 20_000), (132, 20_000)])
def test_step_and_remaining_time_stay_readable(width, steps):
    done = steps // 2
    lines = lines_of(width, steps, done)
    last = lines[-1]
    assert all(len(line) <= width for line in lines)
    assert re.match(rf"step +{done}/{steps} ", last)
    assert re.search(r" \d+:\d\d:\d\d left [\d:-]+$", last)
    assert "reward 0.500" in last and ("━" in last) == (width >= 100)


def test_text_of_others_in_the_plan_is_no_markup_and_no_command():
    screen = io.StringIO()
    rows = [("model", "runs/[red]x[/red]\x1b[2J: 1 M parameters"), ("data", "[/] :smile: [link=http://x]y")]
    print_plan(Terminal(file=screen, width=100), "sft: into [/bold]\x9b2J", rows)
    text = screen.getvalue()
    for part in (r"[red]x[/red]\x1b[2J: 1 M", "[/] :smile: [link=http://x]y", r"sft: into [/bold]\x9b2J"):
        assert part in text
    assert "\x1b" not in text and "\x9b" not in text
