"""The page of a pipeline: its stages in order, with results, curves and references to their pages."""

import json
import re

import pytest

from llmlab.pipeline.running import write_pipeline_page
from llmlab.settings.errors import UserError


def write_stage(folder, name, minute, **record):
    place = folder / name
    place.mkdir(parents=True)
    values = {"status": "finished", "started": f"2026-01-01T00:{minute:02}:00+00:00", **record}
    (place / "llmlab.json").write_text(json.dumps(values))
    return place


def state(needs=(), status="finished", kind="sft"):
    needed = dict.fromkeys(needs, "id")
    return {"status": status, "owner": "o", "run": "r", "needed_runs": needed, "inputs": {"kind": {"stage": kind}}}


def test_stages_are_in_the_order_of_their_runs(tmp_path):
    folder = tmp_path / "<out>"
    base = write_stage(
        folder, "base", 1, stage="pretrain", ended="2026-01-01T00:03:00+00:00", metrics={"eval_loss": 2.5}
    )
    tuned = write_stage(folder, "tuned", 4, stage="sft", status="diverged")
    lines = [{"step": k, "tokens": 100 * k, "seconds": 30.0 * k, "loss": 3 / k} for k in (1, 2, 3)]
    (tuned / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = {"step": 2, "symptom": "loss_spike", "metric": "loss", "value": 1.0, "message": "it jumped"}
    (tuned / "health.jsonl").write_text(json.dumps(event) + "\n")
    (base / "report.html").write_text("")
    states = {"later": state(["tuned"], "started"), "tuned": state(["base"]), "base": state(kind="pretrain")}
    (folder / "pipeline.json").write_text(json.dumps(states))
    page = write_pipeline_page(folder).read_text()
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in re.findall(r"(?s)<tr>(.*?)</tr>", page)[1:]]
    assert rows[0] == ["1", "base", "pretrain", "finished", "eval_loss", "2.5", "–", "–", "2m", "00s", "0", "–"]
    assert rows[1] == ["2", "tuned", "sft", "diverged", "loss", "1", "3", "300", "1m", "30s", "1", "base"]
    assert rows[2] == ["3", "later", "sft", "failed", "–", "–", "–", "-", "0", "tuned"]
    assert '<a href="base/report.html">base</a>' in page and "&lt;out&gt;" in page and "1 of 3" in page
    assert len(re.findall("<svg", page)) == 1 and "tuned: Loss" in page
    assert page.count("var(--warning)") - page.count("color: var(--warning)") == 2  # the event, its number above


def test_a_stage_whose_folder_was_moved_and_linked_has_its_results(tmp_path):
    write_stage(tmp_path / "disk", "base", 1, stage="pretrain", metrics={"eval_loss": 2.5})
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "base").symlink_to(tmp_path / "disk" / "base")
    (folder / "pipeline.json").write_text(json.dumps({"base": state(kind="pretrain")}))
    assert "<b>2.5</b>" in write_pipeline_page(folder).read_text()


def test_a_damaged_record_is_one_sentence(tmp_path):
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(UserError, match="pipeline.json: this record is damaged"):
        write_pipeline_page(tmp_path)
