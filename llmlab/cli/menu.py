"""The menu of bare `llmlab`: it asks, shows the configuration and the command, and runs exactly that command, as a
process of its own. Entries and questions are in `menu.yaml`; how a setting is asked is in `questions.py`."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import questionary
import yaml
from questionary import Choice

from llmlab import __version__
from llmlab.cli.options import print_config
from llmlab.cli.questions import DEEPEST, PLANNER, TABLES, TYPED, Back, Form, ask, choose, choose_run, has_model
from llmlab.runs.checkpoints import checkpoints
from llmlab.runs.history import RunFolder, find_runs
from llmlab.runs.record import RECORD
from llmlab.settings.base import show
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import Layer, dump, read_json, read_layer
from llmlab.settings.presets import RECIPE_FOLDER, presets
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, safe, say

HOW = "(a key or the arrows, then Enter)"
HINT = "Enter keeps (...), Esc goes back, Ctrl+D keeps the rest, Ctrl+C: to the menu."


def menu() -> None:
    """Asks what to do, and does it, until somebody leaves."""
    say(f"llmlab {__version__}: from an architecture to a model you can chat with", bold=True)
    entries = TABLES["entries"]
    choices = [Choice(e["title"], e, shortcut_key=e["key"], description=e["help"]) for e in entries]
    with closing(PLANNER):
        while True:
            print()
            try:
                entry = choose("What next?", choices, use_shortcuts=True, instruction=HOW)
            except Back:
                continue
            except (EOFError, KeyboardInterrupt):
                return say("left the menu")
            try:
                open_entry(entry)
            except (Back, EOFError):
                pass
            except UserError as error:
                say(f"error: {error}", error=True, fg="red")
            except KeyboardInterrupt:
                say("\nback in the menu; the answers so far are kept (Ctrl+C here leaves)")


def open_entry(entry: dict[str, Any]) -> None:
    """Opens an entry: further entries, a stage, a command, or one of ACTIONS."""
    from llmlab.cli.app import COMMANDS

    if "entries" in entry:
        known = [inner for inner in entry["entries"] if inner["words"][0] in COMMANDS]
        open_entry(choose(entry["title"], [Choice(inner["title"], inner) for inner in known]))
    elif stages := entry.get("stages"):
        choices = [Choice(name, description=STAGES[name].help) for name in stages]
        train(stages[0] if len(stages) == 1 else choose("Algorithm", choices))
    elif "action" in entry:
        ACTIONS[entry["action"]]()
    else:
        words = list(entry["words"])
        for _ in range(entry.get("runs", 0) or entry.get("models", 0)):
            chosen = choose_run("Run folder", has_model if "models" in entry else lambda run: True)
            if chosen == TYPED:
                refuse = lambda text: ("", "") if text.strip() else ("error", "a value is required")  # noqa: E731
                chosen = ask(questionary.text("Folder or hub id"), refuse, typed=True).strip()
            words.append(chosen)
        for option, default in entry.get("asks", {}).items():
            text = ask(questionary.text(option, default)).strip()
            words += [option, text] if text else []
        run(*words)


def run(*words: str) -> bool:
    """Runs `llmlab WORDS` in a process of its own, and returns whether it ended well."""
    PLANNER.close()
    say(f"\n$ {shlex.join(['llmlab', *words])}", bold=True)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl+C is the run's; it would inherit SIG_IGN
    try:
        code = subprocess.call([sys.executable, "-m", "llmlab", *words])
    finally:
        signal.signal(signal.SIGINT, before)
    if code < 0:  # such as SIGKILL, where memory ran out
        say(f"it was ended by {signal.Signals(-code).name}", error=True, fg="yellow")
    elif code:
        say(f"it ended with exit code {code}", error=True, fg="yellow")
    return code == 0


def confirm_and_run(*words: str) -> bool:
    """Runs a command where that is confirmed; returns whether it ran and ended well."""
    return ask(questionary.confirm(f"Run {shlex.join(['llmlab', *words])} ?")) and run(*words)


def train(stage: str) -> None:
    """Asks for a stage's settings, from a new or an existing configuration, and runs it; or resumes a run."""
    runs = [run for run in find_runs(Path(), deepest=DEEPEST) if run.stage == stage and checkpoints(run.folder)]
    models = _configurations("model") if stage == "pretrain" else []
    ways = [Choice("Draft: go on where you stopped", go_on)] * _draft(stage).exists()
    ways += [Choice("New configuration", [])]
    ways += [Choice(f"New configuration, model of {path}", [path]) for path in models]
    ways += [Choice(f"New configuration over preset {name}", [str(path)]) for name, path in presets(stage).items()]
    ways += [Choice(f"Existing configuration {path}", path) for path in _configurations(stage)]
    ways += [Choice("Existing configuration: another file", TYPED)]
    ways += [Choice("Resume a run from a checkpoint", runs)] * bool(runs)
    way = choose("Start from", ways) if len(ways) > 2 else []
    if way is go_on:
        return go_on(stage)
    if way is runs:
        return resume(stage, runs)
    if way == TYPED:
        way = ask(questionary.text("File"), lambda text: ("error", _refusal(stage, text)), typed=True).strip()
    names = TABLES["first"][stage]
    if isinstance(way, str):
        return review(Form(stage, [way]), stage, names)
    form = Form(stage, way)
    form.answers += [("output_dir", _free(form.value(form.find("output_dir"))))]
    ask_first(form, stage, [*TABLES["first"]["model"], *names] if stage == "pretrain" and not way else names)


