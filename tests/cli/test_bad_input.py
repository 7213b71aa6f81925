"""Mistakes on the command line: one sentence, exit code 2, nothing written, and early where that is possible."""

import json
import os
import subprocess
import sys

import pytest

from llmlab.cli.app import main
from llmlab.rewards.compose import compose
from llmlab.settings.errors import UserError


def cli(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code or 0, capsys.readouterr().err


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    return tmp_path


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--policy-checkpoint", "runs/scorer"], "policy_checkpoint = runs/scorer: there is no such folder"),
        (["dpo", "reference_checkpoint=./x"], "reference_checkpoint = ./x: there is no such folder"),
        (["ppo", "value_checkpoint=runs/x"], "value_checkpoint = runs/x: there is no such folder"),
        (["sft", "policy_checkpoint=owner/name", "datasets=b.jsonl"], "datasets = b.jsonl: there is no such file"),
        (["pretrain", "tokenizer_name=runs/tok", "datasets=a.jsonl"], "tokenizer_name = runs/tok: there is no such"),
        (["pretrain", "datasets=a.jsonl", "output_dir=taken"], "output_dir = taken: it already holds other files"),
        (["merge", "runs/x", "-o", "out"], "adapter = runs/x: there is no such"),
    ],
)
def test_what_is_missing_is_said_before_torch_is_imported(place, words, message):
    before = written(place)
    code = (
        "import sys\nfrom llmlab.cli.app import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert message in result.stderr and "couldn't connect" not in result.stderr
    assert written(place) == before


PIPELINE = "stages:\n  tokenizer: {datasets: [a.jsonl], vocab_size: 300}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PIPELINE + "  sft: {policy_checkpoint: runs/x, datasets: [b.jsonl]}",
            "runs/x: there is no such folder (stage",
        ),
        (
            PIPELINE + "  sft: {policy_checkpoint: runs/x, datasets: [b.jsonl]}",
            "b.jsonl: there is no such file or folder",
        ),
        (PIPELINE + "  sft: {policy_checkpoint: '${pretrain}'}", "${pretrain}: expected an earlier stage"),
        (PIPELINE + "  grpo: {policy_checkpoint: '${tokenizer}', rewards: [lenght]}", "did you mean 'length'?"),
        ("stages: {1: {}}", "stage '1': expected a name"),
        ("stages: {null: {}}", "stage 'none': expected a name"),
        ("stages: {2024-02-30: {}}", "unknown stage '2024-02-30'"),
        ("stages: [a]", "expected 'stages', a mapping"),
        ("stages: {sft: {stage: [a]}}", "unknown stage '['a']'"),
        ("stages: {sft: [1]}", "stage 'sft': expected a mapping"),
        ("output_dir: null\n" + PIPELINE, "output_dir = none: expected the path of a folder"),
        ("output_dir: [a]\n" + PIPELINE, "output_dir = [a]: expected the path of a folder"),
        ("stages: &a {sft: *a}", "nested more than 50 levels deep"),
    ],
)
def test_a_pipeline_is_checked_before_its_first_stage(place, capsys, text, message):
    (place / "p.yaml").write_text(text)
    before = written(place)
    code, errors = cli(capsys, "run", "p.yaml")
    assert code == 2 and message in errors and "Traceback" not in errors
    assert written(place) == before


@pytest.mark.parametrize("words", [["output_dir="], ["tokenizer.vocab_size=1", "tokenizer.vocab_size=2"]])
def test_a_pipelines_overrides(place, capsys, words):
    (place / "p.yaml").write_text(PIPELINE)
    assert cli(capsys, "run", "p.yaml", "--dry-run", *words)[0] == 2


def test_a_damaged_pipeline_record(place, capsys):
    (place / "p.yaml").write_text("output_dir: out\n" + PIPELINE)
    (place / "out").mkdir()
    for text in ("[]", '{"tokenizer": []}', '{"tokenizer": {"status": 5}}', "[" * 100_000, ""):
        (place / "out" / "pipeline.json").write_text(text)
        code, errors = cli(capsys, "run", "p.yaml", "--dry-run")
        assert code == 2 and "pipeline.json: this record is damaged" in errors


