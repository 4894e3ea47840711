"""A comparison's trade-off plot: quality against what a token costs, a line per method, bars over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from lte_compile.comparison.table import ComparisonRow, Spread
from lte_compile.reports.plots import BLUE, GREY, INK, ORANGE, STYLE, WIDTH_INCHES, png_bytes
from lte_compile.reports.results import Metric

# After LTE's blue: told apart with the usual colour-vision deficiencies (Okabe and Ito 2008), darkened for white paper.
COLOURS = (ORANGE, "#00785a", "#a8336f", "#8a6d00", "#3d8fc4", "#5b4b8a", "#7a3b12", "#4f5d2f")
MARKERS = "osD^vPX*"
# A perplexity this many times the smallest would flatten all others: it is drawn on a logarithmic axis.
LOGARITHMIC_FROM = 4.0
# and from this many times on it leaves the plot, without which the ones worth comparing would lie on one line.
SHOWN_UP_TO = 10.0


def tradeoff_plot(rows: Sequence[ComparisonRow], metric: Metric) -> bytes:
    """Quality against the share of FFN weight bytes a token reads: the cost that all methods have in common. PNG."""
    return _plot(rows, metric, lambda row: row.weight_share, "FFN weight bytes per token, share of dense (%)")


def density_plot(rows: Sequence[ComparisonRow], metric: Metric) -> bytes:
    """Quality against the share of active neurons, as papers show it. PNG."""
    return _plot(rows, metric, lambda row: row.density, "Density: active neurons (%)")


def _plot(rows: Sequence[ComparisonRow], metric: Metric, cost: Callable[[ComparisonRow], Spread], label: str) -> bytes:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 5.0), layout="constrained")
        axes = figure.subplots()
        styles = zip(cycle(COLOURS), cycle(MARKERS[1:]), strict=False)
        for name in dict.fromkeys(row.method.name for row in rows):
            of_method = sorted((row for row in rows if row.method.name == name), key=lambda row: cost(row).mean)
            if of_method[0].method.only_density is not None:
                _level(axes, of_method[0], metric)
                continue
            colour, marker = (BLUE, MARKERS[0]) if name == "lte" else next(styles)
            _curve(axes, of_method, metric, cost, colour, marker)
        axes.set_xlabel(label)
        axes.set_ylabel(f"Test {metric}" + ("" if metric is Metric.PERPLEXITY else " (%)"))
        axes.set_xlim(0, _right_end([100 * cost(row).mean for row in rows if row.method.only_density is None]))
        qualities = [row.quality.mean for row in rows]
        if metric is Metric.PERPLEXITY and max(qualities) > LOGARITHMIC_FROM * min(qualities):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # 30, not 3 x 10^1
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
            axes.set_ylim(0.9 * min(qualities), min(1.1 * max(qualities), SHOWN_UP_TO * min(qualities)))
        figure.legend(loc="outside upper center", ncols=4, handlelength=2.4, columnspacing=1.4)
        return png_bytes(figure)


def _right_end(costs: Sequence[float]) -> float:
    """The whole range, unless every curve ends in its first third."""
    return 104.0 if not costs or max(costs) > 35 else 1.25 * max(costs)


def _level(axes: Axes, row: ComparisonRow, metric: Metric) -> None:
    """Methods of one density are lines to compare with, a band where there are several seeds."""
    color, style = (INK, "-") if row.method.only_density == 1.0 else (GREY, ":")
    quality, deviation = _scaled(row.quality, metric)
    axes.axhline(quality, color=color, linestyle=style, linewidth=1.3, label=row.method.title)
    if deviation is not None:
        axes.axhspan(quality - deviation, quality + deviation, color=GREY, alpha=0.15, linewidth=0)


def _curve(
    axes: Axes,
    rows: Sequence[ComparisonRow],
    metric: Metric,
    cost: Callable[[ComparisonRow], Spread],
    colour: str,
    marker: str,
) -> None:
    """Oracles are dashed: no one can run them at that cost."""
    qualities, deviations = zip(*(_scaled(row.quality, metric) for row in rows), strict=True)
    has_bars = all(deviation is not None for deviation in deviations)
    axes.errorbar(
        [100 * cost(row).mean for row in rows],
        qualities,
        yerr=deviations if has_bars else None,
        color=colour,
        marker=marker,
        linestyle="--" if rows[0].method.is_oracle else "-",
        linewidth=2.0 if rows[0].method.name == "lte" else 1.2,
        markersize=5.0,
        elinewidth=1,
        capsize=2.5,
        label=rows[0].method.title,
    )


def _scaled(quality: Spread, metric: Metric) -> tuple[float, float | None]:
    if metric is Metric.PERPLEXITY:
        return quality.mean, quality.deviation
    return 100 * quality.mean, None if quality.deviation is None else 100 * quality.deviation
