"""Run folders read: found, judged alive or dead, followed back, compared."""

import json
import os
import time

import pytest

from llmlab.runs.history import (
    RunFolder,
    ancestors,
    changed_settings,
    curve_metric,
    differing,
    direction,
    find_parent,
    find_runs,
    flatten,
    open_run,
    short_names,
)
from llmlab.runs.record import METRICS, read_metrics
from llmlab.settings.data import TokenizerSettings
from llmlab.settings.errors import UserError
from llmlab.settings.sources import as_resolved

LINES = [
    {"step": 1, "tokens": 10, "seconds": 1.0, "loss": 4.0, "learning_rate": 0.1},
    {"step": 2, "tokens": 20, "seconds": 3.0, "loss": 2.0, "learning_rate": 0.1},
    {"step": 2, "tokens": 20, "seconds": 3.5, "eval_loss": 2.5},
    {"step": 3, "tokens": 30, "seconds": 4.0, "loss": 3.0, "learning_rate": 0.0},
]


def write(folder, lines=LINES, **record):
    folder.mkdir(parents=True)
    values = {"stage": "pretrain", "status": "finished", "started": "2026-01-01T10:00:00+00:00", **record}
    (folder / "llmlab.json").write_text(json.dumps(values))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def grow_old(folder, seconds):
    moment = time.time() - seconds
    for path in folder.iterdir():
        os.utime(path, (moment, moment))


# One run ------------------------------------------------------------------------------------------------------------


def test_a_run_tells_its_last_and_best_values(tmp_path):
    run = open_run(write(tmp_path / "a", metrics={"eval_loss": 2.4, "note": "text", "x": float("nan")}))
    assert run.step == 3 and run.tokens == 30 and run.seconds == 4.0
    assert run.metrics == {"loss": 3.0, "learning_rate": 0.0, "eval_loss": 2.4}  # the recorded result wins
    assert run.best("loss") == (2, 2.0)
    assert run.best("learning_rate") is None and run.best("nothing") is None
    assert run.key_metric == ("eval_loss", 2.4)


def test_a_stage_without_steps_is_judged_by_its_own_metric(tmp_path):
    ended = "2026-01-01T10:01:30+00:00"
    run = open_run(write(tmp_path / "a", None, stage="tokenizer", metrics={"vocab_size": 300}, ended=ended))
    assert run.key_metric == ("vocab_size", 300) and run.step is None and run.seconds == 90
    assert open_run(write(tmp_path / "b", [{"step": 1, "loss": 1.0, "reward": 0.5}], stage="grpo")).key_metric == (
        "reward",
        0.5,
    )


def test_a_running_run_that_is_silent_has_died(tmp_path):
    run = open_run(write(tmp_path / "a", status="running"))
    assert run.status == "running"
    grow_old(run.folder, 3600)
    assert run.status == "died" and 3590 < run.silence < 3700
    (run.folder / "checkpoint-3").mkdir()  # a sign of life
    assert run.status == "running"
    # an hour between two log events: an hour of silence means nothing
    slow = open_run(
        write(tmp_path / "b", [{"step": 1, "seconds": 10.0}, {"step": 2, "seconds": 3610.0}], status="running")
    )
    grow_old(slow.folder, 3600)
    assert slow.status == "running"
    grow_old(write(tmp_path / "c"), 10**6)
    assert open_run(tmp_path / "c").status == "finished"


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("eval_loss", -1),
        ("perplexity", -1),
        ("rewards/margins", 1),
        ("eval_win_rate", 1),
        ("mean_token_accuracy", 1),
        ("learning_rate", 0),
        ("tokens_per_second", 0),
    ],
)
def test_which_direction_is_better(name, sign):
    assert direction(name) == sign


def test_changed_settings_have_their_sources(tmp_path):
    settings = {"lr": 1e-3, "model": {"d_model": 64, "n_heads": 2}, "trainer_args": {"a": 1}, "seed": 42}
    sources = {
        **{"lr": "x.yaml:3", "model.d_model": "command line", "model.n_heads": "default"},
        **{"trainer_args": "x.yaml:4", "seed": "default"},
    }
    run = open_run(write(tmp_path / "a", settings=settings, sources=sources))
    assert changed_settings(run) == [
        ("lr", 1e-3, "x.yaml:3"),
        ("model.d_model", 64, "command line"),
        ("trainer_args.a", 1, "x.yaml:4"),
    ]


