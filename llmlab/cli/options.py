"""Turns a stage into a typer command: one option a setting, and trailing `key=value` for the same keys. Values stay
text until the settings validate them, so that a file, the command line and a notebook get the same errors."""

import inspect
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from llmlab.cli.launch import Accelerate, LaunchArgs, NumProcesses, PrintLaunch, read_launch, without_launch_options
from llmlab.settings.base import Setting, Settings, Trl, When, fields_of, show, spellings_of
from llmlab.settings.errors import LAUNCHED, UserError, is_first_process
from llmlab.settings.files import Layer, dump, parse_scalar, read_layer
from llmlab.settings.presets import SECTIONS, for_stage, hardware_presets, presets, read_preset
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import allow_remote_code
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, make_table, safe, say

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model or tokenizer brings along; read it first.",
        callback=allow_remote_code,
    ),
]


class PlainHelp(TyperCommand):
    """A command whose help lists its many options without boxes, which take twice the time of all the rest."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                title = parameter.rich_help_panel or f"{parameter.param_type_name}s".capitalize()
                names, text = record
                if len(names) > formatter.width - 2:  # many choices, which are not wrapped there
                    names, _, choices = names.partition(" ")
                    text = f"{choices.replace('|', ' | ')}: {text}"
                panels.setdefault(title, []).append((names, text))
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


POSITIONAL = {"merge": "adapter", "tokenizer": "datasets"}  # the setting that arguments without `=` are entries of


def stage_command(
    name: str, use: Callable[[Resolved[Any]], None] | None = None, processes: int | None = None
) -> Callable[..., None]:
    """Returns the typer command of a stage: its settings as options, and what every stage can do. With `use`, its
    settings for so many `processes` (None: as many as the hardware preset has) go there, and nothing runs."""
    stage = STAGES[name]
    kind = stage.settings_class
    positional = POSITIONAL.get(name)
    usage = (f"[{positional.upper()}]... " if positional else "") + "[KEY=VALUE]..."
    named = f"Named values: {', '.join(presets(name))}."
    machines = f"A machine's values for what nothing else sets: {', '.join(['auto', *hardware_presets()])}."

    def command(
        *,
        context: typer.Context,
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar=usage, help="Settings, as an alternative to options.")
        ] = None,
        config: Annotated[
            list[Path] | None,
            typer.Option("--config", "-c", help="Settings file: YAML, JSON or .py; of several the later wins."),
        ] = None,
        preset: Annotated[str | None, typer.Option(help=named)] = None,
        hardware: Annotated[str | None, typer.Option(help=machines)] = None,
        show_config: Annotated[bool, typer.Option("--show-config", help="Print each value and its source.")] = False,
        save_config: Annotated[
            Path | None, typer.Option(help="Write the resolved settings to a file instead of running.")
        ] = None,
        resume: Annotated[
            Path | None, typer.Option(help="Resume this run folder from its last checkpoint, or this checkpoint.")
        ] = None,
        load_optimizer: Annotated[
            bool, typer.Option(help="With --resume: restore the optimizer's state, or only weights and step count.")
        ] = True,
        allow_changed_data: Annotated[
            bool,
            typer.Option("--allow-changed-data", help="With --resume: accept data files that have changed since."),
        ] = False,
        trust_remote_code: TrustRemoteCode = False,
        accelerate: Accelerate = None,
        num_processes: NumProcesses = None,
        launch_args: LaunchArgs = "",
        print_launch: PrintLaunch = False,
        **options: Any,
    ) -> None:
        launch = read_launch(accelerate, num_processes, launch_args, print_launch=print_launch)
        below = [] if preset is None else [read_preset(name, preset)]
        layers = [for_stage(read_layer(path), name) for path in config or ()]
        layers.append(_command_line_layer(kind, overrides or [], options, positional))
        started = None
        if resume is not None:
            if hardware is not None:
                keeps = "a resumed run keeps its settings; leave it out, or set single ones"
                raise UserError(f"--hardware {hardware}: {keeps}")
            recorded, started = _read_run(resume, name)
            below.insert(0, recorded)
        if hardware is None or use is not None:
            count = processes
        elif launch is not None:
            count = launch.processes
        else:
            count = None if show_config or save_config is not None else 1
        resolved = stage.resolve(layers, below=below, hardware=hardware, processes=count)
        print_warnings(resolved.warnings)
        if save_config is not None:
            dump({"stage": name, **resolved.settings.recorded()}, save_config)
        elif show_config:
            print_config(resolved)
        elif use is not None:
            use(resolved)
        elif launch is not None and print_launch:
            words, _ = launch.command(without_launch_options(context.obj), resolved.settings.device, here=False)
            typer.echo(shlex.join(["accelerate", "launch", *words]))
        else:
            here = Path.cwd()
            if resume is not None and started not in (None, here):
                resume = Path(os.path.abspath(resume))
                os.chdir(started)
                print_note(f"note: relative paths count from {started}, where this run was started")
            stage.check(resolved, resumed=resume is not None)
            if launch is not None:
                os.chdir(here)
                return launch.run(without_launch_options(context.obj), resolved.settings.device)
            resuming = {"load_optimizer": load_optimizer, "allow_changed_data": allow_changed_data, "resume": resume}
            stage.function(resolved, **(resuming if stage.resumes else {}))

    absent = {"options"}
    if not stage.resumes:
        absent |= {"resume", "load_optimizer", "allow_changed_data"}
        absent |= {"accelerate", "num_processes", "launch_args", "print_launch"}
    absent |= {"trust_remote_code"} if name == "tokenizer" else set()  # it reads text alone
    absent |= set() if name in SECTIONS else {"preset", "hardware"}
    fixed = [parameter for parameter in inspect.signature(command).parameters.values() if parameter.name not in absent]
    parameters = fixed + [
        inspect.Parameter(
            spelling, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(setting, spelling, kind)
        )
        for setting, spelling in _spellings(kind)
    ]
    command.cls = PlainHelp  # type: ignore[attr-defined]
    command.__name__ = name
    command.__doc__ = stage.help
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def setting_option(settings: type[Settings], name: str, *, panel: bool = True) -> Any:
    """Returns a setting as the annotated parameter of a command that is no stage: its type, help and panel."""
    setting = spellings_of(settings)[name]
    title = setting.owner.panel if panel else None
    return Annotated[setting.type, typer.Option(help=setting.help, metavar=_metavar(setting), rich_help_panel=title)]


def _read_run(resume: Path, stage: str) -> tuple[Layer, Path | None]:
    """Returns the settings that a run folder recorded, and the folder from which its relative paths count."""
    from llmlab.runs.checkpoints import find_run
    from llmlab.runs.history import open_run
    from llmlab.runs.record import RECORD, started_in

    folder = find_run(resume)[0]
    try:
        run = open_run(folder)
    except UserError as error:
        raise UserError(f"--resume {error}") from None
    if run.stage != stage:
        raise UserError(f"--resume {resume}: this run is of stage '{run.stage}', not '{stage}'")
    started = started_in(folder, run.record)
    inside = started is not None and folder.resolve().is_relative_to(started)
    output_dir = folder.resolve().relative_to(started) if inside else os.path.abspath(folder)
    values = {**run.record.get("settings", {}), "output_dir": str(output_dir)}
    return Layer(str(folder / RECORD), values, path=folder / RECORD), started


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Prints warnings on standard error."""
    for warning in warnings:
        print_note(f"warning: {warning}", fg="yellow")


