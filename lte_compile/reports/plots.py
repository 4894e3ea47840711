"""The figures of a report, as PNG bytes. Drawn without pyplot: no display, no global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate, groupby

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lte_compile.reports.results import CurvePoint, Metric, RunResult, ScoreHistogram
from lte_compile.reports.table import ResultRow, RowKind, percent, quality_text, result_rows, standard_error

# Distinguishable with the usual colour-vision deficiencies, and dark enough for white paper.
BLUE, ORANGE, INK, GREY, PALE = "#1f5fae", "#c2571a", "#22262b", "#7a828c", "#dfe5ec"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
WIDTH_INCHES = 7.0
DOTS_PER_INCH = 160


def quality_plot(result: RunResult) -> bytes:
    """Quality against density: the LTE curve, the oracle's, the dense line and the line without FFNs."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.4), layout="constrained")
        axes = figure.subplots()
        rows = result_rows(result)
        for row in rows:
            if row.kind in (RowKind.DENSE, RowKind.FFN_FREE):
                _level(axes, result, row)
        _curve(axes, result, [row for row in rows if row.kind is RowKind.ORACLE], ORANGE, "s--", "Oracle neurons")
        _curve(axes, result, [row for row in rows if row.kind is RowKind.LTE], BLUE, "o-", "LTE")
        _label_points(axes, result, [row for row in rows if row.kind is RowKind.LTE])
        axes.set_xlabel("Density: active experts (%)")
        axes.set_ylabel(f"Test {result.metric}" + ("" if result.metric is Metric.PERPLEXITY else " (%)"))
        axes.set_xlim(0, 104)
        axes.margins(y=0.14)
        # A language model without FFNs has a perplexity in the thousands, which would flatten everything else.
        qualities = [row.quality for row in rows]
        if result.metric is Metric.PERPLEXITY and max(qualities) > 10 * min(qualities):
            axes.set_yscale("log")
        figure.legend(loc="outside upper center", ncols=4, handlelength=2.4, columnspacing=1.4)
        return png_bytes(figure)


def layer_plot(result: RunResult) -> bytes:
    """Density of each layer, one panel a budget."""
    with mpl.rc_context(STYLE):
        count = len(result.budgets)
        figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 1.35 * count), layout="constrained")
        panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for axes, row in zip(panels, result.budgets, strict=True):
            shares = [100 * share for share in row.density_per_layer]
            axes.bar(range(len(shares)), shares, color=BLUE, width=0.72)
            axes.axhline(100 * row.density, color=ORANGE, linestyle="--", linewidth=1.2)
            axes.set_title(f"Budget {percent(row.target, 0)}: mean {percent(row.density)}", loc="left")
            axes.set_ylim(0, 1.15 * max(*shares, 100 * row.density, 1.0))
            axes.grid(axis="x", visible=False)
            axes.locator_params(axis="y", nbins=4)
        layers = len(result.budgets[0].density_per_layer)
        panels[-1].set_xticks(range(0, layers, 1 if layers <= 16 else 2))
        panels[-1].set_xlabel("Layer")
        figure.supylabel("Density: active experts (%)", fontsize=10)
        return png_bytes(figure)


