"""Turns a settings class into a typer command: one option a setting, and trailing `key=value` for the same keys.

Values stay text until the settings validate them, so a file, the command line and a notebook get the same errors.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from llmlab.settings.base import Setting, Settings, fields_of, show, spellings_of
from llmlab.settings.errors import UserError, did_you_mean, printable
from llmlab.settings.files import Layer, dump, parse_scalar, read_layer
from llmlab.settings.sources import Resolved, resolve
from llmlab.settings.trust import allow_remote_code
from llmlab.terminal import say

COMMAND_LINE = "command line"
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model or tokenizer brings along; read it first.",
        callback=allow_remote_code,
    ),
]


def stage_command(
    name: str,
    stage: type[Settings],
    execute: Callable[..., Any],
    *extra: inspect.Parameter,
    words: str | None = None,
    loads: bool = True,
) -> Callable[..., None]:
    """Returns a typer command that resolves a stage's settings and calls `execute(resolved, **extra)`.

    Args:
        name: the stage, under which presets are looked up (`recipes/<name>/<preset>.yaml`).
        stage: the settings class whose fields become options.
        execute: what to do with the resolved settings.
        extra: further typer parameters that are not settings, such as `--resume`.
        words: the list setting that arguments without `=` are entries of, such as `datasets`.
        loads: whether the stage loads models or tokenizers, which may bring code along.
    """
    parameters = [
        _parameter(
            "overrides",
            list[str] | None,
            typer.Argument(
                metavar=f"[{words.upper()}]... [KEY=VALUE]..." if words else "[KEY=VALUE]...",
                help="Settings, as an alternative to options.",
            ),
        ),
        _parameter(
            "config",
            list[Path] | None,
            typer.Option("--config", "-c", help="Settings file: YAML, JSON or .py; of several the later wins."),
        ),
        _parameter("preset", str | None, typer.Option("--preset", help=f"Named values: {', '.join(presets(name))}.")),
        _parameter("show_config", bool, typer.Option("--show-config", help="Print each value and its source."), False),
        _parameter(
            "save_config", Path | None, typer.Option("--save-config", help="Write the resolved settings, then leave.")
        ),
        *extra,
        *([_parameter("trust_remote_code", *get_args(TrustRemoteCode), False)] if loads else []),
        *_setting_parameters(stage),
    ]

    def command(**arguments: Any) -> None:
        layers = []
        if arguments["preset"]:
            layers.append(_preset_layer(name, arguments["preset"]))
        layers += [read_layer(path) for path in arguments["config"] or ()]
        layers.append(_command_line_layer(stage, arguments, words))
        extras = {parameter.name: arguments[parameter.name] for parameter in extra}
        if extras.get("resume"):
            layers.insert(0, resume_layer(extras["resume"], name))
        resolved = resolve(stage, *layers)
        print_warnings(resolved.warnings)
        if arguments["save_config"]:
            dump({"stage": name, **resolved.settings.model_dump(mode="json")}, arguments["save_config"])
        elif arguments["show_config"]:
            show_config(resolved)
        else:
            if extras.get("resume"):
                extras["resume"] = return_to_start(extras["resume"])
            execute(resolved, **extras)

    command.__name__ = name
    command.__doc__ = stage.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def option(name: str, annotation: Any, *flags: str, help: str, default: Any = None) -> inspect.Parameter:
    """Returns one typer option for `stage_command`'s `extra`."""
    return _parameter(name, annotation, typer.Option(*flags, help=help), default)


def setting_option(settings: type[Settings], name: str, *, panel: bool = True) -> Any:
    """Returns a setting as the annotated parameter of a command that is no stage: its type, help and panel."""
    setting = spellings_of(settings)[name]
    title = setting.owner.panel if panel else None
    return Annotated[setting.type, typer.Option(help=setting.help, metavar=_metavar(setting), rich_help_panel=title)]


def presets(stage: str) -> list[str]:
    """Returns the names of the presets shipped for a stage."""
    return sorted(path.stem for path in (recipe_folder() / stage).glob("*.yaml"))


