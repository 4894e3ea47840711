"""The final table of a run, once, for the terminal, the page and the plot: all three show these rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table

from lte_compile.reports.results import Metric, RunResult


class RowKind(StrEnum):
    """Which line of the plot a row belongs to."""

    DENSE = "dense"
    LTE = "lte"
    ORACLE = "oracle"
    FFN_FREE = "ffn-free"


@dataclass(frozen=True)
class ResultRow:
    """One measured point. None where a column has no meaning for the row: a baseline has no threshold."""

    kind: RowKind
    label: str
    density: float
    quality: float
    threshold: float | None = None
    flops: float | None = None


HEADINGS = ("", "Density", "{metric}", "Against dense", "Threshold", "FFN FLOPs per token", "Share of dense")


def result_rows(result: RunResult) -> tuple[ResultRow, ...]:
    """Dense, every budget, every oracle point, and the control without FFNs."""
    dense = ResultRow(RowKind.DENSE, "Dense", 1.0, result.dense_quality, flops=result.dense_ffn_flops_per_token)
    budgets = [
        ResultRow(
            RowKind.LTE,
            f"LTE, budget {percent(row.target, 0)}",
            row.density,
            row.quality,
            row.threshold,
            row.ffn_flops_per_token,
        )
        for row in result.budgets
    ]
    oracle = [ResultRow(RowKind.ORACLE, "Oracle neurons", point.density, point.quality) for point in result.oracle]
    control = ResultRow(RowKind.FFN_FREE, "Without FFNs", 0.0, result.ffn_free_quality)
    return (dense, *budgets, *oracle, control)


def headings(result: RunResult) -> tuple[str, ...]:
    """Column titles, in the order of `cells`."""
    return tuple(heading.format(metric=f"Test {result.metric}") for heading in HEADINGS)


def cells(result: RunResult, row: ResultRow) -> tuple[str, ...]:
    """A row as text."""
    share = None if row.flops is None else row.flops / result.dense_ffn_flops_per_token
    return (
        row.label,
        percent(row.density),
        quality_text(result.metric, row.quality),
        "" if row.kind is RowKind.DENSE else _against_dense(result, row.quality),
        "" if row.threshold is None else f"{row.threshold:.3g}",
        "" if row.flops is None else flops_text(row.flops),
        "" if share is None else percent(share),
    )


def render_table(result: RunResult) -> Table:
    """The final table for the terminal."""
    table = Table(title=f"{result.name}: {result.provenance.model} on {result.task}", caption=table_note(result))
    for number, heading in enumerate(headings(result)):
        table.add_column(heading, justify="left" if number == 0 else "right")
    rows = result_rows(result)
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        ends = following is not None and following.kind is not row.kind
        table.add_row(*cells(result, row), end_section=ends, style="bold" if row.kind is RowKind.LTE else "")
    return table


def table_note(result: RunResult) -> str:
    """What the numbers are and how far chance moves them."""
    note = f"{result.test_examples} test examples, router included in the FLOPs"
    if result.metric is not Metric.ACCURACY:
        return note
    return f"{note}; one standard error of the dense accuracy is {100 * standard_error(result):.1f} points"


def standard_error(result: RunResult, quality: float | None = None) -> float:
    """Binomial standard error of an accuracy (the dense one's by default) at the test split's size."""
    share = result.dense_quality if quality is None else quality
    return math.sqrt(max(share * (1.0 - share), 0.0) / result.test_examples)


def percent(share: float, digits: int = 1) -> str:
    """0.5 as "50.0 %"."""
    return f"{100 * share:.{digits}f} %"


def quality_text(metric: Metric, quality: float) -> str:
    """A share in percent, a perplexity as it is."""
    return f"{quality:.2f}" if metric is Metric.PERPLEXITY else percent(quality)


def flops_text(flops: float) -> str:
    """With the usual prefix and three digits: 14.2 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= size:
            return f"{flops / size:.3g} {prefix}"
    return f"{flops:.0f}"


def _against_dense(result: RunResult, quality: float) -> str:
    difference = quality - result.dense_quality
    if result.metric is Metric.PERPLEXITY:
        return f"{difference:+.2f}"
    return f"{100 * difference:+.1f} points"
