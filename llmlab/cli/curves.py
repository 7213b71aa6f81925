"""Curves in a terminal, in braille dots: two dots across and four down a character.

What the curves mean, and which to draw, is their caller's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

NARROWEST = 10  # characters that a drawing has, however narrow the terminal


@dataclass(frozen=True)
class Curve:
    """One line of a chart, or where `marks` is set its single points."""

    points: list[tuple[int, float]]
    style: str
    marks: bool = False


def draw(
    curves: Sequence[Curve], *, width: int, height: int, scale: Sequence[tuple[int, float]] | None = None
) -> "list[Text]":
    """Returns curves drawn in braille dots over an axis of steps.

    Args:
        curves: drawn one over the other; where many points share a dot's column, their mean is drawn.
        width: of the whole chart, labels included.
        height: of the drawing itself, without the axis.
        scale: points whose ranges the axes show; None is those of all curves.
    """
    from rich.text import Text

    whole = scale or [point for curve in curves for point in curve.points]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*whole, strict=True))
    labels = {0: short_number(high), height // 2: short_number((low + high) / 2), height - 1: short_number(low)}
    margin = max(map(len, labels.values()))
    columns, rows = 2 * max(width - margin - 2, NARROWEST), 4 * height
    cells: dict[tuple[int, int], int] = {}
    styles: dict[tuple[int, int], str] = {}
    marks: set[tuple[int, int]] = set()
    for curve in curves:
        shared: dict[int, list[float]] = {}
        for step, value in curve.points:
            shared.setdefault(round((step - left) / ((right - left) or 1) * (columns - 1)), []).append(value)
        dots = [
            (x, round((high - sum(values) / len(values)) / ((high - low) or 1) * (rows - 1)))
            for x, values in sorted(shared.items())
        ]
        if not curve.marks:
            dots = _joined(dots)
        for x, y in dots:
            cell = (y // 4, x // 2)
            cells[cell] = cells.get(cell, 0) | (0x40 << x % 2 if y % 4 == 3 else 1 << (y % 4 + 3 * (x % 2)))
            styles[cell] = curve.style
            if curve.marks:
                marks.add(cell)
    lines = []
    for row in range(height):
        line = Text(f"{labels.get(row, ''):>{margin}} ┤" if row in labels else f"{'':>{margin}} │", style="dim")
        for column in range(columns // 2):
            cell = (row, column)
            character = "●" if cell in marks else chr(0x2800 + cells[cell]) if cell in cells else " "
            line.append(character, style=f"not dim {styles[cell]}" if cell in cells else "")
        line.rstrip()
        lines.append(line)
    first, last = f"{left:,}", f"step {right:,}"
    lines.append(Text(f"{'':>{margin}} └{'─' * (columns // 2)}", style="dim"))
    lines.append(Text(f"{'':>{margin}}  {first}{last:>{columns // 2 - len(first)}}", style="dim"))
    return lines


def _joined(dots: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the dots with those between them, so that the line has no gaps."""
    line = dots[:1]
    for (x, y), (to_x, to_y) in zip(dots, dots[1:], strict=False):
        count = max(to_x - x, abs(to_y - y))
        line += [(x + round((to_x - x) * i / count), y + round((to_y - y) * i / count)) for i in range(1, count + 1)]
    return line


def short_number(value: float) -> str:
    """Returns counts whole and measurements with four digits."""
    whole = isinstance(value, int) or (value.is_integer() and abs(value) >= 1000)
    return f"{int(value):,}" if whole else f"{value:.4g}" if abs(value) < 10000 else f"{value:,.0f}"
