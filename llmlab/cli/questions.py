"""Questions about a stage's settings, generated from their types, choices, bounds, conditions and help.

An answer is a layer over preset and files, which the settings validate while it is typed.  Which settings are asked,
and in which order, is in `menu.yaml`; what happens with the answers is in `menu.py`.
"""

import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import questionary
import yaml
from prompt_toolkit.application import get_app
from prompt_toolkit.filters import is_done
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.layout import ConditionalContainer, FormattedTextControl, HSplit, Layout, Window
from questionary import Choice

from llmlab.cli.options import parse_value
from llmlab.cli.planner import Planner
from llmlab.runs.history import RunFolder, find_runs
from llmlab.settings.base import Setting, When, fields_of, show
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.paths import MODEL_FILES, Reads
from llmlab.settings.presets import for_stage, read_preset
from llmlab.settings.sources import Resolved
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, human, safe

ANSWER = "answer"  # the label of answers in errors
PLACE = re.compile(rf"^(?:{ANSWER}|defaults|arguments): ")
FILES = {"adapter": ("adapter_config.json",), "tokenizer_name": ("tokenizer.json",)}  # in runs that may be chosen
ELSEWHERE = "another: type a folder or hub id"
TABLES = yaml.safe_load(Path(__file__).with_suffix("").with_name("menu.yaml").read_text(encoding="utf-8"))
STYLE = questionary.Style([("highlighted", "bold"), ("problem", "fg:ansired"), ("status", "fg:ansicyan")])
Line = Callable[[], tuple[str, str]]
"""Returns the style and text of the line below a question."""


class Back(Exception):
    """Esc: one question back."""


class Rest(Exception):
    """Ctrl+D: keep what is, for this question and those after it."""


def ask(question: questionary.Question, line: Line | None = None, problem: Callable[[str], str] | None = None) -> Any:
    """Asks one question with a line below it; Esc raises Back, Ctrl+C KeyboardInterrupt.

    Args:
        line: what the line says, twice a second.
        problem: returns why a text is refused, or an empty text; said while it is typed.
    """
    app, keys = question.application, KeyBindings()

    @keys.add("escape", eager=True)
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=Back())

    @keys.add("c-d", eager=True)
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=Rest())

    def below() -> FormattedText:
        refusal = problem(get_app().current_buffer.text) if problem else ""
        style, text = ("problem", refusal) if refusal else line() if line else ("status", "")
        return FormattedText(
            [(f"class:{style}", textwrap.fill(printable(text), shutil.get_terminal_size().columns - 1))]
        )

    if problem:

        @keys.add("enter", eager=True)
        def _(event: KeyPressEvent) -> None:
            if not problem(event.current_buffer.text):
                event.current_buffer.validate_and_handle()

    app.key_bindings = merge_key_bindings([*([app.key_bindings] if app.key_bindings else []), keys])
    status = ConditionalContainer(Window(FormattedTextControl(below), dont_extend_height=True), filter=~is_done)
    app.layout = Layout(HSplit([app.layout.container, status]), focused_element=app.layout.current_window)
    app.refresh_interval, app.ttimeoutlen = 0.5, 0.05
    return question.unsafe_ask()


def choose(message: str, choices: Iterable[Choice], line: Line | None = None, **options: Any) -> Any:
    """Asks for one of the choices."""
    found = list(choices)
    return ask(questionary.select(message, found, style=STYLE, use_jk_keys=False, **options), line)


def finished_runs(files: Sequence[str] = MODEL_FILES) -> list[RunFolder]:
    """Returns the runs here with one of these files, the latest first."""
    return [run for run in reversed(find_runs(Path())) if any((run.folder / file).is_file() for file in files)]


def run_choice(run: RunFolder) -> Choice:
    """Returns a run as a choice, with its stage, status and result."""
    result = f", {run.key_metric[0]} {run.key_metric[1]:.4g}" if run.key_metric else ""
    return Choice(printable(f"{run.folder}  ({run.stage}, {run.status}{result})"), str(run.folder))


