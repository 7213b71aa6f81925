"""Commands, pipes and quoting on a virtual file system, compared with what the commands of a Unix system print."""

import time
from contextlib import suppress

import pytest

from llmlab.simulator.commands import MAX_FILES, MAX_TEXT, FileSystem, ToolError, normalize, run

TEXTS = {
    "a.txt": "pear\nfig\npear\napple 10\n",
    "b.txt": "apple 9\nplum",
    "src/app.py": "def main():\n    return 1\n",
    "src/lib/tool.py": "def tool():\n    return 2\n",
    "src/read.me": "Main\n",
}
EXPECTED = {
    "pwd": "/\n",
    "ls": "a.txt\nb.txt\nsrc\n",
    "ls -F src": "app.py\nlib/\nread.me\n",
    "ls -l b.txt": "12 b.txt\n",
    "cat b.txt a.txt": "apple 9\nplumpear\nfig\npear\napple 10\n",
    "cat -n b.txt": "1 apple 9\n2 plum\n",
    "cat *.txt | wc -l": "5\n",
    "head -n 2 a.txt": "pear\nfig\n",
    "head -1 a.txt": "pear\n",
    "head -c 3 a.txt": "pea",
    "tail -n 1 a.txt": "apple 10\n",
    "tail -n +3 a.txt": "pear\napple 10\n",
    "tail -c 3 a.txt": "10\n",
    "wc a.txt": "4 5 23 a.txt\n",
    "wc -l a.txt b.txt": "4 a.txt\n1 b.txt\n5 total\n",
    "cat a.txt | wc -w": "5\n",
    "sort a.txt": "apple 10\nfig\npear\npear\n",
    "sort -ru a.txt": "pear\nfig\napple 10\n",
    "grep apple a.txt b.txt | sort -k 2 -n": "b.txt:apple 9\na.txt:apple 10\n",
    "sort a.txt | uniq -c | sort -rn | head -n 1": "2 pear\n",
    "sort a.txt | uniq -d": "pear\n",
    "sort a.txt | uniq -u": "apple 10\nfig\n",
    "grep -c pear a.txt": "2\n",
    "grep -n 'apple [0-9]*' a.txt": "4:apple 10\n",
    "grep -v pear a.txt": "fig\napple 10\n",
    "grep -i MAIN src/app.py": "def main():\n",
    "grep -rl main src": "src/app.py\n",
    "grep -ow 'ma.n' src/app.py": "main\n",
    'grep -F "n()" src/app.py': "def main():\n",
    "grep -E 'fig|plum' a.txt | cat": "fig\n",
    "find src -name '*.py'": "src/app.py\nsrc/lib/tool.py\n",
    "find . -type d": "src\nsrc/lib\n",
    "find src -type d": "src\nsrc/lib\n",
    "find src/lib": "src/lib\nsrc/lib/tool.py\n",
    "echo 'a  b' \"c | d\" e\\ f": "a  b c | d e f\n",
    "echo -n x": "x",
    "echo *.txt": "a.txt b.txt\n",
    "echo '*.txt' none*": "*.txt none*\n",
}


@pytest.mark.parametrize("command", EXPECTED)
def test_output(command):
    assert run(command, FileSystem(TEXTS)) == EXPECTED[command]


def test_redirections_write_files():
    files = FileSystem(TEXTS)
    assert run("sort a.txt > out/sorted.txt", files) == "" == run("echo more >> out/sorted.txt", files)
    assert files.read("/out/sorted.txt") == "apple 10\nfig\npear\npear\nmore\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sed s/a/b/ a.txt", "not supported: sed; there is ls, cat"),
        ("cat a.txt; ls", "not supported: ;"),
        ("cat a.txt && ls", "not supported: &&"),
        ("cat < a.txt", "not supported: <"),
        ("echo $(ls)", "not supported"),
        ("echo `ls`", "not supported"),
        ("echo $HOME", "not supported"),
        ("ls -Z", "not supported: ls -Z"),
        ("sort --parallel 2 a.txt", "not supported: sort --"),
        ("find . -delete", "not supported: find: expected"),
        ("cat nothing", "nothing: no such file"),
        ("cat src", "src: is a folder"),
        ("cat", "cat: which file"),
        ("grep", "wrong options"),
        ("head -n x a.txt", "wrong options"),
        ("grep '(' a.txt", "not a regular expression"),
        ("echo 'a", "a quote is not closed"),
        ("ls |", "incomplete"),
        ("ls >", "incomplete"),
        ("", "incomplete"),
        ("cat ../x", "outside of the file system"),
        ("echo x > a.txt/b", "a part of it is a file"),
        ("echo x > src", "is a folder"),
    ],
)
def test_what_does_not_work_is_said(command, words):
    files = FileSystem(TEXTS)
    with pytest.raises(ToolError, match=words.replace("(", r"\(").replace("$", r"\$")):
        run(command, files)
    assert files.texts == TEXTS


@pytest.mark.parametrize(
    "command",
    ["grep '(a|aa)+$' c.txt", "grep 'x{99999999}' c.txt", "grep '((a{99}){99}){99}' c.txt", "grep '(?R)|a' c.txt",
     "cat " + "c.txt " * 150, "echo " + "* " * 400, "echo " + "x" * 5000, "grep '" + "(" * 190 + ")" * 190 + "' c.txt",
     "echo " + "**/" * 60 + "x", "find . -name '" + "*a" * 90 + "b'"],
)  # fmt: skip
def test_commands_are_bounded(command):
    files = FileSystem({"c.txt": "a" * 5000 + "b\n", **{"d/" * n + "e": "" for n in range(1, 99)}, "e/f": ""})
    begin = time.perf_counter()
    with suppress(ToolError):
        assert len(run(command, files)) <= MAX_TEXT
    assert time.perf_counter() - begin < 2


def test_paths():
    assert [normalize(path) for path in ("/", ".", "a//b/./c/", "/a/../b")] == ["", "", "a/b/c", "b"]
    for path in ("..", "a/../../b", "x" * 201, "a\0b"):
        with pytest.raises(ToolError):
            normalize(path)


def test_globs_and_folders():
    files = FileSystem(TEXTS)
    assert files.glob("*.txt") == files.glob("/*.txt") == ["a.txt", "b.txt"]
    assert files.glob("**/*.py") == files.glob("src/**/*.py") == ["src/app.py", "src/lib/tool.py"]
    assert files.glob("src/*.py") == ["src/app.py"] and files.glob("src/**") == files.under("src")
    assert files.entries("/") == ["a.txt", "b.txt", "src/"] and files.entries("src") == ["app.py", "lib/", "read.me"]
    with pytest.raises(ToolError, match="is a file"):
        files.entries("a.txt")


def test_sizes_are_bounded():
    files = FileSystem({f"{n}": "" for n in range(MAX_FILES)})
    for path, text in (("0", "x" * (MAX_TEXT + 1)), ("another", "")):
        with pytest.raises(ToolError, match="no space left"):
            files.write(path, text)
