"""`llmlab tokenizer train`: train a tokenizer."""

from typer import Typer

from llmlab.cli.options import PlainHelp, stage_command

app = Typer(no_args_is_help=True)
app.command("train", cls=PlainHelp)(stage_command("tokenizer"))
