"""Turns a stage into a typer command: one option a setting, and trailing `key=value` for the same keys. Values stay
text until the settings validate them, so that a file, the command line and a notebook get the same errors. `llmlab
schema` prints the same for editors, so that they complete and check recipes."""

import inspect
import json
import os
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option, echo
from typer.core import TyperCommand

from llmlab.cli.arguments import TrustRemoteCode
from llmlab.cli.launch import Accelerate, LaunchArgs, NumProcesses, PrintLaunch, read_launch, without_launch_options
from llmlab.settings.base import Setting, Settings, Trl, When, fields_of, show, spellings_of
from llmlab.settings.errors import LAUNCHED, UserError, did_you_mean, is_first_process
from llmlab.settings.files import Layer, dump, parse_scalar, read_layer
from llmlab.settings.presets import HARDWARE_PRESETS, for_stage, presets, read_preset
from llmlab.settings.sources import Resolved, resolve
from llmlab.stages import STAGES


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


OF_TRAINING = (
    *("preset", "hardware", "resume", "load_optimizer", "allow_changed_data"),
    *("accelerate", "num_processes", "launch_args", "print_launch"),
)
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
    files = "Settings file: YAML, JSON or .py; of several the later wins."
    state = "With --resume: restore the optimizer's state, or only weights and step count."
    changed = "With --resume: accept data files that have changed since."
    Words = Annotated[list[str] | None, Argument(metavar=usage, help="Settings, as an alternative to options.")]
    machines = f"A machine's values for what nothing else sets: {', '.join(['auto', *HARDWARE_PRESETS])}."

    def command(
        *,
        context: Context,
        overrides: Words = None,
        config: Annotated[list[Path] | None, Option("--config", "-c", help=files)] = None,
        preset: Annotated[str | None, Option(help=named)] = None,
        hardware: Annotated[str | None, Option(help=machines)] = None,
        show_config: Annotated[bool, Option("--show-config", help="Print each value and its source.")] = False,
        save_config: Annotated[Path | None, Option(help="Write the resolved settings to a file, and exit.")] = None,
        resume: Annotated[Path | None, Option(help="Resume a run from its last checkpoint, or from one.")] = None,
        load_optimizer: Annotated[bool, Option(help=state)] = True,
        allow_changed_data: Annotated[bool, Option("--allow-changed-data", help=changed)] = False,
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
        layers.append(command_line_layer(kind, overrides or [], options, positional))
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
            echo(shlex.join(["accelerate", "launch", *words]))
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

    absent = {"options"} if stage.resumes else {"options", *OF_TRAINING}
    absent |= {"trust_remote_code"} if name == "tokenizer" else set()  # it reads text alone
    parameters = [each for each in inspect.signature(command).parameters.values() if each.name not in absent]
    table = spellings_of(kind)
    for setting in fields_of(kind):
        for spelling in (word for word in setting.spellings if table[word] is setting):  # no other setting's own name
            parameters.append(_parameter(spelling, _option(setting, spelling, kind)))
    command.cls = PlainHelp  # type: ignore[attr-defined]
    command.__name__ = name
    command.__doc__ = stage.help
    return _sign(command, parameters)


def setting_option(settings: type[Settings], name: str, *, panel: bool = True) -> Any:
    """Returns a setting as the annotated parameter of a command that is no stage: its type, help and panel."""
    setting = spellings_of(settings)[name]
    title = setting.owner.panel if panel else None
    return Annotated[setting.type, Option(help=setting.help, metavar=_metavar(setting), rich_help_panel=title)]


def with_settings(kind: type[Settings], *names: str, **defaults: Any) -> Callable[[Callable[..., None]], Any]:
    """Adds settings of a class (these, or all) as options to a command that is no stage, with `defaults` where those
    of the class do not fit; the command gets them validated, as its argument `settings`."""
    chosen = [setting for setting in fields_of(kind) if setting.name in (names or kind.model_fields)]

    def add(command: Callable[..., None]) -> Any:
        @wraps(command)
        def call(**arguments: Any) -> None:
            values = {setting.name: arguments.pop(setting.name) for setting in chosen}
            command(**arguments, settings=resolve(kind, Layer("command line", values)).settings)

        own = [each for each in inspect.signature(command).parameters.values() if each.name != "settings"]
        values = {setting.name: setting.default for setting in chosen} | defaults
        return _sign(call, own + [_parameter(name, setting_option(kind, name), values[name]) for name in values])

    return add


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _sign(command: Any, parameters: list[inspect.Parameter]) -> Any:
    """Gives a command the parameters that typer is to see."""
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


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
    from llmlab.terminal import say  # not for help

    if is_first_process() and LAUNCHED not in os.environ:
        say(line, error=True, **style)


def print_config(resolved: Resolved[Any]) -> None:
    """Prints each setting, its value and its source as a table."""
    from rich.table import Column

    from llmlab.terminal import Terminal, safe  # not for help

    rows = []
    for setting in fields_of(type(resolved.settings)):
        value, source = show(setting.of(resolved.settings)), resolved.sources[setting.key]
        style = "dim" if source == "default" else "bold"
        rows.append([f"[{style}]{safe(text)}[/]" for text in (setting.key, value, source)])
    columns = ("setting", Column("value", overflow="fold"), Column("source", overflow="fold"))
    Terminal(whole_rows=True).table(columns, rows)


def command_line_layer(
    kind: type[Settings], overrides: list[str], options: dict[str, Any] | None = None, positional: str | None = None
) -> Layer:
    """Returns what options and key=value words set; two different values of one setting are an error."""
    table, values = spellings_of(kind), {}
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
    for spelling, found in (options or {}).items():
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


def _option(setting: Setting, spelling: str, kind: type[Settings]) -> Any:
    """Returns the option of one spelling, as an annotation, its help with bounds, condition, default and TRL field;
    only that of a setting's own name is in the help."""
    from llmlab.settings.training import TrainingSettings  # not for commands that train nothing

    trl, condition = setting.marker(Trl), setting.marker(When)
    facts = [
        setting.bounds,
        f"only when {condition}" if condition else "",
        f"default: {setting.shown_default}",
        f"TRL: {trl.name}" if trl and issubclass(kind, TrainingSettings) else "",
    ]
    flag = spelling.replace("_", "-")
    is_flag = setting.type_name == "true | false"
    flags = [f"--{flag}/--no-{flag}" if is_flag else f"--{flag}"]
    if spelling == "output_dir":
        flags.append("-o")
    info = Option(
        *flags,
        help=f"{setting.help} [{'; '.join(filter(None, facts))}]",
        hidden=spelling != setting.name,
        metavar=None if is_flag else _metavar(setting),
        show_default=False,
        rich_help_panel=setting.owner.panel,
    )
    return Annotated[bool | None if is_flag else list[str] | None, info]  # a list, to see what is given twice


def _metavar(setting: Setting) -> str:
    return setting.type_name.removesuffix(" or none").replace(" | ", "|").replace("list of ", "").upper()


def schema(stage: Annotated[str, Argument(help=f"One of: {', '.join(STAGES)}.")]) -> None:
    """Print the JSON Schema of a stage's settings, for editors that complete recipes."""
    if stage not in STAGES:
        raise UserError(f"unknown stage '{stage}': expected one of {', '.join(STAGES)}{did_you_mean(stage, STAGES)}")
    kind = STAGES[stage].settings_class
    found = kind.model_json_schema()
    properties = found["properties"]
    for setting in fields_of(kind):
        home = properties
        if len(setting.path) > 1:  # a field of a nested group is also accepted beside the group
            group = properties[setting.path[0]]
            reference = group["$ref"] if "$ref" in group else group["anyOf"][0]["$ref"]
            home = found["$defs"][reference.rsplit("/", 1)[1]]["properties"]
            file = {"type": "string", "description": "A settings file."}
            properties[setting.path[0]] = {"anyOf": [{"$ref": reference}, file]}
        own = {key: value for key, value in home[setting.name].items() if key != "title"}
        if own.get("type") == "array":
            own = {"anyOf": [own, own["items"]]}
        own["description"] = setting.help
        for spelling in setting.spellings:  # every accepted one is a property
            if spellings_of(kind)[spelling] is setting:
                properties[spelling] = own
    properties["stage"] = {"const": stage, "description": "The stage this recipe is for."}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    echo(json.dumps({**head, **found, "title": f"llmlab {stage}"}, indent=2))
