"""`llmlab runs ...` in a terminal's words: tables that fit 80 columns, errors; pages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmlab.cli.app import main
from llmlab.terminal import short_number


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    return lambda *words: run_cli(capsys, "runs", *words)


def run_cli(capsys, *words):
    """Returns the exit code of `llmlab WORDS`, and what it printed on standard output and error."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, words)])
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A tokenizer, two pretrainings from it and an unfinished SFT run that went silent, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write("runs/a/tokenizer", "tokenizer", metrics={"vocab_size": 1024})
    for name, lr, slope in (("pretrain", 0.001, 0.01), ("again", 0.002, 0.02)):
        write(
            f"runs/a/{name}",
            "pretrain",
            [{"step": step, "tokens": 100 * step, "seconds": step, "loss": 4 - slope * step} for step in range(1, 101)]
            + [{"step": 100, "tokens": 10000, "seconds": 101, "eval_loss": 3.5}],
            parents=["runs/a/tokenizer"],
            settings={"lr": lr, "seed": 1, "output_dir": f"runs/a/{name}"},
            sources={"lr": "p.yaml:3", "seed": "default"},
            versions={"torch": "2.0"},
            hardware={"device": "cpu", "name": "A [fast] CPU", "memory": 8e9, "dtype": "bf16", "reason": "it can"},
            git={"revision": "0123456789abcdef"},
            data={"sources": [{"name": "demo/stories", "rows": 1234, "dropped": {"empty": 3}}], "validation_rows": 8},
        )
    folder = write(
        "runs/b/sft", "sft", [{"step": 5, "seconds": 1, "loss": 2}], status="running", parents=["runs/a/again"]
    )
    old = time.time() - 7200
    for path in folder.iterdir():
        os.utime(path, (old, old))
    return tmp_path


def write(folder, stage, lines=(), **record):
    folder = Path(folder)
    folder.mkdir(parents=True)
    values = {"stage": stage, "status": "finished", "started": f"2026-01-01T10:0{len(str(folder)) % 10}:00+00:00"}
    (folder / "llmlab.json").write_text(json.dumps({**values, **record}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_list_fits_and_tells_how_runs_went(cli, runs, monkeypatch):
    code, output, _ = cli("list")
    lines = output.splitlines()
    assert code == 0 and all(len(line) <= 80 for line in lines)
    rows = {line.split()[0]: line.split() for line in lines}
    assert lines[1].split() == ["run", "stage", "status", "steps", "result", "from"]
    assert "runs/a/" in lines and "runs/b/" in lines
    assert rows["tokenizer"][1:6] == ["tokenizer", "finished", "-", "vocab_size", "1,024"]
    assert rows["again"][1:] == ["pretrain", "finished", "100", "eval_loss", "3.5", "tokenizer"]
    assert rows["sft"][2] == "died" and rows["sft"][-1] == "a/again"  # elsewhere: with the folder that it is in
    monkeypatch.setenv("COLUMNS", "120")
    lines = cli("list")[1].splitlines()
    assert lines[1].split()[-2:] == ["started", "took"]
    assert next(line for line in lines if line.startswith("again")).endswith("1m 41s")


def test_a_list_of_long_names_and_numbers_folds_nothing(cli, runs):
    line = {"step": 123456, "seconds": 9876, "loss": 1.23456}
    write(f"runs/c/{'long-name-' * 5}", "pretrain", [line], status="interrupted", parents=["runs/a/again"])
    code, output, _ = cli("list")
    lines = output.splitlines()
    assert code == 0 and all(len(line) <= 80 for line in lines)
    (row,) = (line for line in lines if line.startswith("long-name"))
    assert "interrupted" in row and "123,456" in row and "loss 1.2" in row
    assert len(lines) == 2 * 3 + 5  # three folders with headings, five runs: a line each


def test_the_list_of_one_folder_and_of_none(cli, runs):
    assert [entry["folder"] for entry in json.loads(cli("list", "runs/b", "--json")[1])] == ["runs/b/sft"]
    (runs / "empty").mkdir()
    assert "no runs in empty" in cli("list", "empty")[1]
    assert json.loads(cli("list", "empty", "--json")[1]) == []


def test_a_damaged_record_is_listed(cli, runs):
    (runs / "runs/a/pretrain/llmlab.json").write_text("{")
    code, output, _ = cli("list")
    assert code == 0 and "this record is damaged" in output and "again" in output


def test_show_tells_everything_at_80_columns(cli, runs):
    code, output, _ = cli("show", "runs/b/sft")
    assert code == 0 and "silent for 2h 00m" in output
    lineage = output[output.index("Lineage") :].splitlines()
    assert lineage[1].startswith("runs/b/sft") and lineage[2].startswith("└── runs/a/again  pretrain  eval_loss 3.5")
    assert lineage[3].startswith("    └── runs/a/tokenizer  tokenizer  vocab_size 1,024")
    code, output, _ = cli("show", "runs/a/pretrain")
    assert all(len(line) <= 80 for line in output.splitlines())
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["lr"] == ["lr", "0.001", "p.yaml:3"] and "seed" not in rows and "output_dir" not in rows
    assert rows["loss"] == ["loss", "3", "█████▇▇▇▆▆▆▆▅▅▅▄▄▄▃▃▃▂▂▁"] or rows["loss"][:2] == ["loss", "3"]


def test_compare_leaves_out_what_is_equal(cli, runs):
    code, output, _ = cli("compare", "runs/a/pretrain", "runs/a/again")
    assert code == 0 and all(len(line) <= 80 for line in output.splitlines())
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["lr"] == ["lr", "0.001", "0.002"] and "seed" not in rows
    assert rows["loss"] == ["loss", "3", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "runs/a/pretrian"], "there is no such run folder; did you mean 'pretrain'?"),
        (["show", "runs/a"], "this is no run folder of llmlab"),
        (["compare", "runs/a/pretrain"], "expected two runs or more"),
        (["compare", "runs/a/pretrain", "runs/a/pretrain"], "given twice"),
        (["compare", "runs/a/pretrain", "runs/a/agian"], "did you mean 'again'?"),
        (["list", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_sentences(cli, runs, words, message):
    code, _, errors = cli(*words)
    assert code == 2 and message in errors and "Traceback" not in errors


def test_compare_writes_a_page(cli, runs):
    code, output, _ = cli("compare", "runs/a/pretrain", "runs/a/again", "--html", "both.html")
    assert (code, output) == (0, "both.html\n")
    assert "again from 3.98 at step 1 to 2 at step 100" in Path("both.html").read_text()


def test_report_writes_a_page_again(runs, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["report", "runs/a/pretrain"])
    page = Path("runs/a/pretrain/report.html")
    assert not caught.value.code and capsys.readouterr().out == f"{page}\n" and page.is_file()
    with pytest.raises(SystemExit) as caught:
        main(["report", "runs/a/pretrian"])
    assert caught.value.code == 2 and "did you mean 'pretrain'?" in capsys.readouterr().err


def test_nothing_heavy_is_imported(runs):
    code = (
        "import sys\nfrom llmlab.cli.app import main\n"
        "try: main(['runs', 'show', 'runs/a/pretrain'])\nexcept SystemExit as end: assert not end.code\n"
        "loaded = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\nassert not loaded, loaded"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "PYTHONPATH": root}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [(1024, "1,024"), (1434000.0, "1,434,000"), (0.46834, "0.4683"), (1e-8, "1e-08"), (16151.3, "16,151"), (2.0, "2")],
)
def test_numbers_are_short(value, text):
    assert short_number(value) == text