@pytest.mark.parametrize(
    "record",
    ["[]", '{"step": "many"}', '{"metrics": []}', '{"parents": [5]}', '{"git": {}}', '{"started": 5}', "[" * 100_000],
)
def test_one_damaged_record_does_not_break_the_list(place, capsys, record):
    for name in ("good", "bad"):
        (place / "runs" / name).mkdir()
        (place / "runs" / name / "llmlab.json").write_text('{"stage": "sft", "status": "finished"}')
    (place / "runs" / "bad" / "llmlab.json").write_text(record)
    (place / "runs" / "good" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n[]\n{"step": "x"}\nnull\n{"st')
    main_code = 0
    try:
        main(["runs", "list", "--json"])
    except SystemExit as end:
        main_code = end.code or 0
    output = capsys.readouterr().out
    assert main_code == 0
    found = {run["folder"].split("/")[-1]: run for run in json.loads(output)}
    assert found["good"]["status"] == "finished" and found["good"]["step"] == 1
    assert found["bad"]["status"] == "damaged" and "this record is damaged" in found["bad"]["problem"]
    code, errors = cli(capsys, "runs", "show", "runs/bad")
    assert code == 2 and "this record is damaged" in errors


def test_a_model_larger_than_the_machine_is_refused_before_it_is_made(place, capsys):
    large = ["d_model=1048576", "n_heads=16", "n_kv_heads=2", "n_layers=2", "d_ff=4194304"]
    code, errors = cli(capsys, "model", "init", "-o", "out", *large)
    assert code == 2 and "this model needs at least" in errors and "of memory" in errors
    assert not (place / "out").exists()


def test_what_the_system_refuses_is_no_fault_of_ours(place, capsys, monkeypatch):
    from llmlab.runs import history

    def fails(error):
        def find(*folders):
            raise error

        monkeypatch.setattr(history, "find_runs", find)
        return cli(capsys, "runs", "list")

    code, errors = fails(PermissionError(13, "Permission denied", "runs/secret"))
    assert (code, errors) == (2, "error: runs/secret: Permission denied\n")
    code, errors = fails(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert code == 2 and errors.startswith("error: out of memory: ")
    code, errors = fails(UserError("x" * 5000))
    assert code == 2 and len(errors) < 700


OWN = {
    "exit": ("def f(completions, **k):\n    raise SystemExit(0)\n", "'f' failed at row 0 .*SystemExit: 0"),
    "error": ("def f(completions, **k):\n    raise ValueError('a\\x1b[2Jb')\n", r"ValueError: a\\x1b\[2Jb"),
    "count": ("def f(completions, **k):\n    return [1.0]\n", "gave 1 values for 2 completions"),
    "nothing": ("def f(completions, **k):\n    pass\n", "gave NoneType; expected a list"),
    "generator": ("def f(completions, **k):\n    yield 1.0\n    raise ValueError('x')\n", "gave generator.*: x"),
    "float": (
        "class V:\n    def __float__(self):\n        raise RuntimeError('no')\n"
        "def f(completions, **k):\n    return [V(), V()]\n",
        "gave V: cannot be read as a number: no",
    ),
    "huge": ("def f(completions, **k):\n    return [10**400] * 2\n", "gave int: cannot be read as a number"),
}


@pytest.mark.parametrize(("code", "message"), OWN.values(), ids=OWN)
def test_a_reward_of_ones_own_fails_in_one_sentence(tmp_path, code, message):
    (tmp_path / "r.py").write_text(code)
    reward = compose([{"name": "r.py:f"}], normalize=False, allow_code=True, folder=tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        reward.score(["a", "b"], prompts=["", ""])
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "import nowhere_at_all", "def f(:", "\x00"])
def test_a_file_of_rewards_that_does_not_load(tmp_path, code):
    (tmp_path / "r.py").write_text(code)
    with pytest.raises(UserError, match="r.py: cannot be loaded: "):
        compose([{"name": "r.py:f"}], normalize=False, allow_code=True, folder=tmp_path)


def test_a_closed_standard_input(capsys, monkeypatch):
    from llmlab.cli import chat

    monkeypatch.setattr(sys, "stdin", None)
    code, errors = cli(capsys, "generate", "owner/name")
    assert code == 2 and "there is no prompt" in errors
    with pytest.raises(UserError, match="standard input is closed"):
        chat._read_line(interactive=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": null}', "expected a prompt of text or of messages, found null"),
        ('{"prompt": 5}', "found 5"),
        ('{"prompt": []}', r"found \[\]"),
        ('{"messages": [null]}', r"found \[null\]"),
        ('{"prompt": "\\ud800"}', "expected valid Unicode"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[]", "expected a mapping"),
    ],
)
def test_odd_prompts(tmp_path, line, message):
    from llmlab.cli.chat import _read_prompts

    (tmp_path / "p.jsonl").write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{message}"):
        list(_read_prompts(tmp_path / "p.jsonl"))


def test_a_device_is_no_file_of_settings(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.yaml")
    code, errors = cli(capsys, "sft", "-c", tmp_path / "a.yaml")
    assert code == 2 and "not a regular file (a device or a pipe)" in errors
