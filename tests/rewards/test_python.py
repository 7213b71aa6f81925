"""`lint_pass` and `ast_correct`."""

import pytest

from llmlab.rewards import ast_correct, lint_pass
from llmlab.rewards import python as module
from llmlab.settings.errors import UserError

CLEAN = "```python\ndef add(a, b):\n    return a + b\n```"
UNUSED = "```py\nimport os\n```"
BOMBS = ["(" * 50_000 + ")" * 50_000, "-" * 50_000 + "x", "a" + ".b" * 40_000, "a+" * 40_000 + "a", "x = '\0'"]


def test_lint_pass():
    texts = [CLEAN, UNUSED, f"{CLEAN}\ntext\n{UNUSED}", "no code", "", "```\nimport os\n```", "```python\nx = (\n```"]
    assert lint_pass(texts) == [1, 0, 0.5, 0, 0, 0, 0]
    assert lint_pass(["no code", CLEAN], absent=None) == [None, 1]
    assert lint_pass([[{"role": "assistant", "content": CLEAN}]]) == [1]


def test_lint_rules_are_parameters():
    assert lint_pass([UNUSED], ignore=["F401"]) == [1]
    assert lint_pass([CLEAN], select=["D103"]) == [0]  # no docstring
    with pytest.raises(UserError, match="NOPE1"):
        lint_pass([CLEAN], select=["NOPE1"])


def test_a_model_cannot_silence_the_linter(tmp_path, monkeypatch):
    (tmp_path / "ruff.toml").write_text('lint.select = ["W191"]\n')
    monkeypatch.chdir(tmp_path)
    texts = ["import os  # noqa", "# ruff: noqa\nimport os", "# flake8: noqa\nimport os"]
    assert lint_pass([f"```python\n{text}\n```" for text in texts]) == [0, 0, 0]


def test_blocks_that_are_cut_off_indented_or_within_longer_fences():
    cut = "```python\nx = 1\n"
    indented = "1. so:\n   ```python\n   x = 1\n   ```"
    longer = "````python\nx = '''\n```\n'''\n````"
    assert lint_pass([cut, indented, longer]) == [1, 1, 1]


def test_unicode_and_half_characters():
    assert lint_pass(["```python\nname = 'é漢🎨'\n```"]) == [1]
    assert lint_pass(["```python\nname = '\ud800'\n```"]) == [0]  # Python cannot read it


def test_without_ruff(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name, path: None)
    with pytest.raises(UserError, match="pip install 'llmlab"):
        lint_pass([CLEAN])


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_code_that_breaks_parsers_is_wrong_code(bomb):
    assert ast_correct([f"```python\n{bomb}\n```"]) == [0]
    assert lint_pass([f"```python\n{bomb}\n```"]) == [0]


def test_ast_correct_parses():
    assert ast_correct([CLEAN, "```python\ndef f(:\n```", "", "yes", "```python\n# nothing\n```"]) == [1, 0, 0, 0, 0]
    assert ast_correct(["x = 1", "x =", ""], fenced=False) == [1, 0, 0]


def test_ast_correct_compares_structure():
    expected = "def add(a, b):\n    return a + b\n"
    same = "```python\ndef add( a,b ):  # sum\n\n    return (a+b)\n```"
    renamed = "```python\ndef add(x, y):\n    return x + y\n```"
    in_two = "```python\nx = 1\n```\nand then\n```python\ny = 2\n```"
    texts = [same, renamed, in_two, same, same]
    assert ast_correct(texts, expected=[expected, expected, "x = 1; y = 2", CLEAN, None]) == [1, 0, 1, 1, 1]
    with pytest.raises(UserError, match="row 0: expected: this is not a Python program"):
        ast_correct([same], expected=["def ("])


def test_code_is_never_run(tmp_path):
    path = tmp_path / "touched"
    code = f"```python\nopen({str(path)!r}, 'w').close()\n```"
    assert ast_correct([code]) == lint_pass([code]) == [1]
    assert not path.exists()