def print_note(line: str, **style: Any) -> None:
    """Prints a line on standard error, once in a run of several processes."""
    if is_first_process() and LAUNCHED not in os.environ:
        say(line, error=True, **style)


def print_config(resolved: Resolved[Any]) -> None:
    """Prints each setting, its value and its source as a table."""
    from rich.table import Column

    table = make_table("setting", Column("value", overflow="fold"), Column("source", overflow="fold"))
    for setting in fields_of(type(resolved.settings)):
        value, source = show(setting.of(resolved.settings)), resolved.sources[setting.key]
        table.add_row(setting.key, safe(value), safe(source), style="dim" if source == "default" else "bold")
    Terminal(whole_rows=True).print(table)


def _command_line_layer(
    kind: type[Settings], overrides: list[str], options: dict[str, Any], positional: str | None
) -> Layer:
    """Returns what options and key=value words set; two different values of one setting are an error."""
    table = spellings_of(kind)
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}

    def add(key: str, value: Any) -> None:
        first = keys.setdefault(table[key].key if key in table else key, key)
        if first in values and values[first] != value:
            spelled = f"'{key}'" if first == key else f"'{key}' (as '{first}' too)"
            both = f"{show(values[first])} and {show(value)}"
            raise UserError(f"command line: {spelled} is given twice, as {both}; keep one")
        values[first] = value

    for word in overrides:
        key, equals, text = word.partition("=")
        if equals:
            add(key, parse_value(table.get(key), text, key))
        elif positional:
            values[positional] = [*values.get(positional, []), word]
        else:
            raise UserError(f"command line: '{word}': expected key=value, such as lr=3e-4")
    for spelling, found in options.items():
        if _is_list(table[spelling]) and found:
            add(spelling, [parse_scalar(text, spelling) if text.startswith("{") else text for text in found])
            continue
        for value in found if isinstance(found, list) else [] if found is None else [found]:
            add(spelling, parse_value(table[spelling], value, spelling) if isinstance(value, str) else value)
    return Layer("command line", values)


