"""`llmlab tokenizer train` and `llmlab tokenizer show`: train a tokenizer, and see the tokens of a text."""

from typing import Annotated

from typer import Argument, Typer

from llmlab.cli.arguments import TrustRemoteCode
from llmlab.cli.options import PlainHelp, stage_command
from llmlab.settings.errors import printable

app = Typer(no_args_is_help=True)
app.command("train", cls=PlainHelp)(stage_command("tokenizer"))


@app.command()
def show(
    tokenizer: Annotated[str, Argument(help="Hub id, folder or tokenizer.json.")],
    text: Annotated[str, Argument(help="Text to tokenize.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the tokens of a text, their ids, and the bytes per token."""
    from rich.text import Text

    from llmlab.data.tokenizer import load_tokenizer
    from llmlab.terminal import Terminal

    loaded = load_tokenizer(tokenizer)
    ids = loaded.encode(text, add_special_tokens=False)
    pieces = Text()
    for number, token in enumerate(ids):
        pieces.append(printable(loaded.decode([token])), style="black on cyan" if number % 2 else "black on green")
    console = Terminal()
    console.print(pieces, soft_wrap=True)
    console.print(" ".join(map(str, ids)), soft_wrap=True, style="dim")
    per_token = len(text.encode()) / max(len(ids), 1)
    console.print(f"{len(ids)} tokens of {len(loaded):,} entries, {per_token:.2f} bytes per token")