def configure_model() -> None:
    """Asks for a model's configuration and saves it."""
    if _draft("model").exists() and ask(questionary.confirm("Go on with the draft?")):
        return go_on("model")
    ask_first(Form("pretrain"), "model", TABLES["first"]["model"])


def go_on(name: str) -> None:
    """Goes on with a draft."""
    with reading(_draft(name), "a draft of the menu"):
        draft = read_json(_draft(name))
        form = Form(draft["stage"], draft["files"], draft["answers"])
        names, start = list(draft["names"]), int(draft["next"])
        for key in (*names, *dict(draft["answers"])):
            form.find(key)
    ask_first(form, name, names, start)


def ask_first(form: Form, name: str, names: Sequence[str], start: int = 0) -> None:
    """Asks for settings, saving the draft after each answer, and shows the configuration."""
    form.update()
    print(HINT)
    form.ask_all(names, lambda following: _save_draft(form, name, names, following), start)
    review(form, name, names)


def review(form: Form, name: str, names: Sequence[str]) -> None:
    """Shows configuration and command until it is run, saved or left."""
    console, saved = Terminal(), ""
    while True:
        if form.resolved is None:  # nothing was valid yet
            raise UserError("; ".join(form.problems))
        settings, is_model = form.resolved.settings, name == "model"
        untouched = len(form.files) == 1 and not form.answers
        path = saved or (form.files[0] if untouched else _free(_file_of(name)))
        command = [*(["tokenizer", "train"] if name == "tokenizer" else [name]), "--config", path]
        command += ["--allow-code"] * getattr(settings, "allow_code", False)  # never from a file
        values = settings.model_dump(mode="json", exclude_defaults=True)
        values = values.get("model", {}) if is_model else values
        console.rule(safe(path))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()
        console.print(safe(text if values else "# all defaults"))
        for warning in form.resolved.warnings:
            console.print(f"[yellow]warning: {safe(warning)}[/]")
        say("" if is_model else f"$ {shlex.join(['llmlab', *command])}", bold=True)
        actions = [Choice("Run it", "run")] * (not form.problems and not is_model)
        actions += [Choice(f"Save it as {path}", "save")] * (not form.problems and not saved and not untouched)
        actions += [Choice("More settings: change any of them", "change")]
        actions += [Choice("Show every setting and its source", "show"), Choice("Back to the menu", "leave")]
        action = choose("Next", actions, form.status)
        if action == "change":
            with suppress(Back, EOFError):
                change(form, name)
            saved = ""
            _save_draft(form, name, names, len(names))
        elif action == "show":
            print_config(form.resolved)
        elif action == "leave":
            return
        else:
            if not untouched:
                dump(form.plain("model" if is_model else ""), path)
                say(f"saved {path}")
                saved = path
            _draft(name).unlink(missing_ok=True)
            if action == "save" or run(*command):
                return


