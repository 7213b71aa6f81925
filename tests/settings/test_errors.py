"""What libraries raise while reading a user's file becomes one sentence; what is printed never steers a terminal."""

import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.settings.errors import UserError, printable, reading
from llmlab.settings.files import read_json, write_atomically


@given(st.text(alphabet=st.characters()))
def test_printable_text_is_one_that_a_terminal_only_shows(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert all(letter in "\t\n" or (ord(letter) >= 32 and not 127 <= ord(letter) < 160) for letter in shown)


def test_printable_keeps_what_is_text_and_escapes_the_rest():
    assert printable("café 👩‍🚀\tπ\nend") == "café 👩‍🚀\tπ\nend"
    assert printable("\x1b]0;title\x07\x9b2J\u202e\ud800") == r"\x1b]0;title\x07\x9b2J\u202e\ud800"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (KeyError("model_type"), "KeyError: 'model_type'"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (MemoryError(), "it does not fit into memory"),
        (ValueError("first line.\nsecond line"), "first line"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_what_a_library_raises_becomes_one_sentence(error, reason):
    with pytest.raises(UserError) as caught, reading("a.json", "a configuration"):
        raise error
    assert str(caught.value) == f"a.json: cannot be read as a configuration: {reason}"


def test_an_interrupt_and_a_sentence_that_says_it_already_pass():
    with pytest.raises(KeyboardInterrupt), reading("a.json"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="^this file is empty$"), reading("a.json"):
        raise UserError("this file is empty")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b"\x00", b"9" * 5000])
def test_a_damaged_json_file_is_a_sentence_with_its_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_whole_json_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": [1]}))
    assert read_json(tmp_path / "a.json") == {"a": [1]}


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    """As `--save-config /dev/stdout`; and `-o /dev/null`, as root, must not take the device's place."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    heard = []
    reader = threading.Thread(target=lambda: heard.append(path.read_text()))
    reader.start()
    write_atomically(path, "text")
    reader.join()
    assert heard == ["text"] and path.is_fifo()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", "after")
    assert (tmp_path / "file").read_text() == "after" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_stop_signal_while_a_file_is_written_stays_one(tmp_path, monkeypatch, renamed):
    """Before and after the renaming; the file is whole, and nothing else is left."""
    (tmp_path / "file").write_text("before")
    replace = os.replace

    def stopped(temporary, path):
        if renamed:
            replace(temporary, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == ("after" if renamed else "before") and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written: Is a directory"):
        write_atomically(tmp_path, "text")
