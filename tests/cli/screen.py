"""A terminal of 80 x 24 for tests: a process in a pseudo-terminal, keys for it, and what it shows, read by pyte."""

import os
import pty
import select
import signal
import struct
import sys
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pyte

KEYS = {"enter": "\r", "escape": "\x1b", "down": "\x1b[B", "ctrl-c": "\x03", "ctrl-d": "\x04", "backspace": "\x7f"}
ROOT = Path(__file__).parents[2]


class Screen:
    """`python WORDS` in a folder, as somebody sees it."""

    def __init__(self, folder, *words, seconds=60):
        self.seconds = seconds
        self.screen = pyte.HistoryScreen(80, 24, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.environ |= {
                "PYTHONPATH": str(ROOT),
                "TERM": "xterm",
                "OMP_NUM_THREADS": "1",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            }
            os.execv(sys.executable, [sys.executable, *words])
        ioctl(self.terminal, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def read(self, seconds=0.05):
        """Takes in what the process writes; returns False at its end."""
        if select.select([self.terminal], [], [], seconds)[0]:
            try:
                data = os.read(self.terminal, 65536)
            except OSError:  # Linux, at the end
                data = b""
            self.stream.feed(data)
            return bool(data)
        return True

    @property
    def lines(self):
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self):
        """What is shown, lines that wrapped joined by a space."""
        return " ".join(" ".join(self.lines).split())

    def wait(self, *texts, times=1):
        """Reads until all texts are on the screen, so many times."""
        end = time.monotonic() + self.seconds
        while not all(self.text.count(text) >= times for text in texts):
            alive = self.read()
            assert alive and time.monotonic() < end, f"waited for {texts}, saw:\n" + "\n".join(self.lines)

    def type(self, *keys):
        for key in keys:
            os.write(self.terminal, KEYS.get(key, key).encode())

    def answer(self, text, *keys):
        """Waits for a question, then types."""
        self.wait(text)
        self.type(*keys)

    def end(self):
        """Reads until the process ends, and returns its exit code."""
        finish = time.monotonic() + self.seconds
        while self.read() and time.monotonic() < finish:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.terminal)
