"""Turns a settings class into a typer command: one option a setting, and trailing `key=value` for the same keys.

Values stay text until the settings validate them, so a file, the command line and a notebook get the same errors.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmlab.settings.base import Setting, Settings, fields_of, spellings_of
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.files import Layer, dump, parse_scalar, read_layer
from llmlab.settings.sources import Resolved, resolve

COMMAND_LINE = "command line"


def stage_command(
    name: str, stage: type[Settings], execute: Callable[..., Any], *extra: inspect.Parameter, words: str | None = None
) -> Callable[..., None]:
    """Returns a typer command that resolves a stage's settings and calls `execute(resolved, **extra)`.

    Args:
        name: the stage, under which presets are looked up (`recipes/<name>/<preset>.yaml`).
        stage: the settings class whose fields become options.
        execute: what to do with the resolved settings.
        extra: further typer parameters that are not settings, such as `--resume`.
        words: the list setting that arguments without `=` are entries of, such as `datasets`.
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
        _parameter("config", Path | None, typer.Option("--config", "-c", help="Settings file: YAML, JSON or .py.")),
        _parameter("preset", str | None, typer.Option("--preset", help=f"Named values: {', '.join(presets(name))}.")),
        _parameter("show_config", bool, typer.Option("--show-config", help="Print each value and its source."), False),
        _parameter(
            "save_config", Path | None, typer.Option("--save-config", help="Write the resolved settings, then leave.")
        ),
        *extra,
        *_setting_parameters(stage),
    ]

    def command(**arguments: Any) -> None:
        layers = []
        if arguments["preset"]:
            layers.append(_preset_layer(name, arguments["preset"]))
        if arguments["config"]:
            layers.append(read_layer(arguments["config"]))
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
            execute(resolved, **extras)

    command.__name__ = name
    command.__doc__ = stage.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def option(name: str, annotation: Any, *flags: str, help: str, default: Any = None) -> inspect.Parameter:
    """Returns one typer option for `stage_command`'s `extra`."""
    return _parameter(name, annotation, typer.Option(*flags, help=help), default)


def presets(stage: str) -> list[str]:
    """Returns the names of the presets shipped for a stage."""
    return sorted(path.stem for path in (recipe_folder() / stage).glob("*.yaml"))


def recipe_folder() -> Path:
    """Returns the folder of shipped recipes: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def resume_layer(run: Path, stage: str) -> Layer:
    """Returns the settings that a run folder recorded, so that a resumed run needs only what changes.

    Raises:
        UserError: the folder is missing, is no run folder, or is another stage's.
    """
    record = Path(run) / "llmlab.json"
    if not Path(run).is_dir():
        raise UserError(f"--resume {run}: there is no such run folder")
    if not record.is_file():
        raise UserError(f"--resume {run}: this is no run folder of llmlab: it has no llmlab.json")
    layer = read_layer(record)
    if layer.values.get("stage") != stage:
        raise UserError(f"--resume {run}: this run is of stage '{layer.values.get('stage')}', not '{stage}'")
    return Layer(layer.label, {**layer.values["settings"], "output_dir": str(run)}, path=layer.path)


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Prints warnings on standard error."""
    for warning in warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)


def show_config(resolved: Resolved[Any]) -> None:
    """Prints each setting, its value and its source as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "source", box=None, pad_edge=False)
    for key, value, source in resolved.rows():
        style = "dim" if source == "default" else "bold"
        table.add_row(key, Text(value), source, style=style)  # a list's brackets are no markup
    console = Console()
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
    for word in arguments["overrides"] or ():
        key, equals, text = word.partition("=")
        if not equals and words:
            values[words] = [*values.get(words, []), word]
            continue
        if not equals:
            raise UserError(f"command line: '{word}': expected key=value, such as lr=3e-4")
        if key in values:
            raise UserError(f"command line: '{key}' is given twice; keep one")
        values[key] = _parse(spellings_of(stage).get(key), text, key)
    for setting in fields_of(stage):
        for spelling in setting.spellings:
            value = arguments.get(_identifier(spelling))
            if value is None or value == [] or spellings_of(stage)[spelling] is not setting:
                continue
            if setting.key in values or any(other in values for other in setting.spellings):
                raise UserError(f"command line: '{spelling}' is given twice; keep one")
            if isinstance(value, list):
                value = [_parse(None, text, spelling) if text.startswith("{") else text for text in value]
            values[spelling] = _parse(setting, value, spelling) if isinstance(value, str) else value
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
    annotation = bool | None if is_flag else (list[str] | None if _is_list(setting) else str | None)
    return annotation, info


def _metavar(setting: Setting) -> str:
    return setting.type_name.removesuffix(" or none").replace(" | ", "|").replace("list of ", "").upper()


def _identifier(spelling: str) -> str:
    return f"setting_{spelling}"


def _parameter(name: str, annotation: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )
