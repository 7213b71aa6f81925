"""Questions about a stage's settings, generated from their types, choices, bounds, conditions and help. An answer is a
layer over files, which the settings validate while it is typed. Which settings are asked, and in which order, is in
`menu.yaml`; what happens with the answers is in `menu.py`."""

import json
import os
import re
import shutil
import signal
import textwrap
import threading
import typing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import questionary
from prompt_toolkit.filters import is_done
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.layout import ConditionalContainer, FormattedTextControl, HSplit, Layout, Window
from questionary import Choice

from llmlab.cli.options import parse_value
from llmlab.runs.history import RunFolder, find_runs
from llmlab.settings.base import Setting, When, fields_of, show
from llmlab.settings.errors import UserError, printable, reason_of
from llmlab.settings.files import Layer, read_layer, read_table
from llmlab.settings.paths import MODEL_FILES, Reads
from llmlab.settings.presets import for_stage
from llmlab.settings.sources import NONE_WORDS, Resolved
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, duration, human, safe

TABLES = read_table("llmlab.cli", "menu")
for names in TABLES["first"].values():
    names[:] = [each for name in names for each in (name, *TABLES["after"].get(name, ()))]
DEEPEST = 4  # folders below this one in which runs are looked for: it may be a home folder
PLACE = re.compile("^(answer|defaults): ")
FILES = {"adapter": ("adapter_config.json",), "tokenizer_name": ("tokenizer.json",)}  # in the runs to choose from
KEPT, TYPED = "\tkept", "\ttyped"  # choices that are no values
Status = Callable[[str], tuple[str, str]]
"""Returns the style and text of the line below a question, for the text that is typed."""


class Back(Exception):
    """Esc: one question back."""


def ask(question: questionary.Question, status: Status | None = None, *, typed: bool = False) -> Any:
    """Asks one question; Esc raises Back, Ctrl+D EOFError, Ctrl+C KeyboardInterrupt. Where a text is `typed`, Enter is
    refused while `status` says something in style error."""
    app, keys = question.application, KeyBindings()
    line = status or (lambda text: ("", ""))
    keys.add("escape", eager=True)(lambda event: event.app.exit(exception=Back()))
    keys.add("c-d", eager=True)(lambda event: event.app.exit(exception=EOFError()))

    def accept(event: KeyPressEvent) -> None:
        style, text = line(event.current_buffer.text)
        if style != "error" or not text:
            event.current_buffer.validate_and_handle()

    def below() -> list[tuple[str, str]]:
        style, text = line(app.current_buffer.text)
        width = shutil.get_terminal_size().columns - 1
        return [("fg:ansired" if style else "fg:ansicyan", textwrap.fill(printable(text), width))]

    if typed:
        keys.add("enter", eager=True)(accept)
    app.key_bindings = merge_key_bindings([*([app.key_bindings] if app.key_bindings else []), keys])
    lowest = ConditionalContainer(Window(FormattedTextControl(below), dont_extend_height=True), filter=~is_done)
    app.layout = Layout(HSplit([app.layout.container, lowest]), focused_element=app.layout.current_window)
    app.refresh_interval, app.ttimeoutlen = 0.5, 0.05
    return question.unsafe_ask()


def choose(message: str, choices: Sequence[Choice], *status: Any, **options: Any) -> Any:
    """Asks for one of the choices."""
    return ask(questionary.select(message, choices, use_jk_keys=False, **options), *status)


def has_model(run: RunFolder, files: Sequence[str] = MODEL_FILES, *, scores: bool = False) -> bool:
    """Whether a run has one of these files; of reward models, and only of them, where it `scores`."""
    return (run.stage == "reward") == scores and any((run.folder / file).is_file() for file in files)


def choose_run(
    message: str, fits: Callable[[RunFolder], bool], extra: Sequence[Choice] = (), *status: Any, **options: Any
) -> str:
    """Asks for a run here that fits, the latest first, or for a name; `extra` are further choices."""
    choices = []
    for run in filter(fits, reversed(find_runs(Path(), deepest=DEEPEST))):
        result = f", {run.key_metric[0]} {run.key_metric[1]:.4g}" if run.key_metric else ""
        choices.append(Choice(printable(f"{run.folder}  ({run.stage}, {run.status}{result})"), str(run.folder)))
    if not choices:
        return TYPED
    return choose(message, [*choices, *extra, Choice("another: type a folder or hub id", TYPED)], *status, **options)


