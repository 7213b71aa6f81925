"""Charts: which curves share one, what is left of long curves, and that the SVG is the page's own."""

import re

import pytest

from llmlab.report.page import MEANS, POINTS, Chart, Curve, Mark, group_curves, smooth, thin


def make_chart(title, curves, **options):
    return Chart(
        title, [Curve(name, points, number) for number, (name, points) in enumerate(curves.items())], **options
    )


RISING = [(step, step / 4) for step in range(0, 41, 4)]


def test_a_long_curve_keeps_its_ends_and_extremes():
    points = [(step, (step * 7919) % 1009 / 1009) for step in range(20_000)]
    points[777], points[15_555] = (777, -5.0), (15_555, 9.0)
    few = thin(points, POINTS)
    assert len(few) <= POINTS and few == sorted(few)
    assert few[0] == points[0] and few[-1] == points[-1] and {(777, -5.0), (15_555, 9.0)} <= set(few)
    assert thin(few, POINTS) == few  # short enough


def test_the_means_of_a_noisy_curve():
    points = [(step, step % 2) for step in range(10 * MEANS)]  # 0 and 1 in turn: each share's mean is one half
    means = smooth(points)
    assert [value for _, value in means] == [0.5] * MEANS
    assert [step for step, _ in means[:2]] == [4.5, 14.5]  # of 0..9 and 10..19


def test_metrics_that_belong_together_share_a_chart():
    names = ["grad_norm", "eval_loss", "loss", "gate/a", "gate/b", "eval_gate/b", "reward/x", "reward/y", "step_time"]
    groups = group_curves(dict.fromkeys(names))
    assert [(group.title, group.metrics) for group in groups] == [
        ("Loss", ["loss", "eval_loss"]),
        ("Rewards by component", ["reward/x", "reward/y"]),
        ("Gate a", ["gate/a"]),
        ("Gate b", ["gate/b", "eval_gate/b"]),
        ("Gradient norm", ["grad_norm"]),
    ]


def test_an_svg_takes_the_colors_and_fonts_of_its_page():
    chart = make_chart("Loss", {"loss": RISING, "eval_loss": [(20, 5.0)]})
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart.svg)) == {
        *("var(--c0)", "var(--c1)", "var(--dim)", "var(--line)", "none"),
    }
    assert not re.search(r"#00fe|font|http|<style|<metadata|<script", chart.svg)
    assert re.findall(r">([\d.,]+)</text>", chart.svg) == [*("0", "10", "20", "30", "40"), "0", "3", "6", "9"]
    assert chart.svg == make_chart("Loss", {"loss": RISING, "eval_loss": [(20, 5.0)]}).svg


@pytest.mark.parametrize(("log", "labels"), [(True, {"0.1", "1", "10", "100"}), (False, {"0", "30", "60", "90"})])
def test_only_a_chart_that_allows_it_has_a_logarithmic_axis(log, labels):
    points = [(0, 100.0), (1, 10.0), (2, 0.1)]
    svg = make_chart("Loss", {"loss": points}, log=log).svg
    assert labels <= set(re.findall(r">([\d.]+)</text>", svg))


def test_events_are_numbered_lines_at_their_steps():
    marks = [Mark(20, "critical", 2), Mark(21, "critical", 3), Mark(4, "warning", 1), Mark(900, "warning", 4)]
    chart = make_chart("KL divergence", {"kl": RISING}, marks=marks)
    lines = [float(x) for x in re.findall(r'd="M ([\d.]+) 178 L \1 14 ', chart.svg)]
    left, width = 46, 360 - 46 - 14  # the margins; a twentieth of the steps are free at both ends
    at = [left + width * (step / 40 + 0.05) / 1.1 for step in (4, 20, 21)]
    assert lines == pytest.approx(at, abs=0.2)  # step 900 is behind the last one
    assert re.findall(r">(\d+)</text>", chart.svg)[-2:] == ["1", "2"]  # 3 would cover 2
    assert "var(--warning)" in chart.svg


def test_more_curves_than_colors_are_dashed_and_the_rest_is_left_out():
    chart = make_chart("Rewards by component", {f"reward/{number:02}": RISING for number in range(18)})
    assert len(re.findall(r'stroke-dasharray[^"]* stroke: var\(--c', chart.svg)) == 8
    assert chart.curves[8].color == "c0" and len(re.findall(r'fill: none;[^"]* stroke: var\(--c', chart.svg)) == 16


def test_charts_look_alike_whatever_styles_the_figures_of_a_notebook():
    import matplotlib

    chart = make_chart("Loss", {"loss": RISING})
    plain = chart.svg
    with matplotlib.rc_context({"axes.grid": True, "path.sketch": (1, 100, 2), "axes.xmargin": 0.3, "font.size": 30}):
        assert chart.svg == plain


def test_a_single_point_is_seen():
    chart = make_chart("Loss", {"loss": [(1, 2.5)]})
    assert chart.svg.count("<use ") == 1 and ">1</text>" in chart.svg
