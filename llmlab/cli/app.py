"""The command line's root: which commands exist, loaded one at a time, and how errors end. Only the command that was
asked for is imported, so `llmlab --help` stays fast and free of torch."""

import gc
import logging
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby
from typing import Annotated, Any, NoReturn

import typer

from llmlab import __version__
from llmlab.settings import errors
from llmlab.settings.trust import remote_code
from llmlab.stages import STAGES

HIDDEN = {"menu": "app:open_menu", "run-job": "launch:run_job"}  # bare `llmlab`; what llmlab itself starts
LONGEST_ERROR = 400  # characters of one line
TIME_TO_END = 5  # seconds in which a launcher ends the processes beside one that failed

TRAIN, USE, PREPARE = "Train", "Use", "Prepare"
COMMANDS = {  # name: (panel, line of help, `module:name` in llmlab.cli); a stage needs its name alone
    **dict.fromkeys(("pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo", "rs-sft", "awr"), (TRAIN, "", "")),
    "run": (TRAIN, "Run a pipeline of stages from one YAML file.", "run:run"),
    "queue": (TRAIN, "Run pipelines one after the other; list those that wait.", "run:queue"),
    "plan": (TRAIN, "Plan a run: memory, steps, time, disk, and what would fit.", "plan:plan"),
    "tune": (TRAIN, "Find a learning rate by a range test.", "plan:tune"),
    "merge": (USE, "", ""),
    "runs": (USE, "List, show and compare run folders.", "runs:app"),
    "report": (USE, "Write the page of a run or pipeline again.", "runs:report"),
    "monitor": (USE, "Watch the runs in a folder while they train.", "runs:monitor"),
    "advise": (USE, "Say what a run's metrics show, and what to change.", "runs:advise"),
    "evaluate": (USE, "Score answers: thresholds, regressions, public benchmarks.", "evaluate:evaluate"),
    "chat": (USE, "Chat with a model in the terminal.", "chat:chat"),
    "generate": (USE, "Complete prompts from the command line or a file.", "chat:generate"),
    "episodes": (USE, "Play a model in an environment with tools.", "evaluate:episodes_app"),
    "model": (PREPARE, "Inspect, initialize and convert models.", "model:app"),
    "data": (PREPARE, "Check data sources, preview rows as tokens, sample pairs.", "data:app"),
    "tokenizer": (PREPARE, "Train a tokenizer.", ""),
    "reward-check": (PREPARE, "Score completions with rewards before training.", "rewards:reward_check"),
    "doctor": (PREPARE, "Try what this machine can do: devices, versions, folders.", "doctor:doctor"),
    "schema": (PREPARE, "Print the JSON Schema of a stage's settings, for editors.", "options:schema"),
}
COMMANDS = {name: (panel, line or STAGES[name].help, path) for name, (panel, line, path) in COMMANDS.items()}


def build_app(requested: str | None) -> typer.Typer:
    """Returns the app with the requested command imported and the others as names with a line of help."""
    app = typer.Typer(
        name="llmlab",
        help="From an architecture to a model you can chat with: pretrain, fine-tune, align, chat.",
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, (panel, line, path) in COMMANDS.items():
        target = _load(name, path) if name == requested else lambda: None  # in the list of commands alone
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=line, rich_help_panel=panel)
        else:
            words = {word: getattr(target, word, None) for word in ("context_settings", "cls")}
            app.command(name, help=target.__doc__ or line, rich_help_panel=panel, **words)(target)
    if requested in HIDDEN:
        app.command(requested, hidden=True)(_load(requested, HIDDEN[requested]))
    return app


def _load(name: str, path: str) -> Any:
    """Imports a command's function or app, or makes the command of a stage."""
    if not path:
        from llmlab.cli.options import PlainHelp, stage_command

        if name != "tokenizer":
            return stage_command(name)
        group = typer.Typer(no_args_is_help=True)
        group.command("train", cls=PlainHelp)(stage_command(name))
        return group
    module, _, attribute = path.partition(":")
    return getattr(import_module(f"llmlab.cli.{module}"), attribute)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"llmlab {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        open_menu()


def open_menu() -> None:
    """Open the menu; without a terminal, list the commands on one screen of 80 x 24."""
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        from llmlab.cli.menu import menu

        return menu()
    for panel, commands in groupby(COMMANDS.items(), key=lambda command: command[1][0]):
        for number, (name, (_, line, _)) in enumerate(commands):
            typer.echo(f"{'' if number else panel:8}{name:13}{line}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends with one sentence on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_libraries()
    for number, word in enumerate(arguments, start=1):
        if "\0" in word or not errors.is_unicode(word):
            _end(f"command line: argument {number}, '{word}': this is not UTF-8 text")
    requested = next((word for word in arguments if not word.startswith("-")), None)
    try:
        with remote_code(False):  # until the command's own option says otherwise
            app = build_app(requested)
            gc.freeze()  # no collection looks at what was imported
            gc.enable()
            app(args=arguments, prog_name="llmlab", obj=arguments)
    except errors.OfMainProcess as error:
        raise SystemExit(error.exit_code) from None
    except errors.UserError as error:
        if not errors.is_first_process():  # most often the first one says the same, and its launcher ends this one
            time.sleep(TIME_TO_END)
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        if errors.is_first_process():
            print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # the last resort: a mistake of ours in one line, the traceback in a log
        if isinstance(error, OSError) and error.filename is not None:  # of the file system, which is no bug
            _end(f"{os.fsdecode(error.filename)}: {errors.reason_of(error)}")
        if errors.is_out_of_memory(error):
            _end(f"out of memory: {errors.reason_of(error)}")
        print(f"error: {errors.reason_of(error)}; this is a fault of llmlab: {_write_log(arguments)}", file=sys.stderr)
        raise SystemExit(1) from None


def _quiet_libraries() -> None:
    """Silences the messages of other packages, and their progress bars where the output is no terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports each kernel that a CPU lacks
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    if sys.stderr is None or not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")


def _end(problems: str, exit_code: int = 2) -> NoReturn:
    """Prints problems, one a line, and ends."""
    for line in map(errors.printable, problems.split("\n")):
        cut = f"{line[:LONGEST_ERROR]} ... {line[-200:]}"  # somebody's whole file, given as a name
        print(f"error: {cut if len(line) > LONGEST_ERROR else line}", file=sys.stderr)
    raise SystemExit(exit_code) from None


def _write_log(arguments: Sequence[str]) -> str:
    """Writes the traceback of the present exception into a log, and returns a request to report it."""
    text = f"llmlab {__version__}: {shlex.join(arguments)}\n\n{traceback.format_exc()}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="llmlab-error-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(text)
    except OSError as error:
        return f"no log could be written ({error.strerror})"
    return f"please report it with {path}"
