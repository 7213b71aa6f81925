"""Health events in a run folder: written as they come, read back, and damaged lines passed over."""

import math

from llmlab.health.symptoms import Event
from llmlab.runs.record import EVENTS, RunRecord, read_events


def test_events_are_read_back_and_damaged_lines_are_passed_over(tmp_path):
    record = RunRecord(tmp_path, stage="sft")
    spike = Event(40, "loss_spike", "loss", 9.5, "loss 9.5 at step 40, 2.1 before")
    broken = Event(41, "loss_not_finite", "loss", math.nan, "loss is NaN at step 41", "critical", "stopped")
    record.log_event(spike)
    record.log_event(broken)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"step": 42}\n[]\n{"step": 43, "sym')
    first, second = read_events(tmp_path)
    assert first == spike
    assert math.isnan(second.value) and second.severity == "critical" and second.action == "stopped"


def test_a_run_without_events_has_none(tmp_path):
    assert read_events(tmp_path) == []
