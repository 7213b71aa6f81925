"""Shell commands on a virtual file system: a few, their common options, pipes and redirections, all in memory.

No shell, process or disk is involved, and what is not here is answered with "not supported".
"""

import math
import re
import shlex
from collections.abc import Callable
from fnmatch import fnmatchcase
from getopt import GetoptError, gnu_getopt
from time import monotonic
from typing import Any

import regex

from llmlab.simulator.files import MAX_TEXT, FileSystem, ToolError, normalize

MAX_COMMAND = 1_000  # characters
MAX_WORDS = 200  # of one command, after patterns of files became their names
MAX_PATTERN, MAX_REPEATS = 200, 1_000  # characters; product of a pattern's counts, which take memory
SEARCH_SECONDS = 0.25
_TOKEN = re.compile(r"""\s*(\|\||&&|>>|[|<>&;()]|(?:[^\s|<>&;()"'\\]|\\.|"(?:\\.|[^"\\])*"|'[^']*')+)""", re.DOTALL)
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")

Options = dict[str, str]
Lines = list[str]


def run(command: str, files: FileSystem) -> str:
    """Returns what a command prints; raises ToolError for one that fails, or that is not supported."""
    if len(command) > MAX_COMMAND:
        raise ToolError(f"not supported: a command of over {MAX_COMMAND} characters")
    stages, target, append = _parse(command, files)
    output: str | None = None
    for name, *words in stages:
        output = _run_stage(name, words, output, files)
        if len(output) > MAX_TEXT:
            raise ToolError(f"{name}: over {MAX_TEXT:,} characters of output")
    if target is None:
        return output or ""
    known = files.texts.get(normalize(target), "") if append else ""
    files.write(target, known + (output or ""))
    return ""


def _parse(command: str, files: FileSystem) -> tuple[list[list[str]], str | None, bool]:
    """Returns the words of each command of a pipe, and the file that its output goes to, appended or not."""
    stages: list[list[str]] = [[]]
    target, append, start, redirect = None, False, 0, ""
    command = command.strip()
    while start < len(command):
        token = _TOKEN.match(command, start)
        if token is None:
            raise ToolError("a quote is not closed")
        start, word = token.end(), token[1]
        if redirect:
            (target,), redirect = shlex.split(word) or [""], ""
        elif word == "|" and stages[-1] and target is None:
            stages.append([])
        elif word in (">", ">>") and stages[-1] and target is None:
            redirect, append = word, word == ">>"
        elif word[0] in "|<>&;()" or target is not None or re.search(r"^[^']*(?:\$|`)", word):
            raise ToolError(f"not supported: {word}")
        else:
            bare = "".join(shlex.split(word))
            found = files.glob(bare) if re.search(r"[*?\[]", word) and not re.search(r"[\"'\\]", word) else []
            stages[-1] += found or [bare]
            if len(stages[-1]) > MAX_WORDS:
                raise ToolError(f"not supported: over {MAX_WORDS} words")
    if redirect or not stages[-1]:
        raise ToolError("a command is incomplete")
    return stages, target, append


def _run_stage(name: str, words: list[str], given: str | None, files: FileSystem) -> str:
    """Returns the output of one command, whose input is the output of the one before, if there is one."""
    if name not in COMMANDS:
        raise ToolError(f"not supported: {name}; there is {' '.join(COMMANDS)}")
    function, letters, reads = COMMANDS[name]
    if name == "find":
        return _text(_find(words, files))
    words = [f"-n{word[1:]}" if name in ("head", "tail") and re.fullmatch(r"-\d+", word) else word for word in words]
    try:
        pairs, words = gnu_getopt(words, letters)
    except GetoptError as error:
        raise ToolError(f"not supported: {name}: {error}") from None
    options = {option[1:]: value for option, value in pairs}
    pattern = [words.pop(0)] if name == "grep" and words else []
    if not reads:
        return function(options, words, files)
    if name == "grep" and "r" in options and words != ["-"]:
        words = [path for word in words or ["."] for path in files.under(word)]
    if not words and given is None:
        raise ToolError(f"{name}: which file?")
    inputs = [("", given or "")] if not words or words == ["-"] else [(word, files.read(word)) for word in words]
    return function(options, *pattern, inputs)


