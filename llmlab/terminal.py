"""How llmlab prints: consoles, lines, tables, progress bars, numbers and charts. Text from elsewhere (data, records,
models) never steers the terminal: markup is llmlab's own, and that text goes through `safe` or a rich `Text`."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from llmlab.settings.errors import UNPRINTABLE, printable

BLOCKS = " ▁▂▃▄▅▆▇█"


class Terminal(Console):
    """A rich console whose text has no control characters, wherever in tables, bars or lines it comes from."""

    def __init__(self, *, whole_rows: bool = False, **options: Any):
        super().__init__(**{"highlight": False, "emoji": False, **options})
        if whole_rows and not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = 1000  # a pipe has no width: do not wrap rows

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before a table measures it

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    @property
    def plain(self) -> bool:
        """Whether colors cannot be told apart here."""
        return self.color_system is None or self.no_color

    def section(self, title: str) -> None:
        self.print(f"\n[bold]{safe(title)}[/]")

    def table(self, columns: Iterable[Column | str], rows: Iterable[Iterable[Any]], **options: Any) -> None:
        """Prints a table of rows of cells, which are markup; `options` as in `make_table`."""
        table = make_table(*columns, **options)
        for row in rows:
            table.add_row(*row)
        self.print(table)


def say(text: str, *, error: bool = False, **style: Any) -> None:
    typer.secho(printable(text), err=error, **style)


def say_json(values: Any, **options: Any) -> None:
    """Prints values as JSON for other programs, control characters in JSON's own escapes."""
    text = json.dumps(values, ensure_ascii=False, **options)
    typer.echo(UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def safe(text: Any) -> str:
    """Returns text from elsewhere as markup that shows it as it is."""
    return escape(printable(str(text)))


def one_line(*parts: str) -> Text:
    """Returns markup, its parts apart, as one line that is cut where its room ends."""
    line = Text.from_markup("  ".join(filter(None, parts)).replace("\n", " "), overflow="ellipsis")
    line.no_wrap = True
    return line


def make_table(*columns: Column | str, gap: int = 2, **options: Any) -> Table:
    """Returns an empty table without lines around its cells, and so many spaces between them."""
    plain = {"box": None, "pad_edge": False, "padding": (0, gap, 0, 0), "header_style": "bold"}
    return Table(*columns, **{**plain, **options})


def numeric(name: str, **options: Any) -> Column:
    """Returns a column of numbers: to the right, and never folded."""
    return Column(name, justify="right", no_wrap=True, **options)


def track(items: Iterable[Any], total: int | None, description: str) -> Iterator[Any]:
    """Yields the items, with a progress bar on standard error where that is a terminal."""
    from rich import progress

    console = Terminal(stderr=True)
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    return progress.track(items, safe(description), total, **options)


# Numbers ----------------------------------------------------------------------------------------------------------


def human(number: float, unit: str = "") -> str:
    """Returns a number with a decimal prefix, such as `134.5 M` or `1.2 G`."""
    for size, prefix in zip((1e21, 1e18, 1e15, 1e12, 1e9, 1e6, 1e3), "ZEPTGMk", strict=True):
        if abs(number) >= size:
            return f"{number / size:.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def short_number(value: float | None) -> str:
    """Returns counts whole and measurements with four digits."""
    if value is None:
        return "-"
    whole = isinstance(value, int) or (value.is_integer() and abs(value) >= 1000)
    return f"{int(value):,}" if whole else f"{value:.4g}" if abs(value) < 10000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """Returns a share with one decimal; what is neither nothing nor everything never looks so."""
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Returns a time by its two largest units, such as `1m 41s`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"


# Charts -----------------------------------------------------------------------------------------------------------


def draw_bars(counts: Sequence[int], height: int = 1) -> list[str]:
    """Returns upright bars, one character wide, as lines from the top; what is not 0 is never empty."""
    scale = 8 * height / (max(counts, default=0) or 1)
    eighths = [math.ceil(count * scale) for count in counts]
    return ["".join(BLOCKS[min(max(filled - 8 * line, 0), 8)] for filled in eighths) for line in range(height)][::-1]


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """Returns a curve one character high and at most so many wide: of values that share a character, the last."""
    count = min(width, len(values))
    shown = [values[len(values) * (column + 1) // count - 1] for column in range(count)]
    low, high = min(shown, default=0), max(shown, default=0)
    return "".join(BLOCKS[1 + round(7 * (mean - low) / ((high - low) or 1))] for mean in shown)
