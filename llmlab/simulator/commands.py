"""A virtual file system (texts by path, in memory, bounded) and shell commands on it: a few, their common options,
pipes and redirections. No shell, process or disk is involved, and what is not here is answered with "not
supported"."""

import math
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from posixpath import normpath
from time import monotonic
from typing import Any

import regex

MAX_COMMAND = 1_000  # characters
MAX_WORDS = 200  # of one command, after patterns of files became their names
MAX_PATTERN, MAX_REPEATS = 200, 1_000  # characters; product of a pattern's counts, which take memory
SEARCH_SECONDS = 0.25
_TOKEN = re.compile(r"""\s*(\|\||&&|>>|[|<>&;()]|(?:[^\s|<>&;()"'\\]|\\.|"(?:\\.|[^"\\])*"|'[^']*')+)""", re.DOTALL)
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
MAX_TEXT = 20_000  # characters of a file or an argument
MAX_FILES = 200
MAX_PATH = 200  # characters


class ToolError(ValueError):
    """What a tool answers instead of a result."""


def normalize(path: str) -> str:
    """Returns a path relative to the root, which itself is empty; refuses one that leads out of it."""
    if len(path) > MAX_PATH or "\0" in path:
        raise ToolError(f"{path[:40]!r}: not a path")
    name = normpath(f"./{path}")
    if f"{name}/".startswith("../"):
        raise ToolError(f"{path}: outside of the file system")
    return "" if name == "." else name


class FileSystem:
    """Files of one world."""

    def __init__(self, texts: Mapping[str, str]):
        self.texts: dict[str, str] = {}
        for path, text in texts.items():
            self.write(path, text)

    def is_folder(self, path: str) -> bool:
        return not path or any(name.startswith(f"{path}/") for name in self.texts)

    def read(self, path: str) -> str:
        """Returns the text of a file."""
        name = normalize(path)
        if name not in self.texts:
            raise ToolError(f"{path}: is a folder" if self.is_folder(name) else f"{path}: no such file")
        return self.texts[name]

    def write(self, path: str, text: str) -> None:
        """Makes a file, or replaces its text."""
        name = normalize(path)
        if self.is_folder(name):
            raise ToolError(f"{path}: is a folder")
        if any(name.startswith(f"{other}/") for other in self.texts):
            raise ToolError(f"{path}: a part of it is a file")
        if len(text) > MAX_TEXT or (name not in self.texts and len(self.texts) >= MAX_FILES):
            raise ToolError(f"{path}: no space left: at most {MAX_FILES} files of {MAX_TEXT:,} characters")
        self.texts[name] = text

    def under(self, path: str) -> list[str]:
        """Returns the sorted paths of the files in a folder and its folders, or the file itself."""
        name = normalize(path)
        if name in self.texts:
            return [name]
        if not self.is_folder(name):
            raise ToolError(f"{path}: no such file or folder")
        return sorted(other for other in self.texts if not name or other.startswith(f"{name}/"))

    def entries(self, path: str) -> list[str]:
        """Returns the sorted names in a folder, those of folders with a `/` at the end."""
        name = normalize(path)
        if name in self.texts:
            raise ToolError(f"{path}: is a file")
        rests = (other[len(name) :].lstrip("/") for other in self.under(path))
        return sorted({first + slash for first, slash, _ in (rest.partition("/") for rest in rests)})

    def glob(self, pattern: str) -> list[str]:
        """Returns the sorted paths that a pattern matches: `*` and `?` within a name, `**` through folders."""
        names = tuple(normalize(pattern).split("/"))
        return [path for path in sorted(self.texts) if _matches(tuple(path.split("/")), names)]