class Form:
    """A stage's settings while they are asked: files (also of presets), and over them the answers, in their order."""

    def __init__(self, stage: str, files: Sequence[str] = (), answers: Iterable[Sequence[Any]] = ()):
        self.stage, self.files = STAGES[stage], list(files)
        self.settings = fields_of(self.stage.settings_class)
        self.layers = [for_stage(read_layer(path), stage) for path in files]
        self.answers = [*map(tuple, answers)]
        self.resolved: Resolved[Any] | None = None
        self.problems: list[str] = []
        self.update()

    def find(self, name: str) -> Setting:
        """Returns the setting of this name or key."""
        return next(setting for setting in self.settings if name in (setting.key, setting.name))

    def update(self) -> None:
        """Resolves the answers; where they contradict each other, the last settings that were valid stay."""
        resolved, self.problems = self._resolve()
        self.resolved = resolved or self.resolved

    def _resolve(self, *more: tuple[str, Any]) -> tuple[Resolved[Any] | None, list[str]]:
        """Returns the settings with more answers, or what is wrong with them."""
        answers = [Layer("answer", {key: value}) for key, value in (*self.answers, *more)]
        try:
            return self.stage.resolve([*self.layers, *answers], below=[]), []
        except UserError as error:
            return None, [PLACE.sub("", sentence) for sentence in getattr(error, "problems", [str(error)])]

    def value(self, setting: Setting) -> Any:
        """Returns the answer, else what files and defaults say."""
        answers = dict(self.answers)
        if setting.key in answers:
            return answers[setting.key]
        if self.resolved is not None:
            return setting.of(self.resolved.settings)
        return None if setting.info.is_required() else setting.default

    def asks(self, setting: Setting) -> bool:
        """Whether the setting's condition holds, and that of the setting it depends on."""
        condition = setting.marker(When)
        if condition is None:
            return True
        other = self.find(".".join((*setting.path[:-1], condition.field)))
        return self.asks(other) and condition.holds(self.value(other))

    def refusal(self, setting: Setting, text: str, later: Sequence[str] = ()) -> str:
        """Returns why a text is no answer; a contradiction to settings that are asked later waits for them."""
        if not text.strip() and setting.info.is_required() and self.value(setting) is None:
            return f"{setting.name}: required"
        more = [(setting.key, parse_answer(setting, text))] if text.strip() else []
        for sentence in self._resolve(*more)[1]:
            words = set(re.findall(r"\w+", sentence.replace(text.strip(), "")))  # a path may hold a setting's name
            if (setting.name in words or sentence not in self.problems) and not words & set(later):
                return sentence
        return ""

    def ask(self, name: str, later: Sequence[str] = ()) -> None:
        """Asks for one setting; an empty text and the present choice keep what is."""
        setting, table = self.find(name), TABLES["advice"]
        advice = table.get(f"{self.stage.name}.{setting.name}", table.get(setting.name))
        lines = [setting.help + (f" ({setting.bounds})" if setting.bounds else ""), f"→ {advice}"]
        Terminal().print("\n[dim]" + safe("\n".join(lines if advice else lines[:1])) + "[/]")
        current = self.value(setting)
        answer = self._choose(setting, current)
        if answer == TYPED:
            refusal = cache(partial(self.refusal, setting, later=later))  # the line below is drawn twice a second

            def status(text: str) -> tuple[str, str]:
                return ("error", refusal(text)) if refusal(text) else self.status()

            shown = "required" if current is None and setting.info.is_required() else show(current)
            text = ask(questionary.text(setting.name, instruction=f"({shown})"), status, typed=True)
            answer = parse_answer(setting, text) if text.strip() else KEPT
        if answer not in (KEPT, current):
            self.answers.append((setting.key, answer))
            self.update()

    def _choose(self, setting: Setting, current: Any) -> Any:
        """Returns the choice among a setting's values, or among the runs that it may name; TYPED asks for a text."""
        if setting.type_name == "true | false":
            return ask(questionary.confirm(setting.name, default=bool(current)), self.status)
        if typing.get_origin(setting.type) is Literal:
            choices = [Choice(show(choice), choice) for choice in setting.choices]
            default = next((choice for choice in choices if choice.value == current), None)
            return choose(setting.name, choices, self.status, default=default)
        is_model = getattr(setting.marker(Reads), "kind", "") == "model"
        if not (files := FILES.get(setting.name) or (MODEL_FILES if is_model else ())):
            return TYPED
        kept = [] if current is None and setting.info.is_required() else [Choice(f"{show(current)}  (as it is)", KEPT)]
        default = kept[0] if kept and (not is_model or current is None or os.path.exists(current)) else None
        fits = partial(has_model, files=files, scores=setting.name == "reward_model")
        return choose_run(setting.name, fits, kept, self.status, default=default)

    def ask_all(self, names: Sequence[str], save: Callable[[int], None], start: int = 0) -> None:
        """Asks for those of the settings whose conditions hold; `save` gets the number of the next one. Esc undoes an
        answer, Ctrl+D keeps the rest."""
        asked: list[tuple[int, int]] = []  # numbers of settings, and of the answers before each
        while start < len(names):
            if not self.asks(self.find(names[start])):
                start += 1
                continue
            before = len(self.answers)
            try:
                self.ask(names[start], names[start + 1 :])
                asked.append((start, before))
                start += 1
            except Back:
                if not asked:
                    raise
                start, before = asked.pop()
                del self.answers[before:]
                self.update()
            except EOFError:
                return
            save(start)

    def plain(self, part: str = "") -> dict[str, Any]:
        """Returns the settings, or a group, as a file holds them; the vocabulary follows from the tokenizer."""
        settings = self.resolved.settings
        values = settings.recorded()
        if "model" in values and "vocab_size" not in settings.model.model_fields_set:
            values["model"].pop("vocab_size", None)
        return {"stage": self.stage.name, **(values[part] if part else values)}

    def status(self, text: str = "") -> tuple[str, str]:
        """Returns what is below questions: what contradicts, or what the run will take."""
        if self.problems:
            return "problem", "; ".join(self.problems)
        if not self.stage.resumes:
            return "", ""
        return "", f"plan: {PLANNER.line(self.stage.name, self.plain()) or 'memory and time follow'}"


