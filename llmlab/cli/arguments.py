"""Options and arguments of several commands, without heavy imports; those of settings are made in `options.py`."""

from typing import Annotated

from typer import Argument, Option

from llmlab.settings.trust import allow_remote_code

TRUST_HELP = "Run Python code that a model or tokenizer brings along; read it first."
TrustRemoteCode = Annotated[bool, Option("--trust-remote-code", help=TRUST_HELP, callback=allow_remote_code)]
AllowCode = Annotated[bool, Option("--allow-code", help="Run reward functions from files (file.py:function).")]
AsJson = Annotated[bool, Option("--json", help="Print JSON for other programs.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace files that exist.")]
Run = Annotated[str, Argument(metavar="RUN", help="Run folder, adapter folder or hub id.", show_default=False)]
Seed = Annotated[int, Option(help="Random seed.", min=0, max=2**32 - 1, metavar="INT")]  # NumPy's largest