@lru_cache(maxsize=10_000)  # without it the time would be exponential in the number of `**`
def _matches(parts: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a pattern."""
    if names and names[0] == "**":
        return _matches(parts, names[1:]) or (bool(parts) and _matches(parts[1:], names))
    if not names or not parts:
        return not names and not parts
    return fnmatchcase(parts[0], names[0]) and _matches(parts[1:], names[1:])


Options = dict[str, str]
Inputs = list[tuple[str, str]]
"""The name and text of each file that a command reads, or the output of the command before, without a name."""


def run(command: str, files: FileSystem) -> str:
    """Returns what a command prints; raises ToolError for one that fails, or that is not supported."""
    if len(command) > MAX_COMMAND:
        raise ToolError(f"not supported: a command of over {MAX_COMMAND} characters")
    stages, target, append = _parse(command.strip(), files)
    output: str | None = None
    for name, *words in stages:
        output = _run_stage(name, words, output, files)
        if len(output) > MAX_TEXT:
            raise ToolError(f"{name}: over {MAX_TEXT:,} characters of output")
    if target is None:
        return output or ""
    files.write(target, (files.texts.get(normalize(target), "") if append else "") + (output or ""))
    return ""


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
        with suppress(TimeoutError):
            if (rest := end - monotonic()) > 0:
                return compiled.search(line, timeout=rest)
        raise ToolError("this pattern takes too long")

    return search


def lines_of(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def unquote(command: str, files: FileSystem) -> list[str]:
    """Returns lines `command=` for the commands in any command line, and `path=` for what its patterns match."""
    lines, paths = ["command="], set[str]()
    for token in _TOKEN.finditer(command[:MAX_COMMAND].replace("\n", ";")):
        word = token[1] if token[1][0] in "|<>&;()" else "".join(shlex.split(token[1]))
        lines[-1] += f"{word} "
        lines += ["command="] if token[1][0] in "|&;()" else []
        with suppress(ToolError):
            paths.update(files.glob(word) if re.search(r"[*?\[]", word) else ())
    return [line.rstrip() for line in lines] + [f"path={path}" for path in sorted(paths)]


def _parse(command: str, files: FileSystem) -> tuple[list[list[str]], str | None, bool]:
    """Returns the words of each command of a pipe, and the file that its output goes to, appended or not."""
    stages: list[list[str]] = [[]]
    target, redirect, start = None, "", 0
    while start < len(command):
        token = _TOKEN.match(command, start)
        if token is None:
            raise ToolError("a quote is not closed")
        start, word = token.end(), token[1]
        if redirect and target is None and word[0] not in "|<>&;()":
            target = "".join(shlex.split(word))
        elif word == "|" and stages[-1] and not redirect:
            stages.append([])
        elif word in (">", ">>") and stages[-1] and not redirect:
            redirect = word
        elif word[0] in "|<>&;()" or redirect or re.search(r"^[^']*[$`]", word):
            raise ToolError(f"not supported: {word}")
        else:
            plain = "".join(shlex.split(word))
            matches = files.glob(plain) if re.search(r"[*?\[]", word) and not re.search(r"[\"'\\]", word) else []
            stages[-1] += matches or [plain]
    if not stages[-1] or bool(redirect) is (target is None):
        raise ToolError("a command is incomplete")
    return stages, target, redirect == ">>"


def _run_stage(name: str, words: list[str], piped: str | None, files: FileSystem) -> str:
    """Returns the output of one command, whose input is the output of the one before, if there is one."""
    if name not in COMMANDS or len(words) > MAX_WORDS:
        raise ToolError(f"not supported: {name}; there is {', '.join(COMMANDS)}, each with {MAX_WORDS} words at most")
    function, letters = COMMANDS[name]
    if name in ("head", "tail"):
        words = [re.sub(r"^-(?=\d+$)", "-n", word) for word in words]
    try:
        options, words = _split_options(name, words, letters) if name != "find" else ({}, words)
        if name in ("ls", "find", "echo", "pwd"):
            return function(options, words, files)
        pattern = [words.pop(0)] if name == "grep" else []
        if "r" in options and name == "grep":
            words = [path for word in words or ["."] for path in files.under(word)]
        if words in ([], ["-"]) and piped is None:
            raise ToolError(f"{name}: which file?")
        inputs = [("", piped or "")] if words in ([], ["-"]) else [(word, files.read(word)) for word in words]
        return function(options, inputs, *pattern)
    except (ValueError, IndexError) as error:  # of numbers, and of a pattern that is missing
        raise error if isinstance(error, ToolError) else ToolError(f"{name}: wrong options") from None


def _split_options(name: str, words: list[str], letters: str) -> tuple[Options, list[str]]:
    """Returns the options among words, and the other words; `getopt` would read translations of its errors."""
    options, others, rest = {}, [], iter(words)
    for word in rest:
        if len(word) < 2 or word[0] != "-":
            others.append(word)
            continue
        cluster = word[1:]
        while cluster:
            letter, cluster = cluster[0], cluster[1:]
            if letter not in letters.replace(":", ""):
                raise ToolError(f"not supported: {name} -{letter}")
            options[letter] = ""
            if f"{letter}:" in letters:
                options[letter], cluster = cluster or next(rest, ""), ""
    return options, others


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _lines(inputs: Inputs) -> list[str]:
    return [line for _, text in inputs for line in lines_of(text)]


def _ls(options: Options, words: list[str], files: FileSystem) -> str:
    lines = []
    for word in words or ["."]:
        folder = normalize(word)
        names = [word] if folder in files.texts else files.entries(word)
        lines += [f"{word}:"] if len(words) > 1 and folder not in files.texts else []
        for name in names:
            size = len(files.texts.get(normalize(name if name == word else f"{folder}/{name}"), ""))
            shown = name if options.keys() & {"F", "p"} else name.rstrip("/")
            lines.append(f"{size} {shown}" if "l" in options else shown)
    return _text(lines)


def _cat(options: Options, inputs: Inputs) -> str:
    numbered = [f"{number} {line}" for number, line in enumerate(_lines(inputs), 1)]
    return _text(numbered) if "n" in options else "".join(text for _, text in inputs)


def _head(options: Options, inputs: Inputs) -> str:
    if "c" in options:
        return _cat({}, inputs)[: int(options["c"][:9])]
    return _text(_lines(inputs)[: int(options.get("n", "10")[:9])])


def _tail(options: Options, inputs: Inputs) -> str:
    number = options.get("c", options.get("n", "10"))[:9]
    count = int(number)
    items: Any = _cat({}, inputs) if "c" in options else _lines(inputs)
    rest = items[max(count - 1, 0) :] if number[0] == "+" else items[max(len(items) - abs(count), 0) :]
    return rest if "c" in options else _text(rest)


def _wc(options: Options, inputs: Inputs) -> str:
    rows = [(name, text.count("\n"), len(text.split()), len(text.encode())) for name, text in inputs]
    rows += [("total", *(sum(row[i] for row in rows) for i in (1, 2, 3)))] if len(rows) > 1 else []
    shown = [number for number, letter in enumerate("lwc", 1) if letter in options or not options]
    return _text([" ".join([*(str(row[number]) for number in shown), row[0]]).strip() for row in rows])


def _sort(options: Options, inputs: Inputs) -> str:
    field = int(options.get("k", "0")[:3])

    def key(line: str) -> Any:
        value = " ".join(line.split()[field - 1 :]) if field > 0 else line
        number = re.match(r"\s*-?\d{1,300}(?:\.\d+)?", value) if "n" in options else None
        return float(number[0]) if number else 0.0, value, line

    lines = _lines(inputs)
    return _text(sorted(set(lines) if "u" in options else lines, key=key, reverse="r" in options))


def _uniq(options: Options, inputs: Inputs) -> str:
    groups = [(line, len([*same])) for line, same in groupby(_lines(inputs))]
    kept = [(line, n) for line, n in groups if not ("d" in options and n == 1) and not ("u" in options and n > 1)]
    return _text([f"{n} {line}" if "c" in options else line for line, n in kept])


def _grep(options: Options, inputs: Inputs, pattern: str) -> str:
    pattern = re.escape(pattern) if "F" in options else pattern
    search = searcher(rf"\b(?:{pattern})\b" if "w" in options else pattern, regex.IGNORECASE if "i" in options else 0)
    lines = []
    for name, text in inputs:
        matches = [(n, line, search(line)) for n, line in enumerate(lines_of(text), 1)]
        matches = [(n, line, match) for n, line, match in matches if (match is None) is ("v" in options)]
        label = f"{name}:" if ("r" in options or len(inputs) > 1) and "h" not in options else ""
        if "l" in options:
            lines += [name] if matches else []
        elif "c" in options:
            lines.append(f"{label}{len(matches)}")
        else:
            shown = ((n, match[0] if "o" in options and match else line) for n, line, match in matches)
            lines += [f"{label}{f'{n}:' if 'n' in options else ''}{line}" for n, line in shown]
    return _text(lines)


def _find(options: Options, words: list[str], files: FileSystem) -> str:
    start = words.pop(0) if words and not words[0].startswith("-") else "."
    tests = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or tests.keys() - {"-name", "-type"} or tests.get("-type", "f") not in ("f", "d"):
        raise ToolError("not supported: find: expected FOLDER -name PATTERN -type f|d")
    folder, paths = normalize(start), files.under(start)
    parents = {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
    folders = {path for path in parents if not folder or f"{path}/".startswith(f"{folder}/")}
    chosen = {"f": {*paths}, "d": folders}.get(tests.get("-type", ""), folders.union(paths))
    return _text(sorted(path for path in chosen if fnmatchcase(path.rsplit("/", 1)[-1], tests.get("-name", "*"))))


COMMANDS: dict[str, tuple[Callable[..., str], str]] = {
    "ls": (_ls, "1alFp"),
    "cat": (_cat, "n"),
    "head": (_head, "n:c:"),
    "tail": (_tail, "n:c:"),
    "wc": (_wc, "lwc"),
    "sort": (_sort, "rnuk:"),
    "uniq": (_uniq, "cdu"),
    "grep": (_grep, "ivnclrwhoEF"),
    "find": (_find, ""),
    "echo": (lambda options, words, files: " ".join(words) + ("" if "n" in options else "\n"), "n"),
    "pwd": (lambda options, words, files: "/\n", ""),
}
"""The function of each command, and the letters of its options as getopt reads them; those of `find` are its own."""
