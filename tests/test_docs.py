"""The pages of docs/: generated parts are current, links lead somewhere, commands, settings and programs are valid.

Commands are parsed, and those of stages resolve their settings; docs/tour.md is run by `test_readme.py`.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from docs.reference import render_symptoms
from llmlab.cli.app import COMMANDS, build_app, main
from llmlab.health.symptoms import load_table
from llmlab.pipeline.reading import read_pipeline
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.gates import read_gates
from llmlab.settings.presets import read_preset
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md"))
WRITTEN = [path for path in PAGES if path.name != "options.md"]
TEXTS = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def blocks(language, *names):
    """Returns the fenced blocks of a language in the written pages, each with its page's name."""
    found = [
        (path.name, re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[path.name], re.S | re.M)) for path in WRITTEN
    ]
    return [(name, text) for name, texts in found for text in texts]


def commands():
    """Returns every llmlab command of the written pages, comments off and continued lines joined."""
    joined = [(name, text.replace("\\\n", " ")) for name, text in blocks("")]
    lines = [(name, re.split(r"\s+#", line)[0]) for name, text in joined for line in text.splitlines()]
    return [(name, line.strip()) for name, line in lines if line.startswith("llmlab ")]


def anchors(text):
    """Returns a page's headings as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


def test_the_page_of_symptoms_is_current():
    assert TEXTS["symptoms.md"] == render_symptoms(), "run `make docs`"


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    folder = DOCS if (DOCS / name).is_file() else ROOT
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        file = folder / path if path else folder / name
        assert file.is_file(), f"{name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: {target}"


def test_every_page_is_in_the_table_of_contents():
    listed = {line.strip() for _, text in [("", TEXTS["index.md"])] for line in text.splitlines()}
    assert {path.stem for path in PAGES} - {"index"} <= listed
    assert {f"notebooks/{path.stem}" for path in NOTEBOOKS} <= listed


def test_troubleshooting_links_to_every_symptom():
    linked = {name for text in TEXTS.values() for name in re.findall(r"symptoms\.md#(\w+)\)", text)}
    assert linked == load_table()[0].keys()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with what a checkout has and the model's configuration that a page prints."""
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "model_config.json").write_text(next(text for _, text in blocks("json") if "d_model" in text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), dict.fromkeys(commands()))
def test_a_command_is_valid(page, command, folder, capsys):
    """Parses a command as the command line does; a stage's settings are resolved, without running it."""
    name, *words = shlex.split(command)[1:]
    assert name in COMMANDS, command
    if name in STAGES and not {"--resume", "--print-launch"} & {*words}:
        with pytest.raises(SystemExit) as end:
            main([name, *(word for word in words if word != "--show-config"), "--show-config"])
        assert not end.value.code, capsys.readouterr().err
        return
    found = typer.main.get_command(build_app(name)).commands[name]
    while hasattr(found, "commands"):
        assert words and words[0] in found.commands, command
        found = found.commands[words.pop(0)]
    assert found.make_context(found.name, words, obj=[name, *words]).params  # raises where an option is unknown


def test_settings_on_pages_load(folder):
    read = 0
    for name, text in blocks("yaml"):
        values = yaml.safe_load(text)
        if "stage" in values:
            resolve(STAGES[values.pop("stage")].settings_class, Layer(name, values))
            read += 1
        elif "stages" in values:
            (folder / "pipeline.yaml").write_text(text)
            assert len(read_pipeline(folder / "pipeline.yaml").stages) == len(values["stages"])
        else:
            read_gates(values["gates"])
    model = resolve(STAGES["pretrain"].settings_class, read_layer(folder / "model_config.json")).settings.model
    assert read >= 3 and (model.d_model, model.n_layers) == (896, 24)  # the seed's defaults


def test_the_quick_reference_says_what_the_presets_set():
    """The nine blocks of the LLM-Lab document, as the table prints them and as the presets load."""
    lines = TEXTS["quick_reference.md"].splitlines()
    rows = [row for row in (line.strip("| ").split("|")[1:] for line in lines) if len(row) == 3][1:]
    numbers = [[re.findall(r"\d(?:[\d,]*\d)?(?:e-\d+)?", cell) for cell in row] for row in rows]
    assert len(numbers) == 9
    for column, size in enumerate(("small", "medium", "large")):
        for stage, (rate, batch, steps) in zip(
            ("pretrain", "sft", "ppo"), (numbers[:3], numbers[3:6], numbers[6:]), strict=True
        ):
            found = resolve(STAGES[stage].settings_class, read_preset(stage, size)).settings
            learning_rate = found.lr if stage == "pretrain" else found.learning_rate
            second = found.mini_batch_size if stage == "ppo" else found.gradient_accumulation_steps
            assert float(rate[column][0]) == learning_rate
            assert [int(number) for number in batch[column]] == [found.batch_size, second]
            low, *high = (int(number.replace(",", "")) for number in steps[column])
            assert low <= found.max_steps <= (high or [low])[0]


def test_python_on_pages_compiles():
    programs = blocks("python")
    assert programs
    for name, text in programs:
        compile(text, name, "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_and_says_nothing_of_its_machine(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert not re.search(r'(/tmp|/home|/root|/work)/|"name": "stderr"', text) and len(text) < 100_000
    for cell in cells:
        ast.parse("".join(cell["source"]))


def test_the_pages_build(tmp_path):
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    words = ["-b", "html", "-W", "--keep-going", "-n", "-q", str(DOCS), str(tmp_path)]
    result = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "options.html").is_file()