def recipe_folder() -> Path:
    """Returns the folder of shipped recipes: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def resume_layer(resume: Path, stage: str) -> Layer:
    """Returns the settings that a run folder recorded, so that a resumed run needs only what changes.

    Args:
        resume: the run folder, or a checkpoint in it.
        stage: of the run.

    Raises:
        UserError: the folder is missing, is no run folder, or is another stage's.
    """
    from llmlab.runs.checkpoints import find_run
    from llmlab.runs.record import RECORD, started_in

    run, _ = find_run(resume)
    if not run.is_dir():
        raise UserError(f"--resume {resume}: there is no such run folder")
    if not (run / RECORD).is_file():
        raise UserError(f"--resume {resume}: this is no run folder of llmlab: it has no {RECORD}")
    layer = read_layer(run / RECORD)
    if layer.values.get("stage") != stage:
        raise UserError(f"--resume {resume}: this run is of stage '{layer.values.get('stage')}', not '{stage}'")
    started = started_in(run, layer.values)
    inside = started is not None and run.resolve().is_relative_to(started)
    output_dir = run.resolve().relative_to(started) if inside else os.path.abspath(run)
    return Layer(layer.label, {**layer.values["settings"], "output_dir": str(output_dir)}, path=layer.path)


def return_to_start(resume: Path) -> Path:
    """Moves to the folder that a run was started in, from which its relative paths count; returns the run's path."""
    from llmlab.runs.checkpoints import find_run
    from llmlab.runs.record import read_record, started_in

    run, _ = find_run(resume)
    started = started_in(run, read_record(run))
    if started in (None, Path.cwd()):
        return resume
    resume = Path(os.path.abspath(resume))
    os.chdir(started)
    typer.echo(f"note: relative paths count from {started}, where this run was started", err=True)
    return resume


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Prints warnings on standard error."""
    for warning in warnings:
        say(f"warning: {warning}", error=True, fg="yellow")


def show_config(resolved: Resolved[Any]) -> None:
    """Prints each setting, its value and its source as a table."""
    from rich.table import Table
    from rich.text import Text

    from llmlab.terminal import Terminal

    table = Table("setting", "value", "source", box=None, pad_edge=False)
    for key, value, source in resolved.rows():
        style = "dim" if source == "default" else "bold"
        table.add_row(key, Text(printable(value)), Text(printable(source)), style=style)  # brackets are no markup
    console = Terminal()
    if not console.is_terminal:
        console.width = 1000  # a pipe has no width: rows stay whole
    console.print(table)


def _preset_layer(stage: str, preset: str) -> Layer:
    if preset not in presets(stage):
        known = presets(stage)
        raise UserError(f"--preset {preset}: expected one of {', '.join(known)}{did_you_mean(preset, known)}")
    layer = read_layer(recipe_folder() / stage / f"{preset}.yaml")
    return Layer(f"preset {preset}", layer.values, path=layer.path)


def _command_line_layer(stage: type[Settings], arguments: dict[str, Any], words: str | None) -> Layer:
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}

    def add(key: str, value: Any) -> None:
        setting = spellings_of(stage).get(key)
        first = keys.setdefault(setting.key if setting else key, key)
        if first in values and values[first] != value:
            spelled = f"'{key}'" if first == key else f"'{key}' (as '{first}' too)"
            raise UserError(
                f"command line: {spelled} is given twice, as {show(values[first])} and {show(value)}; keep one"
            )
        values[first] = value

    for word in arguments["overrides"] or ():
        key, equals, text = word.partition("=")
        if not equals and words:
            values[words] = [*values.get(words, []), word]
            continue
        if not equals:
            raise UserError(f"command line: '{word}': expected key=value, such as lr=3e-4")
        add(key, _parse(spellings_of(stage).get(key), text, key))
    for setting in fields_of(stage):
        for spelling in setting.spellings:
            value = arguments.get(_identifier(spelling))
            if value is None or value == [] or spellings_of(stage)[spelling] is not setting:
                continue
            if _is_list(setting):
                add(spelling, [_parse(None, text, spelling) if text.startswith("{") else text for text in value])
            else:
                for text in value if isinstance(value, list) else [value]:
                    add(spelling, _parse(setting, text, spelling) if isinstance(text, str) else text)
    return Layer(COMMAND_LINE, values)


def _parse(setting: Setting | None, text: str, key: str) -> Any:
    if setting is not None and setting.type_name.removesuffix(" or none") == "text":
        return text
    if setting is not None and _is_list(setting) and not text.startswith(("[", "{")):
        return [text]
    return parse_scalar(text, key)


def _is_list(setting: Setting) -> bool:
    return setting.type_name.startswith("list of")


def _setting_parameters(stage: type[Settings]) -> list[inspect.Parameter]:
    parameters = []
    for setting in fields_of(stage):
        for spelling in setting.spellings:
            if spellings_of(stage)[spelling] is not setting:
                continue  # another setting has this name of its own
            parameters.append(_parameter(_identifier(spelling), *_option(setting, spelling)))
    return parameters


def _option(setting: Setting, spelling: str) -> tuple[Any, Any]:
    flag = "--" + spelling.replace("_", "-")
    is_flag = setting.type_name == "true | false"
    info = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_flag else flag,
        help=f"{setting.help} [dim]\\[{setting.shown_default}][/dim]",
        hidden=spelling != setting.name,
        metavar=None if is_flag else _metavar(setting),
        show_default=False,
        rich_help_panel=setting.owner.panel,
    )
    return (bool | None if is_flag else list[str] | None), info  # a list, to see what is given twice


def _metavar(setting: Setting) -> str:
    return setting.type_name.removesuffix(" or none").replace(" | ", "|").replace("list of ", "").upper()


def _identifier(spelling: str) -> str:
    return f"setting_{spelling}"


def _parameter(name: str, annotation: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )
