"""The menu of bare `llmlab`: it asks, shows the configuration and the command, and runs exactly that command.

Entries and questions are in `menu.yaml`; how a setting is asked is in `questions.py`.  Runs are processes of
their own, which Ctrl+C stops as it would without the menu.
"""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import questionary
import yaml
from questionary import Choice

from llmlab import __version__
from llmlab.cli.options import print_config
from llmlab.cli.planner import Planner
from llmlab.cli.questions import STYLE, TABLES, Back, Form, Rest, ask, choose, finished_runs, run_choice
from llmlab.runs.checkpoints import checkpoints
from llmlab.runs.history import RunFolder, find_runs
from llmlab.runs.record import RECORD
from llmlab.settings.base import show
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import Layer, dump, read_json, read_layer
from llmlab.settings.gates import read_gates
from llmlab.settings.paths import check_free, expand
from llmlab.settings.presets import SECTIONS, presets, recipe_folder
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, safe, say

DRAFTS = Path(".llmlab_drafts.json")
HINT = "Enter keeps (...), Esc goes back, Ctrl+D keeps the rest, Ctrl+C: to the menu."
PLANNER = Planner()


def menu() -> None:
    """Open the menu: configure, train, test, merge, and what else there is, by questions."""
    if not is_terminal():
        from llmlab.cli.app import list_commands

        return list_commands()
    say(f"llmlab {__version__}: from an architecture to a model you can chat with", bold=True)
    entries = TABLES["entries"]
    choices = [Choice(e["title"], e, shortcut_key=e["key"], description=e["help"]) for e in entries]
    while True:
        print()
        entry = choose("What next?", choices, use_shortcuts=True, instruction="(a key or the arrows, then Enter)")
        if entry.get("action") == "leave":
            return
        try:
            if stages := entry.get("stages"):
                train(stages[0] if len(stages) == 1 else _choose_stage(stages))
            else:
                ACTIONS[entry["action"]]()
        except (Back, Rest):
            continue
        except UserError as error:
            say(f"error: {error}", error=True, fg="red")
        except KeyboardInterrupt:
            say("\nback in the menu; answers so far are kept (Ctrl+C here leaves)")


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def run(*words: str) -> int:
    """Runs `llmlab WORDS` in a process of its own, and returns its exit code."""
    PLANNER.stop()
    say(f"\n$ {shlex.join(['llmlab', *words])}", bold=True)
    before = signal.signal(
        signal.SIGINT, lambda *_: None
    )  # Ctrl+C is the run's; SIG_IGN is inherited
    try:
        code = subprocess.call([sys.executable, "-m", "llmlab", *words])
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        say(f"it ended with exit code {code}", error=True, fg="yellow")
    return code


# Training ---------------------------------------------------------------------------------------------------------


def _choose_stage(stages: Sequence[str]) -> str:
    return choose("Algorithm", [Choice(name, description=STAGES[name].help) for name in stages])


def train(stage: str) -> None:
    """Asks for a stage's settings, from a new or an existing configuration, and runs it; or resumes a run."""
    runs = [run for run in find_runs(Path()) if run.stage == stage and checkpoints(run.folder)]
    ways = [Choice("Draft: go on where you stopped", "draft")] * (stage in _drafts())
    ways += [Choice("New configuration", "new")]
    ways += [Choice(f"New configuration, model of {path}", [path]) for path in _saved("model") if stage == "pretrain"]
    ways += [Choice("New configuration over a preset", "preset")] * (stage in SECTIONS)
    ways += [Choice(f"Existing configuration {path}", path) for path in _saved(stage)]
    ways += [Choice("Existing configuration: another file", "file")]
    ways += [Choice("Resume a run from a checkpoint", "resume")] * bool(runs)
    way = choose("Start from", ways)
    if way == "resume":
        return resume(stage, runs)
    names = TABLES["first"][stage]
    if way == "draft":
        return _go_on(stage)
    if way == "file":
        way = ask(questionary.text("File", style=STYLE), problem=lambda text: _refuse_file(stage, text))
    preset = choose("Preset", map(Choice, presets(stage))) if way == "preset" else None
    files = way if isinstance(way, list) else [] if way in ("new", "preset") else [way]
    form = Form(stage, preset, files, planner=PLANNER)
    if way == "new" and stage == "pretrain":
        names = [*TABLES["first"]["model"], *names]
    if files == [way]:
        return _review(form, stage, names)
    output = form.find("output_dir")
    if (free := _free(form.value(output))) != form.value(output):
        form.answers.append((output.key, free))
    _ask(form, stage, names)


def configure_model() -> None:
    """Asks for a model's configuration and saves it."""
    if "model" in _drafts() and ask(questionary.confirm("Go on with the draft?", style=STYLE)):
        return _go_on("model")
    _ask(Form("pretrain", planner=PLANNER), "model", TABLES["first"]["model"])


def _ask(form: Form, name: str, names: Sequence[str], start: int = 0) -> None:
    """Asks for settings, then shows them; after each answer the draft is saved."""
    form.update()
    print(HINT)
    form.ask_all(names, lambda following: _save_draft(form, name, names, following), start)
    _review(form, name, names)


def _review(form: Form, name: str, names: Sequence[str]) -> None:
    """Shows configuration and command until it is run, saved or left."""
    console, saved = Terminal(), ""
    while True:
        problems = form.update()
        untouched = len(form.files) == 1 and not form.answers and not form.preset
        path = saved or (form.files[0] if untouched else _free(_file_of(name)))
        command = [*(["tokenizer", "train"] if name == "tokenizer" else [name]), "--config", path]
        console.rule(safe(path))
        if form.resolved is not None:
            settings = form.resolved.settings
            command += ["--allow-code"] * getattr(settings, "allow_code", False)  # never from a file
            values = settings.model_dump(mode="json", exclude_defaults=True)
            values = values.get("model", {}) if name == "model" else values
            console.print(safe(yaml.safe_dump(values, sort_keys=False).rstrip() if values else "# all defaults"))
            console.print(
                "".join(f"[yellow]warning: {safe(warning)}[/]\n" for warning in form.resolved.warnings), end=""
            )
        if name != "model":
            console.print(f"[bold]$ llmlab {safe(shlex.join(command))}[/]")
        actions = [Choice("Run it", "run")] * (not problems and name != "model")
        actions += [Choice(f"Save it as {path}", "save")] * (not problems and path != saved and not untouched)
        actions += [Choice("Change a setting", "change"), Choice("Show every setting and its source", "show")]
        action = choose("Next", [*actions, Choice("Back to the menu", "leave")], form.status)
        if action == "leave":
            return
        if action == "change":
            _change(form, name)
            _save_draft(form, name, names, len(names))
        elif action == "show" and form.resolved is not None:
            print_config(form.resolved)
        elif action in ("save", "run"):
            if not untouched:
                values = form.plain()
                dump({"stage": form.stage.name, **(values["model"] if name == "model" else values)}, path)
                say(f"saved {path}")
                saved = path
            _save_drafts({key: draft for key, draft in _drafts().items() if key != name})
            if action == "save" or run(*command) == 0:
                return


def _change(form: Form, name: str) -> None:
    """Asks for one setting of all, chosen by typing a part of its name."""
    group = "model." if name == "model" else ""
    settings = [setting for setting in form.table.values() if setting.key.startswith(group) and form.asks(setting)]
    choices = [Choice(f"{s.name} = {show(form.value(s))}"[:74], s.key) for s in settings]
    try:
        key = choose("Setting", choices, form.status, use_search_filter=True)
        form.ask(key, [setting.name for setting in form.table.values() if setting.key != key])
    except (Back, Rest):
        return


def resume(stage: str, runs: Sequence[RunFolder]) -> None:
    """Asks for a checkpoint, the length of the run and the optimizer's state."""
    places = [(run, path) for run in reversed(runs) for path in reversed(checkpoints(run.folder))]
    choices = [Choice(f"{path}  ({run.status} at step {run.step})", (run, path)) for run, path in places]
    chosen, checkpoint = choose("Checkpoint", choices)
    form = Form(stage)
    recorded = chosen.record.get("settings", {})
    form.layers = [Layer(str(chosen.folder / RECORD), recorded)]
    form.update()
    form.ask(next(name for name in ("num_episodes", "epochs", "max_steps") if recorded.get(name) is not None))
    load = ask(questionary.confirm("Load the optimizer's state? (no where you change the optimizer)", style=STYLE))
    if not load:
        form.ask_all(["optimizer", *TABLES["optimizer"]], lambda following: None)
    words = [f"{key}={show(value)}" for key, value in form.answers]
    _confirm(stage, "--resume", str(checkpoint), *words, *([] if load else ["--no-load-optimizer"]))


def _confirm(*words: str) -> bool:
    """Shows a command, and runs it where that is confirmed; returns whether it ran to its end."""
    say(f"\n$ {shlex.join(['llmlab', *words])}")
    return ask(questionary.confirm("Run it?", style=STYLE)) and run(*words) == 0


# Configurations and drafts ----------------------------------------------------------------------------------------


def _file_of(name: str) -> str:
    return TABLES["files"].get(name, TABLES["files"]["other"])


def _saved(name: str) -> list[str]:
    """Returns the files of this folder that hold a configuration of a stage (or `model`), as the menu names them."""
    stem, stage = Path(_file_of(name)).stem, "pretrain" if name == "model" else name
    paths = [str(path) for path in sorted(Path().glob(f"{stem}*")) if path.suffix in (".json", ".yaml", ".yml")]
    return [path for path in paths if not _refuse_file(stage, path)]


def _refuse_file(stage: str, path: str) -> str:
    """Returns why a file is no configuration of a stage, or an empty text."""
    try:
        kind = read_layer(path.strip()).values.get("stage", stage)
        problems = Form(stage, files=[path.strip()]).problems
    except UserError as error:
        return str(error)
    return f"{path}: it is of stage {kind}, not {stage}" if kind != stage else "; ".join(problems)


