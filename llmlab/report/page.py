"""Renders pages from the templates beside this module: one file, no scripts, nothing loaded, all text escaped. Their
charts are inline SVG: curves over optimizer steps, drawn by matplotlib, colored by the page's style sheet. matplotlib
gets numbers alone: titles and names of metrics stand in the page around it. Equal curves give equal bytes. It is
imported when the first chart is drawn, since that takes half a second."""

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmlab import __version__
from llmlab.settings.errors import printable
from llmlab.settings.files import is_number, read_table, write_atomically
from llmlab.terminal import duration, human, short_number

SIZE = (360, 200)  # in SVG units
MARGINS = (46, 14, 14, 22)  # left, right, above, below
POINTS = 500  # of a curve; the curves of a chart share twice as many
FEW = 16  # points that are marked one by one
MEANS = 60  # of a curve with at least twice as many points: they are drawn over it
HUES = 8
MOST_CURVES = 2 * HUES  # of a chart: the second half is dashed; parts.html says the same
BESIDE = 0.06  # of the steps: of events that are nearer the first has a label
LOG_RATIO = 50  # of the largest to the smallest value, from which an axis is logarithmic
SMALL = 1e-3  # numbers below are short with an exponent
# variables of style.css; matplotlib draws with colors that number them
COLORS = ("dim", "line", "warning", "critical", *(f"c{number}" for number in range(HUES)))

Points = Sequence[tuple[float, float]]


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page of a template (`run.html`) with these values, and returns its path."""
    write_atomically(path, _environment().get_template(template).render(values, page=path))
    return path


def link(page: Path, target: Path) -> str:
    """Returns the reference from a page to another file where that exists, else an empty text."""
    here = os.path.realpath(page.parent)  # a browser knows nothing of links in the path that a folder was named by
    return quote(os.fsencode(os.path.relpath(os.path.realpath(target), here))) if target.is_file() else ""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llmlab.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"number": _number, "duration": duration, "human": human}
    environment.globals |= {"link": link, "version": __version__, "Ellipsis": ...}
    return environment


def _number(value: Any) -> str:
    """Returns a number as tables show it, anything else as text, and a dash for nothing."""
    if value is None or value == "":
        return "–"
    return short_number(value) if is_number(value) else str(value)


class Mark(NamedTuple):
    """A health event on a chart: a line at its step, with its number in the page's list."""

    step: int
    severity: str
    number: int


class Group(NamedTuple):
    """Metrics that share a chart, and whether its axis may be logarithmic."""

    title: str
    metrics: list[str]
    log: bool


@dataclass(frozen=True)
class Curve:
    """A named line of a chart, in the color and dashes of this number."""

    name: str
    points: Points
    number: int = 0

    @property
    def color(self) -> str:
        return f"c{self.number % HUES}"

    @property
    def noisy(self) -> bool:
        """Whether it has so many points that their means are drawn over them."""
        return len(self.points) >= 2 * MEANS