def _lines(inputs: list[tuple[str, str]]) -> Lines:
    return [line for _, text in inputs for line in split(text)]


def split(text: str) -> Lines:
    """Returns the lines of a text."""
    return text.removesuffix("\n").split("\n") if text else []


def _text(lines: Lines) -> str:
    return "".join(f"{line}\n" for line in lines)


def _pwd(options: Options, words: Lines, files: FileSystem) -> str:
    return "/\n"


def _echo(options: Options, words: Lines, files: FileSystem) -> str:
    return " ".join(words) + ("" if "n" in options else "\n")


def _ls(options: Options, words: Lines, files: FileSystem) -> str:
    lines = []
    for word in words or ["."]:
        name = normalize(word)
        found = [word] if name in files.texts else files.entries(word)
        lines += [f"{word}:"] if len(words) > 1 and name not in files.texts else []
        for entry in found:
            path = name if name in files.texts else normalize(f"{name}/{entry}")
            shown = entry if {"F", "p"} & options.keys() else entry.rstrip("/")
            lines.append(f"{len(files.texts.get(path, ''))} {shown}" if "l" in options else shown)
    return _text(lines)


def _cat(options: Options, inputs: list[tuple[str, str]]) -> str:
    if "n" in options:
        return _text([f"{number} {line}" for number, line in enumerate(_lines(inputs), 1)])
    return "".join(text for _, text in inputs)


def _number(options: Options, letter: str) -> int:
    value = options[letter]
    if not re.fullmatch(r"[-+]?\d{1,6}", value):
        raise ToolError(f"-{letter} {value}: expected a number")
    return int(value)


def _head(options: Options, inputs: list[tuple[str, str]]) -> str:
    if "c" in options:
        return "".join(text for _, text in inputs)[: _number(options, "c")]
    return _text(_lines(inputs)[: _number({"n": "10", **options}, "n")])


def _tail(options: Options, inputs: list[tuple[str, str]]) -> str:
    value = {"n": "10", **options}
    letter = "c" if "c" in options else "n"
    number = _number(value, letter)
    items: Any = "".join(text for _, text in inputs) if letter == "c" else _lines(inputs)
    rest = items[max(number - 1, 0) :] if value[letter][0] == "+" else items[max(len(items) - abs(number), 0) :]
    return rest if letter == "c" else _text(rest)


def _wc(options: Options, inputs: list[tuple[str, str]]) -> str:
    rows = [(text.count("\n"), len(text.split()), len(text.encode())) for _, text in inputs]
    names = [name for name, _ in inputs]
    if len(rows) > 1:
        rows.append(tuple(map(sum, zip(*rows, strict=True))))  # type: ignore[arg-type]
        names.append("total")
    shown = [place for place, letter in enumerate("lwc") if letter in options or not options]
    return _text(
        [" ".join([*(str(row[i]) for i in shown), name]).strip() for row, name in zip(rows, names, strict=True)]
    )


def _sort(options: Options, inputs: list[tuple[str, str]]) -> str:
    field = _number(options, "k") if "k" in options else 0

    def key(line: str) -> Any:
        value = " ".join(line.split(options.get("t") or None)[field - 1 :]) if field > 0 else line
        number = re.match(r"\s*-?\d{1,300}(?:\.\d+)?", value) if "n" in options else None
        return (float(number[0]) if number else 0.0, line) if "n" in options else (value, line)

    lines = sorted(set(_lines(inputs)) if "u" in options else _lines(inputs), key=key, reverse="r" in options)
    return _text(lines)