def parse_answer(setting: Setting, text: str) -> Any:
    """Returns the value that a text stands for; a list may be written without its brackets."""
    text = text.strip()
    if text.lower() in NONE_WORDS and "none" in setting.type_name and text not in setting.choices:
        return None
    is_list = setting.type_name.startswith("list of") and "," in text and not text.startswith(("[", "{"))
    return parse_value(setting, f"[{text}]" if is_list else text, setting.name)


# Plans ------------------------------------------------------------------------------------------------------------


class Planner:
    """A process that plans one configuration at a time, so that the menu stays without torch and no answer waits."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.plans: dict[str, Future[str]] = {}

    def line(self, stage: str, values: dict[str, Any]) -> str | None:
        """Returns memory, fit and time of a run in one line, or None while they are planned."""
        key = json.dumps([stage, values], sort_keys=True)
        if key not in self.plans and all(plan.done() for plan in self.plans.values()):
            if self.pool is None:  # a fork would share the terminal's state
                self.pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_quiet)
            try:
                self.plans[key] = self.pool.submit(describe_plan, stage, values)
            except BrokenProcessPool:  # most likely for lack of memory
                self.pool = None
        plan = self.plans.get(key)
        if plan is None or not plan.done():
            return None
        error = plan.exception()
        return f"not known: {reason_of(error)}" if error else plan.result()

    def close(self) -> None:
        """Ends the process: a run needs the memory."""
        for child in active_children() if self.pool else ():
            child.kill()
        self.pool, self.plans = None, {}


def _quiet() -> None:
    """Leaves Ctrl+C to the menu, ends with it, and lets no library print in the middle of a question."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def describe_plan(stage: str, values: dict[str, Any]) -> str:
    """Returns what a run of these settings takes on this machine, in one line."""
    settings = STAGES[stage].resolve([Layer("menu", values)], below=[]).settings
    from llmlab.hardware import probe
    from llmlab.runs.plan import make_plan

    plan = make_plan(STAGES[stage].function, settings, probe(settings.device, settings.dtype))
    memory = f"{human(plan.total, 'B')} of {human(plan.memory, 'B')}" if plan.memory else human(plan.total, "B")
    time = f", about {duration(plan.seconds)}" if plan.seconds else ""
    return f"{human(plan.parameters)} parameters, {memory}, {'fits' if plan.fits else 'DOES NOT FIT'}{time}"


PLANNER = Planner()
