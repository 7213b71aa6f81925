"""Where llmlab prints: text of data, records, models and templates is shown, and never steers the terminal.

Every console is made here. Markup is llmlab's own: text from elsewhere goes through rich's `escape`, or
into a `Text`.
"""

import json
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from llmlab.settings.errors import UNPRINTABLE, printable


class Terminal(Console):
    """A rich console whose text has no control characters, wherever in tables, bars or lines it comes from."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before a table measures it

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def say(text: str, *, error: bool = False, **style: Any) -> None:
    """Prints a line."""
    typer.secho(printable(text), err=error, **style)


def say_json(values: Any, **options: Any) -> None:
    """Prints values as JSON for other programs, control characters in JSON's own escapes."""
    text = json.dumps(values, ensure_ascii=False, **options)
    typer.echo(UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