def histogram_plot(result: RunResult) -> bytes:
    """Router scores of each layer as shares of all scores, with the budgets' thresholds."""
    with mpl.rc_context({**STYLE, "font.size": 8, "axes.titlesize": 8}):
        histograms = result.histograms
        columns = 3 if len(histograms) <= 12 else 5
        rows = -(-len(histograms) // columns)
        figure = Figure(figsize=(WIDTH_INCHES, 0.6 + 1.35 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        thresholds = sorted({row.threshold for row in result.budgets})
        for axes, histogram, title in zip(grid, histograms, _short_names(histograms), strict=False):
            _histogram(axes, histogram, thresholds, title)
        for axes in grid[len(histograms) :]:
            axes.set_visible(False)
        figure.supxlabel("Router score (dashed: thresholds)", fontsize=9)
        figure.supylabel("Share of scores (%)", fontsize=9)
        return png_bytes(figure)


def training_plot(result: RunResult) -> bytes:
    """Loss, density and eta over the steps of all stages."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 5.4), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        stages = [(stage, list(points)) for stage, points in groupby(result.curve, key=lambda point: point.stage)]
        starts = [0, *accumulate(points[-1].step for _, points in stages)]
        values = ("Loss", "Density (%)", "Eta")
        for axes, label in zip(panels, values, strict=True):
            axes.set_ylabel(label)
            for number, start in enumerate(starts[:-1]):
                if number % 2:
                    axes.axvspan(start, starts[number + 1], color="#f3f6fa", zorder=0)
        for (stage, points), start, end in zip(stages, starts, starts[1:], strict=False):
            _draw_stage(panels, points, start)
            panels[0].text((start + end) / 2, 1.04, stage, transform=panels[0].get_xaxis_transform(), ha="center")
        panels[0].set_xlim(0, max(starts[-1], 1))
        panels[-1].set_xlabel("Training step")
        for axes in panels:
            axes.set_ylim(bottom=0)
        figure.align_ylabels()
        return png_bytes(figure)


def _level(axes: Axes, result: RunResult, row: ResultRow) -> None:
    dense = row.kind is RowKind.DENSE
    text = f"{row.label} {quality_text(result.metric, row.quality)}"
    color, style = (INK, "-") if dense else (GREY, ":")
    axes.axhline(_shown(result, row.quality), color=color, linestyle=style, linewidth=1.3, label=text)


def _curve(axes: Axes, result: RunResult, rows: Sequence[ResultRow], color: str, style: str, label: str) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row.density)
    densities = [100 * row.density for row in rows]
    qualities = [_shown(result, row.quality) for row in rows]
    errors = None
    if result.metric is Metric.ACCURACY:
        errors = [100 * standard_error(result, row.quality) for row in rows]
    axes.errorbar(
        densities,
        qualities,
        yerr=errors,
        fmt=style,
        color=color,
        label=label,
        markersize=5.5,
        elinewidth=1,
        capsize=2.5,
    )


def _label_points(axes: Axes, result: RunResult, rows: Sequence[ResultRow]) -> None:
    for row in rows:
        axes.annotate(
            quality_text(result.metric, row.quality),
            (100 * row.density, _shown(result, row.quality)),
            xytext=(7, 8),
            textcoords="offset points",
            color=BLUE,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )


def _histogram(axes: Axes, histogram: ScoreHistogram, thresholds: Sequence[float], title: str) -> None:
    counts = np.asarray(histogram.counts, dtype=np.float64)
    axes.stairs(100 * counts / max(counts.sum(), 1.0), histogram.edges, fill=True, color=BLUE)
    for threshold in thresholds:
        axes.axvline(threshold, color=ORANGE, linestyle="--", linewidth=1)
    axes.set_title(title, loc="left")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _draw_stage(panels: Sequence[Axes], points: Sequence[CurvePoint], start: int) -> None:
    steps = [start + point.step for point in points]
    panels[0].plot(steps, [point.loss for point in points], color=BLUE)
    panels[1].plot(steps, [100 * point.density for point in points], color=BLUE)
    panels[2].plot(steps, [point.eta for point in points], color=BLUE)


def _short_names(histograms: Sequence[ScoreHistogram]) -> list[str]:
    """ "layer 3" for names that differ in one number only, such as encoder.layer.3.output; else the names."""
    names = [histogram.layer.split(".") for histogram in histograms]
    if len({len(parts) for parts in names}) == 1:
        differing = [column for column in zip(*names, strict=True) if len(set(column)) > 1]
        if len(differing) == 1 and all(part.isdigit() for part in differing[0]):
            return [f"layer {part}" for part in differing[0]]
    return [histogram.layer for histogram in histograms]


def _shown(result: RunResult, quality: float) -> float:
    return quality if result.metric is Metric.PERPLEXITY else 100 * quality


def png_bytes(figure: Figure) -> bytes:
    """A figure as the file that reports hold."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