def change(form: Form, name: str) -> None:
    """Asks for one setting of all, chosen by typing a part of its name."""
    group = "model." if name == "model" else ""
    settings = [setting for setting in form.settings if setting.key.startswith(group) and form.asks(setting)]
    choices = [Choice(f"{setting.name} = {show(form.value(setting))}"[:74], setting) for setting in settings]
    setting = choose("Setting", choices, form.status, use_search_filter=True)
    form.ask(setting.key, [other.name for other in form.settings if other is not setting])


def resume(stage: str, runs: Sequence[RunFolder]) -> None:
    """Asks for a checkpoint, the length of the run and the optimizer's state."""
    places = [(run, path) for run in reversed(runs) for path in reversed(checkpoints(run.folder))]
    choices = [Choice(f"{path}  ({run.status} at step {run.step})", (run, path)) for run, path in places]
    chosen, checkpoint = choose("Checkpoint", choices)
    form, recorded = Form(stage), chosen.record.get("settings", {})
    form.layers = [Layer(str(chosen.folder / RECORD), recorded)]
    form.update()
    lengths = [name for name in ("num_episodes", "epochs", "max_steps") if recorded.get(name) is not None]
    for name in lengths[:1]:
        form.ask(name)
    load = ask(questionary.confirm("Load the optimizer's state? (no, to change the optimizer)"))
    if not load:
        form.ask_all(["optimizer", *TABLES["after"]["optimizer"]], lambda following: None)
    words = [_word(key, value) for key, value in form.answers]
    confirm_and_run(stage, "--resume", str(checkpoint), *words, *([] if load else ["--no-load-optimizer"]))


def run_pipeline() -> None:
    """Runs the stages of a file, after showing what each will do."""
    choices = [Choice(str(path)) for path in _pipelines(Path())]
    choices += [Choice(f"{path.stem}  (shipped)", path.stem) for path in _pipelines(RECIPE_FOLDER)]
    name = choose("Pipeline", choices)
    if run("run", name, "--dry-run"):
        confirm_and_run("run", name)


def quick_start() -> None:
    """Asks for the data and runs a small pipeline, then chats with its model."""
    words = ["run", "first_chat"]
    for stage, together in (("pretrain", ["tokenizer", "pretrain"]), ("sft", ["sft"])):
        form = Form(stage, answers=[("datasets", TABLES["quick_start"][stage])])
        form.ask("datasets")
        if len(form.answers) > 1:
            words += [_word(f"{name}.datasets", form.answers[-1][1]) for name in together]
    if confirm_and_run(*words):
        run("chat", "runs/first_chat/sft")


ACTIONS = {"model": configure_model, "pipeline": run_pipeline, "quick_start": quick_start, "leave": sys.exit}


def _pipelines(folder: Path) -> list[Path]:
    """Returns the files of a folder that can be read and have stages."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        with suppress(UserError):
            found += [path] * ("stages" in read_layer(path).values)
    return found


def _word(key: str, value: Any) -> str:
    """Returns an answer as a word of the command line, which reads text as it is and all else as YAML."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _file_of(name: str) -> str:
    return TABLES["files"].get(name, TABLES["files"]["other"])


def _configurations(name: str) -> list[str]:
    """Returns the files here that the menu saved for a stage, or as `model`."""
    found = sorted(Path().glob(f"{Path(_file_of(name)).stem}*.json"))
    return [str(path) for path in found if not _refusal("pretrain" if name == "model" else name, str(path))]


def _refusal(stage: str, path: str) -> str:
    """Returns why a file is no configuration of a stage, or an empty text."""
    try:
        kind = read_layer(path.strip()).values.get("stage", stage)
        return f"{path}: it is of stage {kind}" if kind != stage else "; ".join(Form(stage, [path.strip()]).problems)
    except UserError as error:
        return str(error)


def _free(name: str) -> str:
    """Returns the name of a file or folder, with a number where it is taken."""
    stem, ending = os.path.splitext(name)
    names = itertools.chain([name], (f"{stem}-{number}{ending}" for number in itertools.count(2)))
    return next(path for path in names if not os.path.exists(path))


def _draft(name: str) -> Path:
    return Path(f".llmlab_draft_{name}.json")


def _save_draft(form: Form, name: str, names: Sequence[str], following: int) -> None:
    """Saves the answers so far, so that nothing ends them: Ctrl+C, a lost connection, a kill."""
    values = {"stage": form.stage.name, "files": form.files, "answers": form.answers}
    dump({**values, "names": list(names), "next": following}, _draft(name))