class Form:
    """A stage's settings while they are asked: a preset, files, and over them the answers, in their order."""

    def __init__(
        self,
        stage: str,
        preset: str | None = None,
        files: Sequence[str] = (),
        answers: Iterable[Sequence[Any]] = (),
        planner: Planner | None = None,
    ):
        self.stage, self.preset, self.files, self.planner = STAGES[stage], preset, list(files), planner
        self.table = {setting.key: setting for setting in fields_of(self.stage.settings_class)}
        self.below = [read_preset(stage, preset)] if preset else []
        self.layers = [for_stage(read_layer(path), stage) for path in files]
        self.answers = [(key, value) for key, value in answers]
        self.resolved: Resolved[Any] | None = None
        self.problems = self.update()

    def find(self, name: str) -> Setting:
        """Returns the setting of this name, also inside of a group."""
        return next(setting for setting in self.table.values() if name in (setting.key, setting.name))

    def resolve(self, *more: tuple[str, Any]) -> Resolved[Any]:
        answers = [Layer(ANSWER, {key: value}) for key, value in (*self.answers, *more)]
        return self.stage.resolve([*self.layers, *answers], below=self.below)

    def update(self) -> list[str]:
        """Resolves the answers; returns what contradicts in them, and then the last settings that were valid stay."""
        self.problems = []
        try:
            self.resolved = self.resolve()
        except UserError as error:
            self.problems = _sentences(error)
        return self.problems

    def value(self, setting: Setting) -> Any:
        """Returns the answer, else what preset, files and defaults say."""
        answered = [value for key, value in self.answers if key == setting.key]
        if answered:
            return answered[-1]
        return setting.of(self.resolved.settings) if self.resolved else None

    def asks(self, setting: Setting) -> bool:
        """Whether the setting's condition holds, and that of the setting it depends on."""
        condition = setting.marker(When)
        if condition is None:
            return True
        other = self.table[".".join((*setting.path[:-1], condition.field))]
        return self.asks(other) and condition.holds(self.value(other))

    def refusal(self, setting: Setting, text: str, later: Sequence[str] = ()) -> str:
        """Returns why a text is no answer; a contradiction to settings that are asked later waits for them."""
        more = [(setting.key, parse_answer(setting, text))] if text.strip() else []
        try:
            self.resolve(*more)
        except UserError as error:
            for sentence in _sentences(error):
                words = set(re.findall(r"\w+", sentence))
                if (setting.name in words or sentence not in self.problems) and not words & set(later):
                    return sentence
        return ""

    def ask(self, name: str, later: Sequence[str] = ()) -> None:
        """Asks for one setting; an empty text and the present choice keep what is."""
        setting = self.find(name)
        advice = TABLES["advice"].get(f"{self.stage.name}.{setting.name}", TABLES["advice"].get(setting.name))
        bounds = f" ({setting.bounds})" if setting.bounds else ""
        Terminal().print(
            f"\n[dim]{safe(setting.help + bounds)}[/]" + (f"\n[dim]→ {safe(advice)}[/]" if advice else "")
        )
        current = self.value(setting)
        answer = self._choose(setting, current)
        if answer is ELSEWHERE:
            shown = "required" if current is None and setting.info.is_required() else show(current)
            question = questionary.text(setting.name, instruction=f"({shown})", style=STYLE)
            text = ask(question, self.status, lambda text: self.refusal(setting, text, later)).strip()
            answer = parse_answer(setting, text) if text else current
        if answer != current:
            self.answers.append((setting.key, answer))
            self.update()

    def _choose(self, setting: Setting, current: Any) -> Any:
        """Returns the choice among a setting's values, or the runs that it may name; ELSEWHERE asks for a text."""
        if setting.type_name == "true | false":
            return ask(questionary.confirm(setting.name, default=bool(current), style=STYLE), self.status)
        if typing.get_origin(setting.type) is Literal:
            choices = [Choice(show(choice), choice) for choice in setting.choices]
            return choose(setting.name, choices, self.status, default=next(c for c in choices if c.value == current))
        reads = setting.marker(Reads)
        files = FILES.get(setting.name) or (MODEL_FILES if reads is not None and reads.kind == "model" else ())
        runs = [run_choice(run) for run in finished_runs(files)] if files else []
        if not runs:
            return ELSEWHERE
        kept = [] if current is None and setting.info.is_required() else [Choice(f"{show(current)}  (as it is)", "")]
        answer = choose(setting.name, [*runs, *kept, Choice(ELSEWHERE, ELSEWHERE)], self.status)
        return answer or current

    def ask_all(self, names: Sequence[str], save: Callable[[int], None], start: int = 0) -> None:
        """Asks for those of the settings whose conditions hold; Esc undoes an answer, Ctrl+D keeps the rest.

        `save` is called after each with the number of the next.
        """
        asked: list[tuple[int, int]] = []  # settings, and how many answers there were before each
        index = start
        while index < len(names):
            if not self.asks(self.find(names[index])):
                index += 1
                continue
            before = len(self.answers)
            try:
                self.ask(names[index], names[index + 1 :])
                asked.append((index, before))
                index += 1
            except Back:
                if not asked:
                    raise
                index, before = asked.pop()
                del self.answers[before:]
                self.update()
            except Rest:
                return
            save(index)

    def plain(self) -> dict[str, Any]:
        """Returns the settings as a file holds them; the vocabulary's size follows from the tokenizer unless set."""
        assert self.resolved is not None
        settings = self.resolved.settings
        values = settings.recorded()
        if "vocab_size" not in getattr(getattr(settings, "model", None), "model_fields_set", ("vocab_size",)):
            values["model"].pop("vocab_size", None)
        return values

    def status(self) -> tuple[str, str]:
        """Returns the style and text of the line below questions: what contradicts, or the model's size and the plan."""
        if self.problems or self.resolved is None:
            return "problem", "; ".join(self.problems)
        if not self.stage.resumes or self.planner is None:
            return "status", ""
        settings = self.resolved.settings
        plan = self.planner.line(self.stage.name, self.plain())
        if plan is None and getattr(settings, "init_from", "") is None:
            plan = f"{human(settings.model.count_parameters())} parameters; memory and time follow"
        return "status", f"plan: {plan or 'follows'}"


def parse_answer(setting: Setting, text: str) -> Any:
    """Returns the value that a text stands for; a list may be written without its brackets."""
    text = text.strip()
    is_list = setting.type_name.startswith("list of") and "," in text and not text.startswith(("[", "{"))
    return parse_value(setting, f"[{text}]" if is_list else text, setting.name)


def _sentences(error: UserError) -> list[str]:
    return [PLACE.sub("", sentence) for sentence in getattr(error, "problems", [str(error)])]
