"""Imports go one way (see CONTRIBUTING), files stay short, and nothing is kept under a name that says nothing."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmlab"
LAYERS = [  # a module may import from its own package and from the layers below its own
    {"__main__"},
    {"cli"},
    {"pipeline"},
    {"stages"},
    {"training"},
    {"runs"},
    {"evaluation"},
    {"episodes"},
    {"inference", "rewards", "report"},
    {"data", "optim", "adapters", "hardware", "terminal", "health", "decoding"},
    {"simulator"},
    {"model"},
    {"settings"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Returns the parts of llmlab that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} if node.module != "llmlab" else {f"llmlab.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("llmlab.")} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return  # public names, imported lazily from everywhere
    for other in imports_of(path) - {part}:
        assert other in RANK, f"{other} has no layer yet: add it to LAYERS and to CONTRIBUTING"
        assert RANK[other] > RANK[part], f"{part} may not import {other}"


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts == set(RANK)


def test_files_are_short_and_open_with_what_they_are():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, path
        assert not text or ast.get_docstring(ast.parse(text)), path
        assert path.stem not in {"utils", "util", "helpers", "common", "misc", "manager", "factory"}, path


def test_settings_need_pydantic_alone():
    for path in FILES:
        light = part_of(path) in ("settings", "cli", "stages", "pipeline")
        if light or path.relative_to(PACKAGE).as_posix() in ("runs/history.py", "runs/record.py"):
            heads = {
                name.split(".")[0]
                for node in ast.parse(path.read_text(encoding="utf-8")).body  # module level only
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
            }
            assert not heads & {"torch", "transformers", "trl", "datasets", "peft", "accelerate"}, path
