"""Rewards for Python code in fenced blocks: whether ruff accepts it, and whether its structure is the expected one.
Code is only parsed; none of it is ever imported or run."""

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from llmlab.rewards.completions import Completion, answer, code_blocks
from llmlab.rewards.function import Row, RowError, Score, reward_function
from llmlab.settings.errors import UserError
from llmlab.simulator.tasks import structure_of

LANGUAGES = ("python", "py", "python3")
RUFF_TIMEOUT = 20  # seconds for one block


@reward_function(threads=min(8, os.cpu_count() or 1))
def lint_pass(
    completion: Completion,
    row: Row,
    *,
    select: list[str] | None = None,
    ignore: list[str] | None = None,
    absent: Annotated[float, Ge(0)] | None = 0.0,
) -> Score:
    """Scores the share of Python code blocks in which ruff finds nothing.

    Blocks are those fenced as `python` or `py`. `# noqa` comments and configuration files are ignored.
    A block that Python or ruff cannot read does not pass.

    Args:
        select: rules of ruff; None is E4, E7, E9 and F (errors, and names that are undefined or not used).
        ignore: rules to leave out.
        absent: the score without any block, at most 1; None says that the reward does not apply.

    Returns:
        A share from 0 to 1; `absent` without blocks.

    Source: seed, RL guide, section 3.
    """
    rules = ["--select", ",".join(select or ("E4", "E7", "E9", "F"))]
    rules += ["--ignore", ",".join(ignore)] if ignore else []
    command = (_ruff(), "check", "--isolated", "--no-cache", "--ignore-noqa", "--quiet", *rules, "-")
    blocks = code_blocks(answer(completion), LANGUAGES)
    clean = [structure_of(block) is not None and _is_clean(block, command) for block in blocks]
    return sum(clean) / len(clean) if clean else absent


@reward_function(weight=0.5)
def ast_correct(completion: Completion, row: Row, *, fenced: bool = True) -> float:
    """Scores whether the Python code parses and, where an expected program is known, has the same structure.

    Structure is what `ast.dump` shows: names, values and order count; comments, blank space and quotes do not. The
    blocks of an answer are read as one program. The column `expected` holds programs, with or without a fence; null in
    a row asks only that the code parses.

    Args:
        fenced: code stands in blocks fenced as `python` or `py`; False reads the whole answer as code.

    Returns:
        1 or 0; without code the score is 0.

    Source: seed, RL guide, section 3.
    """
    text = answer(completion)
    structure = structure_of("\n".join(code_blocks(text, LANGUAGES)) if fenced else text)
    expected = row.get("expected")
    if expected is None:
        return float(structure is not None)
    target = structure_of("\n".join(code_blocks(expected, LANGUAGES)) or expected)
    if target is None:
        raise RowError("expected: this is not a Python program")
    return float(structure == target)


def _ruff() -> str:
    beside = str(Path(sys.executable).parent)  # of an environment that is not activated
    if found := shutil.which("ruff", path=os.pathsep.join([beside, os.environ.get("PATH", "")])):
        return found
    raise UserError("ruff is not installed: pip install 'llmlab[rewards]' or pip install ruff")


@lru_cache(maxsize=1024)
def _is_clean(block: str, command: tuple[str, ...]) -> bool:
    code = block.encode(errors="replace")
    try:
        done = subprocess.run(command, input=code, capture_output=True, timeout=RUFF_TIMEOUT)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == 2:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"ruff: {lines[-1].strip().removeprefix('Cause: ') if lines else 'failed'}")
    return done.returncode == 0
