"""A virtual file system: texts by path, in memory, bounded in size. It never touches the disk. Paths are relative to
its root, with or without a leading `/`; folders exist where files are in them."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from posixpath import normpath

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
