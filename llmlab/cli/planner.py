"""Plans for the menu, made by a process of its own: the menu stays without torch, and its answers never wait.

What a plan is, and how it is made, is `llmlab/runs/plan.py`'s.
"""

import json
import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from llmlab.settings.errors import UserError, shorten
from llmlab.settings.files import Layer
from llmlab.stages import STAGES
from llmlab.terminal import duration, human

Values = dict[str, Any]


class Planner:
    """Asks one process for plans, the latest settings only, and keeps its answers."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.process: Any = None
        self.asked = ""

    def line(self, stage: str, values: Values) -> str | None:
        """Returns memory, fit and time of a run in one line, or None while they are planned."""
        key = json.dumps([stage, values], sort_keys=True)
        if self.process is None:
            context = get_context("spawn")  # a fork would share the terminal's state
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_answer, args=(other,), daemon=True)  # ends with the menu
            self.process.start()
            other.close()
        try:
            while self.pipe.poll():
                done, self.lines[done] = self.pipe.recv()
                self.asked = ""
            if key not in self.lines and not self.asked:
                self.asked = key
                self.pipe.send(key)
        except (EOFError, OSError):  # the process ended, most likely for lack of memory
            self.lines[self.asked or key] = "not known"
            self.stop()
        return self.lines.get(key)

    def stop(self) -> None:
        """Ends the process: a run needs the memory."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process, self.asked = None, ""


def _answer(pipe: Connection) -> None:
    """Answers requests until the menu closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the menu
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # what libraries say would be in the middle of a question
        os.dup2(null, descriptor)
    while True:
        try:
            key = pipe.recv()
        except EOFError:
            return
        pipe.send((key, describe_plan(*json.loads(key))))


def describe_plan(stage: str, values: Values) -> str:
    """Returns what a run of these settings takes on this machine, in one line."""
    from llmlab.hardware import probe
    from llmlab.runs.plan import make_plan

    try:
        settings = STAGES[stage].resolve([Layer("menu", values)], below=[]).settings
        plan = make_plan(STAGES[stage].function, settings, probe(settings.device, settings.dtype))
    except UserError as error:
        return f"not known: {shorten(str(error), 100)}"
    memory = f"{human(plan.total, 'B')} of {human(plan.memory, 'B')}" if plan.memory else human(plan.total, "B")
    time = f", about {duration(plan.seconds)}" if plan.seconds else ""
    return f"{memory}, {'fits' if plan.fits else 'DOES NOT FIT'}{time}; {human(plan.parameters)} parameters"
