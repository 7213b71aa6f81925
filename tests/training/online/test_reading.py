"""GRPO and PPO are read in few files, which their headers name."""

import ast
import re
from pathlib import Path

import pytest

from llmlab.training import online

FOLDER = Path(online.__file__).parent


@pytest.mark.parametrize(("name", "files", "lines"), [("grpo.py", 5, 600), ("ppo.py", 6, 800)])
def test_an_algorithm_is_read_in_few_lines(name, files, lines):
    header = ast.get_docstring(ast.parse((FOLDER / name).read_text()))
    read = {name, *re.findall(r"`(\w+\.py)`", header)}
    assert len(read) <= files
    assert sum(len((FOLDER / each).read_text().splitlines()) for each in read) <= lines