def test_settings_made_in_python_come_from_arguments_where_they_differ_from_the_defaults(tmp_path):
    resolved = as_resolved(TokenizerSettings(datasets=["demo/stories"], vocab_size=300, output_dir="runs/tokenizer"))
    values = resolved.settings.model_dump(mode="json")
    run = open_run(write(tmp_path / "a", stage="tokenizer", settings=values, sources=resolved.sources))
    assert {(key, source) for key, _, source in changed_settings(run)} >= {
        ("datasets", "arguments"),
        ("vocab_size", "arguments"),
    }
    assert "max_bytes" not in [key for key, _, _ in changed_settings(run)]


# Finding ------------------------------------------------------------------------------------------------------------


def test_runs_are_found_in_order_of_their_start(tmp_path):
    late = write(tmp_path / "a" / "late", started="2026-01-03T00:00:00+00:00")
    early = write(tmp_path / "b" / "c" / "early", started="2026-01-02T00:00:00+00:00")
    write(early / "checkpoint-3")
    write(tmp_path / ".hidden" / "run")
    write(tmp_path / "venv" / "run")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    assert [run.folder for run in find_runs(tmp_path)] == [early, late]


def test_a_damaged_record_does_not_hide_the_others(tmp_path):
    write(tmp_path / "good")
    (write(tmp_path / "bad") / "llmlab.json").write_text("{")
    (write(tmp_path / "list") / "llmlab.json").write_text("[]")
    runs = {run.folder.name: run for run in find_runs(tmp_path)}
    assert runs["good"].status == "finished"
    assert runs["bad"].status == runs["list"].status == "damaged" and "damaged" in runs["bad"].problem
    with pytest.raises(UserError, match="damaged"):
        open_run(tmp_path / "bad")


def test_what_is_no_run_folder_is_a_sentence_with_the_nearest(tmp_path, monkeypatch):
    write(tmp_path / "runs" / "pretrain" / "checkpoint-3").joinpath("llmlab.json").unlink()
    (tmp_path / "runs" / "pretrain" / "llmlab.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for given, message in (
        ("runs/pretrian", "there is no such run folder; did you mean 'pretrain'?"),
        ("runs/pretrain/checkpoint-3", "did you mean 'runs/pretrain', which holds it?"),
        ("runs", "no run folder of llmlab: it has no llmlab.json"),
    ):
        with pytest.raises(UserError) as caught:
            open_run(given)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="there is no such folder"):
        find_runs("nowhere")


# Lineage ------------------------------------------------------------------------------------------------------------


def test_lineage_goes_back_to_what_is_no_run(tmp_path):
    tokenizer = write(tmp_path / "tokenizer", None, stage="tokenizer")
    base = write(tmp_path / "base", parents=[str(tokenizer), "hub/model"])
    sft = open_run(write(tmp_path / "sft", parents=[str(base / "checkpoint-3")]))
    (base / "checkpoint-3").mkdir()
    (parent,) = ancestors(sft).parents
    assert parent.run is not None and parent.run.folder == base
    assert [(up.name, up.run is None) for up in parent.parents] == [(str(tokenizer), False), ("hub/model", True)]


def test_a_circle_of_parents_ends(tmp_path):
    one, two = write(tmp_path / "one", parents=[str(tmp_path / "two")]), tmp_path / "two"
    write(two, parents=[str(one)])
    up = ancestors(open_run(one)).parents[0]
    assert up.run.folder == two and up.parents[0].run.folder == one and up.parents[0].parents == ()


