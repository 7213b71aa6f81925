"""Charts as inline SVG: curves over optimizer steps, drawn by matplotlib, colored by the page's style sheet.

matplotlib gets numbers alone: titles and names of metrics stand in the page around it, escaped. Equal curves give
equal bytes. It is imported when the first chart is drawn, since that takes half a second.
"""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from llmlab.terminal import short_number

SIZES = {False: (360, 200), True: (150, 36)}  # of charts and sparklines, in SVG units
MARGINS = (46, 14, 14, 22)  # left, right, above, below
POINTS = 500  # of a curve; the curves of a chart share twice as many
FEW = 16  # points that are marked one by one
MEANS = 60  # of a curve with at least twice as many points: they are drawn over it
HUES = 8
MOST_CURVES = 2 * HUES  # of a chart: the second half is dashed
BESIDE = 0.06  # of the steps: events that are nearer share a label, which would cover each other
LOG_RATIO = 50  # of the largest to the smallest value, from which an axis is logarithmic
SMALL = 1e-3  # numbers below are short with an exponent
# variables of style.css; matplotlib draws with colors that number them
COLORS = ("dim", "line", "warning", "critical", *(f"c{number}" for number in range(HUES)))

Points = Sequence[tuple[float, float]]


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
    def dashed(self) -> bool:
        return self.number >= HUES

    @property
    def noisy(self) -> bool:
        """Whether it has so many points that their means are drawn over them."""
        return len(self.points) >= 2 * MEANS

    @property
    def last(self) -> str:
        return short_number(self.points[-1][1])


@dataclass(frozen=True)
class Chart:
    """Curves with a title and the events that concern them; `small` is a sparkline without axes."""

    title: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    small: bool = False
    log: bool = False
    hidden: Sequence[str] = field(default=())
    """Metrics that are not drawn."""

    @property
    def noisy(self) -> bool:
        return any(curve.noisy for curve in self.curves)

    @property
    def prefix(self) -> str:
        """What the metrics' names have in common, such as `reward/`, which the title says."""
        shared = os.path.commonprefix([curve.name for curve in self.curves])
        return shared[: shared.rfind("/") + 1]

    @property
    def label(self) -> str:
        """What the chart shows, for those who do not see it."""
        ends = [
            f"{curve.name} from {short_number(curve.points[0][1])} at step {curve.points[0][0]:,} "
            f"to {curve.last} at step {curve.points[-1][0]:,}"
            for curve in self.curves
        ]
        events = f"; health events at steps {', '.join(f'{mark.step:,}' for mark in self.marks)}" if self.marks else ""
        return f"{self.title}: {'; '.join(ends)}{events}"

    @cached_property
    def svg(self) -> str:
        """The SVG element's content, and its `viewBox` before it."""
        return _draw(self)


def group_curves(curves: dict[str, Any]) -> list[Group]:
    """Returns the charts of `charts.yaml` that these metrics have, in order."""
    groups: list[Group] = []
    for chart in _chart_table():
        names = [name for pattern in chart["metrics"] for name in curves if fnmatchcase(name, pattern)]
        log = chart.get("log", False)
        if chart.get("separate"):
            twins = [[name, *({f"eval_{name}"} & curves.keys())] for name in names]
            groups += [Group(f"{chart['title']} {pair[0].partition('/')[2]}", pair, log) for pair in twins]
        elif names:
            groups.append(Group(chart["title"], names, log))
    return groups


@cache
def _chart_table() -> list[dict[str, Any]]:
    return yaml.safe_load((files("llmlab.report") / "charts.yaml").read_text(encoding="utf-8"))


def make_chart(title: str, curves: dict[str, Points], **options: Any) -> Chart:
    """Returns a chart of the first curves, as many as can be told apart; `options` are those of `Chart`."""
    names = list(curves)
    shown = [Curve(name, curves[name], number) for number, name in enumerate(names[:MOST_CURVES])]
    return Chart(title, shown, hidden=names[MOST_CURVES:], **options)


def thin(points: Points, most: int) -> Points:
    """Returns at most so many points: the ends, and the smallest and largest value of each equal share of the rest."""
    if len(points) <= most:
        return points
    inner, shares = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for share in range(shares):
        part = inner[len(inner) * share // shares : len(inner) * (share + 1) // shares]
        low, high = (choose(range(len(part)), key=lambda i: part[i][1]) for choose in (min, max))
        kept += [part[i] for i in sorted({low, high})]
    return [*kept, points[-1]]


def smooth(points: Points) -> Points:
    """Returns means over equal shares of the points, at their mean steps."""
    bounds = [len(points) * share // MEANS for share in range(MEANS + 1)]
    parts = [points[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in parts]


def _color(name: str) -> str:
    return f"#00fe{COLORS.index(name):02x}"


def _draw(chart: Chart) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = SIZES[chart.small]
    left, right, above, below = (3, 3, 3, 3) if chart.small else MARGINS
    look = {"svg.fonttype": "none", "svg.hashsalt": "llmlab", "path.simplify": False, "font.size": 11}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        place = (left / width, below / height, (width - left - right) / width, (height - above - below) / height)
        axes = figure.add_axes(place)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.spines[:].set_visible(False)
        most = max(min(POINTS, 2 * POINTS // len(chart.curves)), 2)
        for curve in chart.curves:
            steps, values = zip(*thin(curve.points, most), strict=True)
            marker = "o" if len(steps) == 1 or (len(steps) <= FEW and not chart.small) else ""
            line = {"color": _color(curve.color), "linewidth": 1.6, "linestyle": "--" if curve.dashed else "-"}
            noisy = curve.noisy and not chart.small
            axes.plot(steps, values, marker=marker, markersize=3.5, alpha=0.35 if noisy else 1, **line)
            if noisy:
                axes.plot(*zip(*smooth(curve.points), strict=True), **line)
        if chart.small:
            axes.set_axis_off()
        else:
            _draw_axes(axes, chart)
        _draw_marks(axes, chart)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(target.getvalue())


def _draw_axes(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    steps, values = zip(*(point for curve in chart.curves for point in curve.points), strict=True)
    if chart.log and min(values) > 0 and max(values) / min(values) >= LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(values) / min(values) < 1000 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if min(steps) == max(steps):
        axes.set_xticks(steps[:1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.tick_params(which="both", left=False, bottom=False, labelcolor=_color("dim"))
    axes.grid(axis="y", color=_color("line"), linewidth=1)


def _tick(value: float) -> str:
    return f"{value:,.4g}" if abs(value) >= SMALL or not value else f"{value:.1e}".replace("e-0", "e-")


def _draw_marks(axes: Any, chart: Chart) -> None:
    steps = [step for curve in chart.curves for step, _ in curve.points]
    first, last = min(steps), max(steps)
    labels: list[tuple[int, str, list[str]]] = []  # one for events beside each other
    for mark in sorted(mark for mark in chart.marks if first <= mark.step <= last):
        axes.axvline(mark.step, color=_color(mark.severity), linewidth=1.2, dashes=(3, 2))
        if labels and mark.step - labels[-1][0] <= (last - first) * BESIDE:
            labels[-1][2].append(str(mark.number))
        else:
            labels.append((mark.step, mark.severity, [str(mark.number)]))
    for step, severity, numbers in [] if chart.small else labels:
        text = numbers[0] if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
        where = {"ha": "center", "transform": axes.get_xaxis_transform()}
        axes.text(step, 1.02, text, color=_color(severity), size=9, **where)


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
