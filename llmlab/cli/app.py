"""The command line's root: which commands exist, loaded one at a time, and how errors end.

Only the command that was asked for is imported, so `llmlab --help` stays fast and free of torch.
"""

import logging
import os
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from llmlab import __version__
from llmlab.settings.errors import OfMainProcess, UserError, is_unicode, printable, reason_of
from llmlab.settings.trust import remote_code

LONGEST_ERROR = 400  # characters of one line
OUT_OF_MEMORY = ("you tried to allocate", "out of memory")  # torch's words

# name: (module, what `build` or the function is called, one line of help, panel)
COMMANDS = {
    "pretrain": ("llmlab.cli.train:pretrain", "Train a decoder from nothing, or further, on plain text.", "Train"),
    "sft": ("llmlab.cli.train:sft", "Fine-tune on instructions and conversations, whole or with LoRA.", "Train"),
    "dpo": ("llmlab.cli.train:dpo", "Make a model prefer the better of two answers.", "Train"),
    "orpo": ("llmlab.cli.train:orpo", "Fine-tune and prefer at once, without a reference model.", "Train"),
    "reward": ("llmlab.cli.train:reward", "Train a model that scores answers.", "Train"),
    "grpo": ("llmlab.cli.train:grpo", "Sample groups of completions, and make the better ones likelier.", "Train"),
    "ppo": ("llmlab.cli.train:ppo", "Learn from rewards with a value function, held to a reference.", "Train"),
    "run": ("llmlab.cli.run:run", "Run a pipeline of stages from one YAML file.", "Train"),
    "merge": ("llmlab.cli.merge:merge", "Fold LoRA adapters into their base model.", "Use"),
    "runs": ("llmlab.cli.runs:app", "List, show and compare run folders.", "Use"),
    "chat": ("llmlab.cli.chat:chat", "Talk to a model, reply by reply.", "Use"),
    "generate": ("llmlab.cli.chat:generate", "Complete prompts from the command line or a file.", "Use"),
    "model": ("llmlab.cli.model:app", "Look at architectures, and write untrained ones.", "Prepare"),
    "data": ("llmlab.cli.data:app", "Check data sources, and see rows as the model will.", "Prepare"),
    "tokenizer": ("llmlab.cli.tokenizer:app", "Train a tokenizer, or look at one.", "Prepare"),
    "reward-check": ("llmlab.cli.rewards:reward_check", "Score completions with rewards before training.", "Prepare"),
    "schema": ("llmlab.cli.schema:schema", "Print the JSON Schema of a stage's settings, for editors.", "Prepare"),
}


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
    for name, (path, help_line, panel) in COMMANDS.items():
        target: Any = _placeholder
        if name == requested:
            module, _, attribute = path.partition(":")
            target = getattr(import_module(module), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=help_line, rich_help_panel=panel)
        else:
            app.command(name, help=_help_of(target, help_line), rich_help_panel=panel)(target)
    return app


def _help_of(target: Any, help_line: str) -> str:
    return help_line if target is _placeholder else (target.__doc__ or help_line)


def _placeholder() -> None:
    """Stands in the list of commands for one that was not asked for."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmlab {__version__}")
        raise typer.Exit()


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is not None:
        return
    typer.echo("llmlab: from an architecture to a model you can chat with (llmlab COMMAND -h)")
    panel = ""
    for name, (_, line, group) in COMMANDS.items():  # in the order of the table; what one screen of 80 x 24 holds
        if group != panel:
            typer.echo(f"{group}:")
        panel = group
        typer.echo(f" {name:13}{line}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends with one sentence on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_libraries()
    for number, word in enumerate(arguments, start=1):
        if "\0" in word or not is_unicode(word):
            _print_error(f"command line: argument {number}, '{word}': this is not UTF-8 text")
            raise SystemExit(2)
    requested = next((word for word in arguments if not word.startswith("-")), None)
    try:
        with remote_code(False):  # until the command's own option says otherwise
            build_app(requested)(args=arguments, prog_name="llmlab")
    except OfMainProcess as error:
        raise SystemExit(error.exit_code) from None
    except UserError as error:
        for line in str(error).split("\n"):
            _print_error(line)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # the last resort: a mistake of ours, told in one line, with the place of the rest
        if limit := _limit_of_the_machine(error):
            _print_error(limit)
            raise SystemExit(2) from None
        print(f"error: {reason_of(error)}; this is a fault of llmlab: {_write_log(arguments)}", file=sys.stderr)
        raise SystemExit(1) from None


def _quiet_libraries() -> None:
    """Keeps what other packages have to say off the screen, and their bars out of pipes and files."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports each kernel that a CPU lacks
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    if sys.stderr is None or not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")


def _print_error(line: str) -> None:
    line = printable(line)
    if len(line) > LONGEST_ERROR:  # somebody's whole file, given as a name
        line = f"{line[:LONGEST_ERROR]} ... {line[-200:]}"
    print(f"error: {line}", file=sys.stderr)


def _limit_of_the_machine(error: Exception) -> str:
    """Returns what stands in the way of a file or of memory, which is no mistake of ours; else an empty text."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason_of(error)}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return f"out of memory: {reason_of(error)}"
    return ""


def _write_log(arguments: Sequence[str]) -> str:
    """Writes the traceback of the present exception into a log and says where it is."""
    text = f"llmlab {__version__}: {shlex.join(arguments)}\n\n{traceback.format_exc()}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="llmlab-error-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(text)
    except OSError as error:
        return f"no log could be written ({error.strerror})"
    return f"please report it with {path}"