def parse_value(setting: Setting | None, text: str, key: str) -> Any:
    """Returns what a text of the command line means for a setting: YAML, but for text and lists of it."""
    if setting is not None and setting.type_name.removesuffix(" or none") == "text":
        return text
    if setting is not None and _is_list(setting) and not text.startswith(("[", "{")):
        return [text]
    return parse_scalar(text, key)


def _is_list(setting: Setting) -> bool:
    return setting.type_name.startswith("list of")


def _spellings(kind: type[Settings]) -> list[tuple[Setting, str]]:
    """Returns each setting with each of its spellings, but for those that are another setting's own name."""
    table = spellings_of(kind)
    return [(s, spelling) for s in fields_of(kind) for spelling in s.spellings if table[spelling] is s]


def _option(setting: Setting, spelling: str, kind: type[Settings]) -> Any:
    """Returns the option of one spelling, as an annotation; only that of a setting's own name is in the help."""
    from llmlab.settings.training import TrainingSettings  # not for commands that train nothing

    flag = spelling.replace("_", "-")
    is_flag = setting.type_name == "true | false"
    flags = [f"--{flag}/--no-{flag}" if is_flag else f"--{flag}"]
    if spelling == "output_dir":
        flags.append("-o")
    info = typer.Option(
        *flags,
        help=_describe(setting, trains=issubclass(kind, TrainingSettings)),
        hidden=spelling != setting.name,
        metavar=None if is_flag else _metavar(setting),
        show_default=False,
        rich_help_panel=setting.owner.panel,
    )
    return Annotated[bool | None if is_flag else list[str] | None, info]  # a list, to see what is given twice


def _describe(setting: Setting, *, trains: bool) -> str:
    """Returns a setting's help with its bounds, condition, default and TRL field."""
    trl, condition = setting.marker(Trl), setting.marker(When)
    facts = [
        setting.bounds,
        f"only when {condition}" if condition else "",
        f"default: {setting.shown_default}",
        f"TRL: {trl.name}" if trl and trains else "",
    ]
    return f"{setting.help} [{'; '.join(filter(None, facts))}]"


def _metavar(setting: Setting) -> str:
    return setting.type_name.removesuffix(" or none").replace(" | ", "|").replace("list of ", "").upper()