def _free(name: str) -> str:
    """Returns the name of a file or folder, with a number where it is taken."""
    stem, ending = os.path.splitext(name)
    return next(path for path in (name, *(f"{stem}-{n}{ending}" for n in itertools.count(2))) if _is_free(path))


def _is_free(path: str) -> bool:
    try:
        check_free(expand(path))
    except UserError:
        return False
    return not expand(path).is_file()


def _drafts() -> dict[str, Any]:
    return read_json(DRAFTS) if DRAFTS.exists() else {}


def _save_draft(form: Form, name: str, names: Sequence[str], following: int) -> None:
    """Saves the answers so far, so that nothing ends them: Ctrl+C, a lost connection, a kill."""
    values = {"stage": form.stage.name, "preset": form.preset, "files": form.files, "answers": form.answers}
    _save_drafts({**_drafts(), name: {**values, "names": list(names), "following": following}})


def _save_drafts(drafts: dict[str, Any]) -> None:
    if drafts:
        dump(drafts, DRAFTS)
    else:
        DRAFTS.unlink(missing_ok=True)


def _go_on(name: str) -> None:
    """Goes on with a draft."""
    with reading(DRAFTS, "a draft of the menu"):
        draft = _drafts()[name]
        form = Form(draft["stage"], draft["preset"], draft["files"], draft["answers"], PLANNER)
        names, following = list(draft["names"]), int(draft["following"])
    _ask(form, name, names, following)


# What came since --------------------------------------------------------------------------------------------------


def _choose_run(message: str, runs: Sequence[RunFolder], nothing: str = "") -> str:
    """Returns a run folder that is chosen, or a name that is typed; with `nothing`, that is a choice, and empty."""
    typed = Choice("another: type a folder or hub id", "\t")
    choices = [*([Choice(nothing, "")] if nothing else []), *map(run_choice, runs), typed]
    answer = choose(message, choices) if runs or nothing else "\t"
    if answer != "\t":
        return answer
    needed = lambda text: "" if text.strip() else "expected a run folder or a hub id"  # noqa: E731
    return ask(questionary.text(message, instruction="(run folder or hub id)", style=STYLE), problem=needed).strip()


def chat() -> None:
    """Chats with a model."""
    run("chat", _choose_run("Model", finished_runs()))


def evaluate() -> None:
    """Scores a model's answers."""
    runs = finished_runs()
    model = _choose_run("Model", runs)
    gates = ask(
        questionary.text("Gates", "distinct_n", instruction="(names, or a file)", style=STYLE), problem=_refuse_gates
    )
    source = "(source of held-out prompts; empty: the gates name theirs)"
    prompts = ask(questionary.text("Prompts", "demo/chat", instruction=source, style=STYLE)).strip()
    baseline = _choose_run("Baseline", runs, nothing="none")
    words = ["evaluate", model, "--gates", gates.strip(), *(["--prompts", prompts] if prompts else [])]
    _confirm(*words, *(["--baseline", baseline] if baseline else []))


def _refuse_gates(text: str) -> str:
    try:
        return "" if read_gates(text.strip()) else "expected names of gates, such as distinct_n"
    except UserError as error:
        return str(error)


def inspect_runs() -> None:
    """Shows runs, in one of several ways."""
    from llmlab.cli.app import COMMANDS

    ways = [way for way in TABLES["runs"] if way[1][0] in COMMANDS]
    words, count = choose("What", [Choice(title, (words, count)) for title, words, count in ways])
    chosen: list[str] = []
    while len(chosen) < count:
        runs = [run for run in reversed(find_runs(Path())) if str(run.folder) not in chosen]
        chosen.append(_choose_run("Run", runs))
    run(*words, *chosen)


def run_pipeline() -> None:
    """Runs the stages of a file, after showing what each will do."""
    here, shipped = (
        [
            path
            for path in sorted(folder.glob("*.yaml"))
            if re.search("^stages:", path.read_text(errors="replace"), re.M)
        ]
        for folder in (Path(), recipe_folder())
    )
    choices = [
        *(Choice(str(path)) for path in here),
        *(Choice(f"{path.stem}  (shipped)", path.stem) for path in shipped),
    ]
    name = choose("Pipeline", choices)
    if run("run", name, "--dry-run") == 0:
        _confirm("run", name)


def quick_start() -> None:
    """Asks for the data and runs a small pipeline, then chats with its model."""
    words = ["run", "first_chat"]
    say("A tokenizer, a decoder of 0.7 million parameters, fine-tuning, a chat: minutes on two cores.")
    for stage, also in (("pretrain", "tokenizer"), ("sft", "")):
        form = Form(stage, answers=[("datasets", TABLES["quick_start"][stage])])
        form.ask("datasets")
        if len(form.answers) > 1:
            words += [f"{name}.datasets={show(form.answers[-1][1])}" for name in (also, stage) if name]
    if _confirm(*words):
        run("chat", "runs/first_chat/sft")


ACTIONS = {
    "model": configure_model,
    "chat": chat,
    "evaluate": evaluate,
    "runs": inspect_runs,
    "pipeline": run_pipeline,
    "doctor": lambda: run("doctor"),
    "quick_start": quick_start,
}