def _uniq(options: Options, inputs: list[tuple[str, str]]) -> str:
    groups: list[list[Any]] = []
    for line in _lines(inputs):
        if groups and groups[-1][1] == line:
            groups[-1][0] += 1
        else:
            groups.append([1, line])
    chosen = [
        (count, line)
        for count, line in groups
        if not ("d" in options and count == 1) and not ("u" in options and count > 1)
    ]
    return _text([f"{count} {line}" if "c" in options else line for count, line in chosen])


def searcher(pattern: str, flags: int = 0) -> Callable[[str], Any]:
    """Returns a search that raises ToolError once it took too long, over all its calls together."""
    counts = (max(int(number or 1) for number in pair) for pair in _COUNT.findall(pattern[:MAX_PATTERN]))
    if len(pattern) > MAX_PATTERN or math.prod(max(count, 1) for count in counts) > MAX_REPEATS:
        raise ToolError("not supported: a pattern this large")
    try:
        compiled = regex.compile(pattern, flags)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ToolError(f"not a regular expression: {error}") from None
    end = monotonic() + SEARCH_SECONDS

    def search(line: str) -> Any:
        try:
            return compiled.search(line, timeout=max(end - monotonic(), 1e-3))
        except TimeoutError:
            raise ToolError("this pattern takes too long") from None

    return search


def _grep(options: Options, *rest: Any) -> str:
    if len(rest) < 2:
        raise ToolError("grep: which pattern?")
    pattern, inputs = rest
    pattern = re.escape(pattern) if "F" in options else pattern
    pattern = rf"\b(?:{pattern})\b" if "w" in options else pattern
    search = searcher(pattern, regex.IGNORECASE if "i" in options else 0)
    lines = []
    for name, text in inputs:
        found = [(n, line, search(line)) for n, line in enumerate(split(text), 1)]
        found = [(n, line, match) for n, line, match in found if (match is None) is ("v" in options)]
        label = f"{name}:" if ("r" in options or "H" in options or len(inputs) > 1) and "h" not in options else ""
        if "l" in options:
            lines += [name] if found else []
        elif "c" in options:
            lines.append(f"{label}{len(found)}")
        else:
            shown = ((n, match[0] if "o" in options and match else line) for n, line, match in found)
            lines += [f"{label}{f'{n}:' if 'n' in options else ''}{line}" for n, line in shown]
    return _text(lines)


def _find(words: list[str], files: FileSystem) -> Lines:
    starts = []
    while words and not words[0].startswith("-"):
        starts.append(words.pop(0))
    tests = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or tests.keys() - {"-name", "-iname", "-type"} or tests.get("-type", "f") not in ("f", "d"):
        raise ToolError("not supported: find: expected FOLDER -name PATTERN -type f|d")
    found = []
    for start in starts or ["."]:
        paths = files.under(start)
        folders = {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
        kind = tests.get("-type")
        inside = [
            path for path in folders if normalize(start) in ("", path) or path.startswith(normalize(start) + "/")
        ]
        found += [*(paths if kind != "d" else []), *(inside if kind != "f" else [])]
    for option, fold in (("-name", str), ("-iname", str.lower)):
        if option in tests:
            found = [path for path in found if fnmatchcase(fold(path.rsplit("/", 1)[-1]), fold(tests[option]))]
    return sorted(set(found))


COMMANDS: dict[str, tuple[Callable[..., str], str, bool]] = {
    "ls": (_ls, "1alFp", False),
    "cat": (_cat, "n", True),
    "head": (_head, "n:c:", True),
    "tail": (_tail, "n:c:", True),
    "wc": (_wc, "lwc", True),
    "sort": (_sort, "rnuk:t:", True),
    "uniq": (_uniq, "cdu", True),
    "grep": (_grep, "ivnclrwhHoEF", True),
    "find": (lambda: "", "", False),
    "echo": (_echo, "n", False),
    "pwd": (_pwd, "", False),
}
"""Of each command its function, the letters of its options as getopt reads them, and whether it reads inputs."""
