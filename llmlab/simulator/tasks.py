"""Tasks of the simulator: a goal, the files at the beginning, the expected calls, and a test of the final state;
Python that a model wrote is only parsed. Generated ones are named `category/difficulty/split/seed`, such as
`search_and_edit/2/train/1234`; their wordings and layouts are in `tasks.yaml`, and a curriculum leads from the easiest
to the hardest. A task of one's own is a mapping, or JSON text, with the fields of `ToolTask`."""

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from random import Random
from threading import Lock
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from zlib import crc32

from annotated_types import Ge
from pydantic import BaseModel, ValidationError

from llmlab.settings.errors import UserError, did_you_mean, shorten
from llmlab.settings.files import read_table
from llmlab.simulator.commands import FileSystem, normalize, run

Choice = TypeVar("Choice")
SPLITS = ("train", "held_out")
HELD_OUT_IN = 8  # one in so many compound words is for the held-out split only
DIFFICULTIES = 4
WINDOW, RAISE, LOWER = 64, 0.8, 0.2  # episodes, and success rates over them that change the level
MAX_CHARACTERS = 100_000  # of code that is parsed
MAX_LINE = 100  # characters
_WARNINGS = Lock()  # `catch_warnings` changes the process


def parse_python(code: str, mode: str = "exec") -> Any:
    """Returns the syntax tree of a model's code, or None where Python cannot parse it."""
    if len(code) > MAX_CHARACTERS:
        return None
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's code
            return ast.parse(code, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def structure_of(code: str) -> str | None:
    """Returns `ast.dump` of a program, or None where it holds no statement or Python cannot parse it."""
    try:
        tree = parse_python(code)
        return ast.dump(tree) if tree is not None and tree.body else None
    except RecursionError:
        return None


def has_style(code: str) -> bool:
    """Whether code parses and keeps the style rules: spaces, none of them at the end of a line, no long lines."""
    tidy = all(len(line) <= MAX_LINE and line == line.rstrip() and "\t" not in line for line in code.split("\n"))
    return tidy and structure_of(code) is not None


class Call(NamedTuple):
    """A call of a tool."""

    tool: Literal["read_file", "write_file", "search_replace", "list_dir", "glob", "grep", "run_command", "submit"]
    arguments: dict[str, Any]


class Success(BaseModel, extra="forbid"):
    """Tests of the final state, all of which must hold; texts are compared without space at the ends of lines."""

    file_equals: dict[str, str] = {}
    file_contains: dict[str, str] = {}
    python_equals: dict[str, str] = {}  # in its structure: comments and blank space may differ
    answer_equals: str | None = None  # what is submitted

    def holds(self, texts: Mapping[str, str], answer: str | None) -> bool:
        """Whether the tests hold for these files and the answer, None where there is none yet."""

        def text(path: str) -> str:
            return texts.get(normalize(path), "")

        return (
            (self.answer_equals is None or (answer is not None and _plain(answer) == _plain(self.answer_equals)))
            and all(_plain(text(path)) == _plain(wanted) for path, wanted in self.file_equals.items())
            and all(wanted in text(path) for path, wanted in self.file_contains.items())
            and all(structure_of(text(path)) == structure_of(code) for path, code in self.python_equals.items())
        )


class ToolTask(BaseModel, extra="forbid"):
    """A task; calls that are `expected` count as correct, in any order, once each, and all others as wrong."""

    goal: str
    success: Success
    files: dict[str, str] = {}
    expected: tuple[Call, ...] = ()
    category: str = "own"
    difficulty: Annotated[int, Ge(1)] = 1


def read_task(task: str | Mapping[str, Any], difficulty: int | None = None) -> ToolTask:
    """Returns the task of an id, its difficulty perhaps another one, or of a mapping or JSON text."""
    if isinstance(task, str) and not task.lstrip().startswith("{"):
        return _generate_by_id(task, difficulty)
    try:
        values = json.loads(task) if isinstance(task, str) else task
        read = ToolTask.model_validate(_without_nulls(values))
        if wrong := [path for path, code in read.success.python_equals.items() if structure_of(code) is None]:
            raise ValueError(f"success.python_equals.{wrong[0]}: expected Python code")
        solved = read.success.holds(FileSystem(read.files).texts, None)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        near = did_you_mean(place, ToolTask.model_fields) if first["type"] == "extra_forbidden" else ""
        raise UserError(f"task: {place}: {first['msg']}{near}") from None
    except ValueError as error:
        raise UserError(f"task = {shorten(str(task))}: {error}") from None
    if solved:
        raise UserError(f"task = {shorten(read.goal)}: its success tests hold before the first call")
    return read


def generate_task(category: str, difficulty: int, split: str, seed: int) -> ToolTask:
    """Returns a generated task: the same for the same arguments, everywhere."""
    random = Random(f"{category}/{difficulty}/{split}/{seed}")
    templates = grammar()["categories"][category][difficulty]
    template = pick(random, [{**each, "goal": goal} for each in templates for goal in each[split]])
    values = _Slots(lambda slot: _draw(random, slot.rstrip("0123456789"), split, values))
    fill = partial(_fill, values=values)
    values |= dict.fromkeys(template.get("let", {}), "")  # they are known once the files are there
    fill([template.get(key) for key in ("goal", "files", "calls", "success", "let")])  # draws the others
    pair = [slot for slot in values if slot.startswith(("adjective", "noun"))] if "adjective" in values else []
    while not all(_is_of(split, [values["adjective"], values[slot]]) for slot in pair if slot != "adjective"):
        for slot in pair:
            values[slot] = values.draw(slot)
    files = fill(template.get("files", {}))
    for _ in range(template.get("noise", 0)):
        folder, name = (_draw(random, kind, split, {}) for kind in ("folder", "noise"))
        files[f"{folder}/{name}.txt"] = _draw(random, "lines", split, {})
    for slot, command in template.get("let", {}).items():
        values[slot] = run(fill(command), FileSystem(files)).removesuffix("\n")
    parts = fill({"goal": template["goal"], "success": template["success"], "expected": template["calls"]})
    return ToolTask(**parts, files=files, category=category, difficulty=difficulty)


@cache
def grammar() -> dict[str, Any]:
    """Returns what `tasks.yaml` holds: `words`, and of each of `categories` and difficulty the templates."""
    return read_table("llmlab.simulator", "tasks")


def _generate_by_id(task: str, difficulty: int | None) -> ToolTask:
    match = re.fullmatch(r"(\w+)/(\d+)/(\w+)/(\d+)", task[:100], re.ASCII)
    if match is None:
        raise UserError(f"task = {shorten(task)}: expected category/difficulty/split/seed such as tool_use/1/train/7")
    category, level, split, seed = match[1], difficulty or int(match[2]), match[3], int(match[4])
    categories = grammar()["categories"]
    levels = [str(each) for each in categories["tool_use"]]
    for word, known in ((category, [*categories]), (split, SPLITS), (repr(level), levels)):
        if word not in known:
            expected = f"expected one of {', '.join(known)}{did_you_mean(word, known)}"
            raise UserError(f"task = {shorten(task)}: {word}: {expected}")
    return generate_task(category, level, split, seed)


class _Slots(dict[str, Any]):
    """Values of slots, each drawn where a template first has it."""

    def __init__(self, draw: Callable[[str], Any]):
        self.draw = draw

    def __missing__(self, slot: str) -> Any:
        return self.setdefault(slot, self.draw(slot))


def _fill(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return value.format_map(values)
    if isinstance(value, dict):
        return dict(zip(_fill([*value], values), _fill([*value.values()], values), strict=True))
    return [_fill(part, values) for part in value] if isinstance(value, list) else value


def _draw(random: Random, kind: str, split: str, taken: Mapping[str, Any]) -> Any:
    """Returns a value of a kind of words, none of those that are taken."""
    words = grammar()["words"][kind]
    if isinstance(words, dict) and split in words:
        words = words[split]
    while True:
        if isinstance(words, list):
            value = pick(random, words)
        elif isinstance(words, dict):  # lines
            count = words["from"] + int(random.random() * (words["to"] + 1 - words["from"]))
            value = "".join(_compound(random, words["repeat"], split)[0] for _ in range(count))
        else:
            value, parts = _compound(random, words, split)
            if not _is_of(split, parts):
                continue
        if value not in taken.values():
            return value


def _is_of(split: str, words: list[str]) -> bool:
    """Whether words that stand together are the split's own."""
    return (crc32(" ".join(words).encode()) % HELD_OUT_IN == 0) is (split == "held_out")


def _compound(random: Random, pattern: str, split: str) -> tuple[str, list[str]]:
    """Returns a filled pattern and the words in it."""
    words = _Slots(lambda slot: _draw(random, slot, split, {}))
    return pattern.format_map(words), [*words.values()]


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    """Returns one of a few choices, as fair as `Random.choice` for short lists, and faster."""
    return choices[int(random.random() * len(choices))]


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


def _without_nulls(value: Any) -> Any:
    """Returns nested values without those that are None: a column of records has all their keys in every row."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


class Curriculum:
    """The difficulty of the next episodes: `episodes` rises evenly over the first half of a run of `total` episodes,
    `success` with the success rate of the last 64, and falls with it."""

    def __init__(self, kind: Literal["episodes", "success"], total: int):
        self.kind, self.total = kind, total
        self.seen = self.raised = 0
        self.recent: list[bool] = []

    @property
    def level(self) -> int:
        if self.kind == "success":
            return 1 + self.raised
        steps = 2 * (DIFFICULTIES - 1) * self.seen // max(self.total, 1)
        return 1 + min(steps, DIFFICULTIES - 1)

    def update(self, successes: list[bool]) -> None:
        """Adds episodes that were played at this level, over all processes."""
        self.seen += len(successes)
        self.recent = (self.recent + successes)[-WINDOW:]
        if len(self.recent) < WINDOW:
            return
        rate = sum(self.recent) / WINDOW
        change = int(rate >= RAISE) - int(rate <= LOWER)
        raised = min(max(self.raised + change, 0), DIFFICULTIES - 1)
        if raised != self.raised:
            self.raised, self.recent = raised, []

    def state(self) -> dict[str, object]:
        """Returns what a checkpoint keeps."""
        return {"seen": self.seen, "raised": self.raised, "recent": self.recent}

    def load_state(self, state: dict[str, object]) -> None:
        vars(self).update(state)
