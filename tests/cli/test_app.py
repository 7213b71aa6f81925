"""The command line: lazy imports, generated options, sources shown, errors with exit code 2."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.reference import render
from llmlab.cli.app import COMMANDS, main
from llmlab.settings.base import fields_of
from llmlab.stages import STAGES, import_heavy

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate")


def cli(capsys, *words):
    """Runs a command in this process; returns (exit code, output, errors)."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "root")
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys, llmlab\nfrom llmlab.cli.app import main\n"
        f"try: main({[*words, '--help']!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"loaded = sorted(set({HEAVY!r}) & set(sys.modules))\nassert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: llmlab" in result.stdout


def test_every_setting_is_an_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, output, _ = cli(capsys, "pretrain", "--help")
    assert code == 0
    for setting in fields_of(STAGES["pretrain"].settings_class):
        assert f"--{setting.name.replace('_', '-')}" in output
    words = " ".join(output.replace("│", " ").split())
    assert "Peak learning rate, after warmup. [> 0; default: 0.0003; TRL: learning_rate]" in words
    assert "[> 1; only when positional_encoding is yarn; default: 4]" in words


def test_help_of_a_stage_is_grouped_and_shows_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = cli(capsys, "sft", "--help")
    titles = [line.removesuffix(":") for line in output.splitlines() if line and line[0] != " " and line[-1] == ":"]
    panels = {setting.owner.panel for setting in fields_of(STAGES["sft"].settings_class)}
    assert code == 0 and titles[:3] == ["Arguments", "Options", "Launch"] and set(titles[3:]) | {"Options"} >= panels
    assert "[default: load-optimizer]" in output and "[default: none]" in output and "[dim]" not in output
    assert max(map(len, output.splitlines())) <= 80


def test_imports_pause_the_collector_and_commands_do_not(monkeypatch, tmp_path):
    (tmp_path / "probe_of_gc.py").write_text("import gc\npaused = not gc.isenabled()\n")
    (tmp_path / "probe_of_errors.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    try:
        assert import_heavy("probe_of_gc").paused and gc.isenabled()
        with pytest.raises(ModuleNotFoundError):
            import_heavy("probe_of_errors")
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    seen = []
    monkeypatch.setattr("llmlab.cli.app.build_app", lambda requested: lambda **words: seen.append(gc.isenabled()))
    from llmlab.__main__ import main as script

    script()
    assert seen == [True]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_setting_has_a_sentence_of_help(stage):
    for setting in fields_of(stage.settings_class):  # those that only change a default have that of the class above
        assert setting.help.endswith("."), setting.key


def test_options_aliases_and_trailing_values_meet(capsys, tmp_path):
    saved = tmp_path / "saved.json"
    words = ["--learning-rate", "1e-4", "--no-save-best-only", "--datasets", "a | | 2", "--dataset", "b"]
    code, _, errors = cli(capsys, "pretrain", "d_model=64", "n_heads=4", *words[:5], "--save-config", saved)
    assert code == 0, errors
    values = json.loads(saved.read_text())
    assert values["lr"] == 1e-4 and values["save_best_only"] is False and values["model"]["d_model"] == 64
    assert values["stage"] == "pretrain" and values["datasets"][0]["weight"] == 2.0
    code, output, _ = cli(capsys, "pretrain", "--config", saved, "lr=0.5", "--show-config")
    assert code == 0 and "command line" in output and f"{saved}:" in output


def test_show_config_names_each_source(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("max_steps: 7\n")
    _, output, _ = cli(capsys, "pretrain", "-c", recipe, "--preset", "small", "lr=0.25", "--show-config")
    rows = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert f"{recipe}:1" in rows["max_steps"]
    assert "command line" in rows["lr"] and "0.25" in rows["lr"]
    assert "preset small" in rows["batch_size"] and " 8 " in rows["batch_size"]
    assert "default" in rows["grad_clip"]
    _, output, errors = cli(capsys, "pretrain", "--hardware", "m1_max_64gb", "--preset", "small", "--show-config")
    rows = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert "hardware m1_max_64gb" in rows["batch_size"] and " 128 " in rows["gradient_accumulation_steps"]
    assert "preset small" in rows["model.d_model"] and not errors
    _, output, _ = cli(capsys, "sft", "--hardware", "auto", "--show-config")
    assert "hardware " in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "lrr=1"], "error: command line: unknown key 'lrr'; did you mean 'lr'?"),
        (["pretrain", "lr"], "expected key=value"),
        (
            ["pretrain", "--optimizer", "adamv"],
            "paged_lion_32bit; did you mean 'adamw'?",
        ),
        (["pretrain", "--lr", "1", "learning_rate=2"], "given twice, as 2 and 1; keep one"),
        (["pretrain", "lr=1", "lr=2"], "'lr' is given twice, as 1 and 2; keep one"),
        (["pretrain", "--lr", "1", "--lr", "2"], "'lr' is given twice, as 1 and 2; keep one"),
        (["pretrain", "--preset", "smal"], "did you mean 'small'?"),
        (["sft", "--hardware", "rtx_409"], "hardware rtx_409: expected one of auto, a100_40gb"),
        (["sft", "--hardware", "cpu", "--resume", "x"], "--hardware cpu: a resumed run keeps its settings"),
        (["merge", "--hardware", "cpu"], "No such option"),
        (["pretrain", "--config", "nowhere.yaml"], "there is no such file"),
        (["pretrain", "--resume", "nowhere"], "there is no such run folder"),
        (["schema", "pretran"], "did you mean 'pretrain'?"),
        (["run", "nowhere.yaml"], "there is no such file"),
        (["run", "quikstart"], "did you mean 'quickstart'?"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(capsys, words, message):
    code, _, errors = cli(capsys, *words)
    assert code == 2
    assert message in errors and "Traceback" not in errors


def test_unknown_option_and_command_end_with_code_2(capsys):
    assert cli(capsys, "pretrain", "--learnin-rate", "1")[0] == 2
    assert cli(capsys, "pretrian")[0] == 2


def test_alone_it_lists_every_command(capsys):
    code, output, _ = cli(capsys)
    lines = output.splitlines()
    assert code == 0 and len(lines) < 32 and max(map(len, lines)) <= 80
    assert [line[8:].split()[0] for line in lines] == list(COMMANDS)


def test_version(capsys):
    import llmlab

    assert cli(capsys, "--version") == (0, f"llmlab {llmlab.__version__}\n", "")


def test_schema_accepts_what_the_settings_accept(capsys):
    code, output, _ = cli(capsys, "schema", "pretrain")
    schema = json.loads(output)
    assert code == 0
    assert {"lr", "learning_rate", "d_model", "hidden_size", "model", "stage"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert schema["properties"]["learning_rate"]["exclusiveMinimum"] == 0


def test_the_options_page_is_current():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == render(), "run `make docs`"


def test_several_files_merge_and_one_value_twice_is_one(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\nseed: 3\n")
    (tmp_path / "b.json").write_text('{"lr": 2e-4}')
    files = ["--config", tmp_path / "a.yaml", "-c", tmp_path / "b.json"]
    words = ["max_steps=7", "--max-steps", "7", "max_steps=7"]
    code, output, errors = cli(capsys, "pretrain", *files, *words, "--show-config")
    assert code == 0, errors
    rows = {line.split()[0]: line.split()[1:3] for line in output.splitlines() if line}
    assert rows["lr"] == ["0.0002", f"{tmp_path / 'b.json'}:1"]
    assert rows["seed"] == ["3", f"{tmp_path / 'a.yaml'}:2"]
    assert rows["max_steps"] == ["7", "command"]
