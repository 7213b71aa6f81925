"""Text from elsewhere never steers a terminal and is never markup, whatever prints it."""

import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from llmlab.cli.app import main
from llmlab.cli.chat import Writer
from llmlab.settings.errors import UNPRINTABLE, printable
from llmlab.terminal import Terminal, say, say_json

EVIL = "\x1b[2J\x1b]0;x\x07\x9b31m\u202e[/][red]x[/red][link=http://x]y[/link]:smile:\r\x7f"
TEXTS = st.text(st.one_of(st.characters(), st.sampled_from("\x1b[]/\\\x9b\x07\r\x85red:")), max_size=40)


def harmless(output: str) -> bool:
    return not UNPRINTABLE.search(output)


@given(TEXTS)
def test_no_way_of_printing_lets_control_characters_through(text):
    screen = io.StringIO()
    console = Terminal(file=screen, width=200)
    table = Table("a", escape(text), title=escape(text))
    table.add_row(escape(text), Text(text))
    console.print(escape(text), Text(text), table)
    console.print(text, markup=False)
    console.rule(escape(text))
    with Progress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task(escape(text))
    assert harmless(screen.getvalue())
    screen.getvalue().encode("utf-8")


@given(st.text(st.characters(exclude_categories=["Cs", "Zl", "Zp", "Zs", "Cf", "Mn"]), min_size=1, max_size=40))
def test_what_is_shown_is_the_text_itself_with_its_controls_as_escapes(text):
    screen = io.StringIO()
    shown = printable(text)
    Terminal(file=screen, width=1000).print(escape(text), soft_wrap=True, end="")
    if "\t" not in text and "\\" not in text:  # rich's markup has backslashes of its own
        assert unicodedata.normalize("NFC", screen.getvalue()) == unicodedata.normalize("NFC", shown)


@given(TEXTS)
def test_lines_and_json_of_others(text):
    from contextlib import redirect_stdout

    screen = io.StringIO()
    with redirect_stdout(screen):
        say(text)
    assert harmless(screen.getvalue())
    screen = io.StringIO()
    with redirect_stdout(screen):
        say_json({"text": [text]}, indent=2)
    assert harmless(screen.getvalue()) and json.loads(screen.getvalue()) == {"text": [text]}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_command_split_over_pieces_of_a_reply_is_shown(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    writer = Writer()
    for piece in ("\x1b", "[2", "J\x1b]0;ti", "tle\x07", "\x9b", "31m"):
        writer.write(piece)
    assert capsys.readouterr().out.replace("\n", "") == r"\x1b[2J\x1b]0;title\x07\x9b31m"


def test_every_console_is_made_in_one_place():
    package = Path(main.__code__.co_filename).parents[1]
    makers = {str(path.relative_to(package)) for path in package.rglob("*.py") if " Console(" in path.read_text()}
    assert makers == set()
    assert issubclass(Terminal, Console)


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        output = capsys.readouterr()
        assert harmless(output.out) and harmless(output.err)
        return caught.value.code or 0, output.out, output.err

    return run


def evil_run(folder, **changes):
    folder.mkdir(parents=True)
    name = EVIL.replace("/", "")
    record = {
        "stage": EVIL, "status": EVIL, "started": "2026-01-01T10:00:00+00:00", "parents": [EVIL],
        "settings": {"lr": EVIL, name: 1}, "sources": {"lr": EVIL, name: EVIL}, "versions": {EVIL: EVIL},
        "hardware": {"name": EVIL, "device": EVIL, "dtype": EVIL, "reason": EVIL},
        "git": {"revision": EVIL, "changed": True},
        "data": {"sources": [{"name": EVIL, EVIL: EVIL}], EVIL: EVIL}, "resumed": [{"step": 3, "at": EVIL}],
    }  # fmt: skip
    (folder / "llmlab.json").write_text(json.dumps({**record, **changes}))
    lines = [{"step": step, "seconds": step, "loss": 4 - step, EVIL: step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_records_of_runs(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = EVIL.replace("/", "")
    one, two = evil_run(tmp_path / name / "one"), evil_run(tmp_path / name / f"two{name}", settings={"lr": "[/b]"})
    code, output, errors = cli("runs", "list")
    assert code == 0 and printable(name) in output, errors
    code, output, errors = cli("runs", "show", one)
    assert code == 0 and printable(EVIL) in output, errors
    assert cli("runs", "compare", one, two)[0] == 0
    code, output, _ = cli("runs", "list", "--json")
    assert code == 0 and repr(name)[1:-1] in repr(json.loads(output))
    code, _, errors = cli("runs", "show", tmp_path / f"no{name}")
    assert code == 2 and printable(name) in errors


def test_data(cli, tmp_path):
    from llmlab.data.tokenizer import learn_bpe
    from llmlab.settings.data import DataSource

    learn_bpe([DataSource(name="demo/stories", subset="50kB")], 300, tmp_path / "t", show_progress=False)
    path = tmp_path / f"rows{EVIL.replace('/', '')}.jsonl"
    rows = [{"question": EVIL, "answer": f"{EVIL}{number}", EVIL: EVIL} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("data", "check", path)[0] == 0
    code, output, errors = cli("data", "check", path, "--json")
    assert code == 0 and EVIL in json.loads(output)["sources"][0]["columns"], errors
    code, output, errors = cli("data", "preview", path, "-t", tmp_path / "t")
    assert code == 0 and r"\x9b31m\u202e[/][red]x[/red][link=http://x]y[/link]:smile:" in output, errors


def test_rewards(cli, tmp_path):
    path = tmp_path / "done.jsonl"
    path.write_text(json.dumps({"prompt": EVIL, "completion": EVIL}) + "\n")
    (tmp_path / "own.py").write_text("def good(completions, **columns):\n    return [1.0 for _ in completions]\n")
    code, output, errors = cli(
        "reward-check", path, "-r", f"{tmp_path / 'own.py'}:good", "--allow-code", "--no-normalize"
    )
    assert code == 0 and r"\x1b[2J" in output, errors
    code, _, errors = cli("reward-check", path, "-r", f"no{EVIL}")
    assert code == 2 and "error:" in errors


def test_settings_and_their_sources(cli, tmp_path):
    path = tmp_path / f"r{EVIL.replace('/', '')}.yaml"
    path.write_text(json.dumps({"output_dir": EVIL, "policy_checkpoint": "[/]"}))
    code, output, errors = cli("sft", "-c", path, "--show-config")
    assert code == 0 and printable(EVIL) in output, errors
    path.write_text(json.dumps({EVIL: EVIL}))
    code, _, errors = cli("sft", "-c", path)
    assert code == 2 and printable(EVIL) in errors
    path.write_text(json.dumps({"stages": {"tokenizer": {"datasets": [EVIL]}}, "output_dir": str(tmp_path / EVIL)}))
    code, output, errors = cli("run", path, "--dry-run")
    assert code in (0, 2), errors