def test_relative_parents_are_found_from_elsewhere_and_after_a_move(tmp_path, monkeypatch):
    settings = {"output_dir": "runs/sft"}
    write(tmp_path / "runs" / "base")
    write(tmp_path / "runs" / "sft", settings=settings, parents=["runs/base"])
    (tmp_path / "moved").mkdir()
    (tmp_path / "runs").rename(tmp_path / "moved" / "runs")
    monkeypatch.chdir("/")
    found = find_parent(open_run(tmp_path / "moved" / "runs" / "sft"), "runs/base")
    assert found is not None and found.folder.samefile(tmp_path / "moved" / "runs" / "base")


# Comparing ----------------------------------------------------------------------------------------------------------


def test_only_what_differs_is_told(tmp_path):
    one = {"lr": 1e-3, "seed": 1, "output_dir": "a", "model": {"d_model": 64, "norm": "rms"}, "beta": 0.1}
    two = {"lr": 2e-3, "seed": 1, "output_dir": "b", "model": {"d_model": 64, "norm": "layer"}}
    sources = {"lr": "command line"}
    runs = [
        open_run(write(tmp_path / "a", settings=one, sources=sources, versions={"torch": "1"})),
        open_run(write(tmp_path / "b", settings=two, sources=sources, versions={"torch": "2"})),
    ]
    # beta is a default that the other run does not have at all: nobody chose it
    assert differing(runs, "settings") == {"lr": [1e-3, 2e-3], "model.norm": ["rms", "layer"]}
    assert differing(runs, "versions") == {"torch": ["1", "2"]}
    assert differing(runs, "hardware") == {}


def test_a_setting_that_one_run_was_given_and_the_other_lacks(tmp_path):
    one = open_run(write(tmp_path / "a", settings={"beta": 0.2}, sources={"beta": "x.yaml:1"}))
    two = open_run(write(tmp_path / "b", settings={"lr": 1}, sources={"lr": "default"}))
    assert differing([one, two], "settings") == {"beta": [0.2, ...]}


def test_names_are_as_short_as_they_can_be(tmp_path):
    a, b = open_run(write(tmp_path / "x" / "sft")), open_run(write(tmp_path / "y" / "sft"))
    c = open_run(write(tmp_path / "y" / "dpo"))
    assert short_names([a, c]) == ["sft", "dpo"]
    assert short_names([a, b]) == ["x/sft", "y/sft"]


def test_which_curve_is_drawn(tmp_path):
    evaluated = [{"step": step, "eval_loss": 1.0, "loss": 1.0} for step in (1, 2, 3)]
    assert curve_metric(open_run(write(tmp_path / "a", evaluated))) == "eval_loss"
    assert curve_metric(open_run(write(tmp_path / "b"))) == "loss"  # it was evaluated once
    assert curve_metric(open_run(write(tmp_path / "c", None))) is None


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


@pytest.mark.parametrize("count", [0, 1, 3, 2000])
@pytest.mark.parametrize("end", ["", '{"step": 9, "seco', "\n[1]\nnot json\n", '{"step": "x"}\n'])
def test_the_last_line_is_found_at_the_end_of_the_log(count, end, tmp_path):
    lines = [{"step": k, "seconds": k / 2, "text": "é" * (k % 40)} for k in range(count)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")
    assert RunFolder(tmp_path, {}).last_line == (lines or [{}])[-1]
    found = read_metrics(tmp_path, last=True)
    assert read_metrics(tmp_path) == lines and found == lines[count - len(found) :] and len(found) >= min(count, 3)


def test_finished_runs_are_listed_without_reading_their_logs(tmp_path):
    line = {"step": 7, "tokens": 90, "seconds": 3.5, "loss": 9.0}
    (tmp_path / METRICS).write_text(f"{json.dumps({**line, 'step': 6})}\n{json.dumps(line)}\n")
    record = {"stage": "sft", "status": "finished", "step": 8, "metrics": {"loss": 1.5}}
    run = RunFolder(tmp_path, record)
    assert (run.step, run.tokens, run.seconds, run.key_metric, run.status) == (8, 90, 3.5, ("loss", 1.5), "finished")
    assert "lines" not in vars(run)
    unfinished = RunFolder(tmp_path, {"stage": "sft", "status": "interrupted"})
    assert unfinished.step == 7 and unfinished.key_metric == ("loss", 9.0)