@dataclass(frozen=True)
class Chart:
    """Curves with a title and the events that concern them. Of more curves than can be told apart, the first ones are
    drawn."""

    title: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    log: bool = False

    @property
    def svg(self) -> str:
        """The SVG element's `viewBox` and content."""
        from matplotlib import style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        (width, height), (left, right, above, below) = SIZE, MARGINS
        look = {"svg.fonttype": "none", "svg.hashsalt": "llmlab", "path.simplify": False, "font.size": 11}
        with style.context(look, after_reset=True):  # not as a notebook or a matplotlibrc styles its figures
            figure = Figure(figsize=(width / 72, height / 72))
            FigureCanvasSVG(figure)
            place = (left / width, below / height, (width - left - right) / width, (height - above - below) / height)
            axes = figure.add_axes(place)
            for part in (figure.patch, axes.patch, *axes.spines.values()):
                part.set_visible(False)
            curves = self.curves[:MOST_CURVES]
            for curve in curves:
                steps, values = zip(*thin(curve.points, max(min(POINTS, 2 * POINTS // len(curves)), 2)), strict=True)
                marker, dashes = "o" if len(steps) <= FEW else "", "-" if curve.number < HUES else "--"
                line = {"color": _color(curve.color), "linewidth": 1.6, "linestyle": dashes}
                axes.plot(steps, values, marker=marker, markersize=3.5, alpha=0.35 if curve.noisy else 1, **line)
                if curve.noisy:
                    axes.plot(*zip(*smooth(curve.points), strict=True), **line)
            points = [point for curve in curves for point in curve.points]
            _draw_axes(axes, *zip(*points, strict=True), log=self.log)
            _draw_marks(axes, self.marks, min(points)[0], max(points)[0])
            target = io.StringIO()
            figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _inline(target.getvalue())


def group_curves(curves: dict[str, Any]) -> list[Group]:
    """Returns the charts of `charts.yaml` that these metrics have, in order."""
    groups: list[Group] = []
    for chart in read_table("llmlab.report", "charts"):
        names = [name for pattern in chart["metrics"] for name in curves if fnmatchcase(name, pattern)]
        if chart.get("separate"):
            for name in names:
                both = [name, *({f"eval_{name}"} & curves.keys())]
                groups.append(Group(f"{chart['title']} {name.partition('/')[2]}", both, False))
        elif names:
            groups.append(Group(chart["title"], names, chart.get("log", False)))
    return groups


def thin(points: Points, most: int) -> Points:
    """Returns at most so many points: the ends, and the smallest and largest value of each equal share of the rest."""
    if len(points) <= most:
        return points
    chosen = {0: points[0], len(points) - 1: points[-1]}
    for part in _shares(list(enumerate(points))[1:-1], (most - 2) // 2):
        chosen |= [choose(part, key=lambda each: each[1][1]) for choose in (min, max)]
    return [chosen[index] for index in sorted(chosen)]


def smooth(points: Points) -> Points:
    """Returns the mean steps and values of equal shares of the points."""
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in _shares(points, MEANS)
    ]


def _shares(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [items[len(items) * share // count : len(items) * (share + 1) // count] for share in range(count)]


def _color(name: str) -> str:
    return f"#00fe{COLORS.index(name):02x}"


def _draw_axes(axes: Any, steps: Sequence[float], values: Sequence[float], *, log: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if log and min(values) > 0 and max(values) / min(values) >= LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(values) / min(values) < 1000 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if min(steps) == max(steps):
        axes.set_xticks(steps[:1])
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value:,.4g}" if abs(value) >= SMALL or not value else f"{value:.1e}".replace("e-0", "e-")
    )
    axes.tick_params(which="both", left=False, bottom=False, labelcolor=_color("dim"))
    axes.grid(axis="y", color=_color("line"), linewidth=1)


def _draw_marks(axes: Any, marks: Sequence[Mark], first: float, last: float) -> None:
    labelled = -math.inf
    for mark in sorted(mark for mark in marks if first <= mark.step <= last):
        axes.axvline(mark.step, color=_color(mark.severity), linewidth=1.2, dashes=(3, 2))
        if mark.step - labelled > (last - first) * BESIDE:
            labelled = mark.step
            style = {"color": _color(mark.severity), "size": 9, "ha": "center"}
            axes.text(mark.step, 1.02, str(mark.number), transform=axes.get_xaxis_transform(), **style)


def _inline(svg: str) -> str:
    """Returns matplotlib's file as an element of a page, whose fonts and colors it takes; one decimal is enough."""
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    body = re.sub(r"(?s)^.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>|</svg>\s*$", "", svg)
    body = re.sub(r"#00fe(..)", lambda match: f"var(--{COLORS[int(match[1], 16)]})", body)
    body = re.sub(r'font(-[a-z]+)?: [^;"]*;? ?', "", body)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body)  # several charts would have the same
    body = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'viewBox="{box[1] if box else ""}">{body}'
