"""Rewards for Python code in fenced blocks: whether ruff accepts it, and whether its structure is the expected one.

Code is only parsed; none of it is ever imported or run.
"""

import ast
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.rewards.completions import Completion, answer, code_blocks
from llmlab.settings.errors import UserError

LANGUAGES = ("python", "py", "python3")
LONGEST = 100_000  # characters of code that are parsed
SECONDS = 20  # for ruff to look at one block


def lint_pass(
    completions: list[Completion],
    *,
    select: list[str] | None = None,
    ignore: list[str] | None = None,
    absent: Annotated[float, Ge(0)] | None = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Scores the share of Python code blocks in which ruff finds nothing.

    Blocks are those fenced as `python` or `py`. `# noqa` does not silence anything, and no configuration file is read.
    A block that Python or ruff cannot read does not pass.

    Args:
        completions: texts or messages of the batch.
        select: rules of ruff; none are E4, E7, E9 and F (errors, and names that are undefined or not used).
        ignore: rules to leave out.
        absent: the score without any block, at most 1; none says that the reward does not apply.
        columns: not used.

    Returns:
        A share from 0 to 1; `absent` without blocks.

    Raises:
        UserError: ruff is not installed, or does not know a rule.

    Source: seed, RL guide, section 3.
    """
    rules = ["--select", ",".join(select or ("E4", "E7", "E9", "F"))]
    rules += ["--ignore", ",".join(ignore)] if ignore else []
    per_row = [code_blocks(answer(completion), LANGUAGES) for completion in completions]
    clean = {block: structure_of(block) is not None for found in per_row for block in found}
    blocks = [block for block, parses in clean.items() if parses]
    command = [_ruff(), "check", "--isolated", "--no-cache", "--ignore-noqa", "--quiet", *rules, "-"]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        clean.update(zip(blocks, pool.map(lambda block: _is_clean(block, command), blocks), strict=True))
    return [sum(clean[block] for block in found) / len(found) if found else absent for found in per_row]


def ast_correct(
    completions: list[Completion],
    expected: list[Any] | None = None,
    *,
    fenced: bool = True,
    **columns: Any,
) -> list[float | None]:
    """Scores whether the Python code parses and, where an expected program is known, has the same structure.

    Structure is what `ast.dump` shows: names, values and order count; comments, blank space and quotes do not. The
    blocks of an answer are read as one program.

    Args:
        completions: texts or messages of the batch.
        expected: column of programs, with or without a fence; None in a row asks only that the code parses.
        fenced: code stands in blocks fenced as `python` or `py`; false reads the whole answer as code.
        columns: not used.

    Returns:
        1 or 0; no code at all is 0.

    Raises:
        UserError: an expected program does not parse.

    Source: seed, RL guide, section 3.
    """
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        text = answer(completion)
        structure = structure_of("\n".join(code_blocks(text, LANGUAGES)) if fenced else text)
        goal = None if expected is None else expected[row]
        if goal is not None:
            wanted = structure_of("\n".join(code_blocks(goal, LANGUAGES)) or goal)
            if wanted is None:
                raise UserError(f"row {row}: expected: this is not a Python program")
            scores.append(float(structure == wanted))
        else:
            scores.append(float(structure is not None))
    return scores


def structure_of(code: str) -> str | None:
    """Returns `ast.dump` of a program, or None where it holds no statement or Python cannot parse it."""
    if len(code) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's code
            tree = ast.parse(code)
        return ast.dump(tree) if tree.body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _ruff() -> str:
    beside = str(Path(sys.executable).parent)  # of an environment that is not activated
    found = shutil.which("ruff", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise UserError("ruff is not installed: pip install 'llmlab[rewards]' or pip install ruff")
    return found


def _is_clean(block: str, command: list[str]) -> bool:
    code = block.encode(errors="replace")
    try:
        done = subprocess.run(command, input=code, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == 2:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"ruff: {lines[-1].strip().removeprefix('Cause: ') if lines else 'failed'}")
    return done.returncode == 0
