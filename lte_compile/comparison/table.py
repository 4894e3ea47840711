"""A comparison's table: means over seeds with their spread, for the terminal, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from lte_compile.baselines import Method, find_method
from lte_compile.comparison.run import PointResult
from lte_compile.reports.results import Metric
from lte_compile.reports.table import flops_text, percent


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; no deviation of a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(fmean(values), None)
        return cls(fmean(values), stdev(values) if all(map(isfinite, values)) else nan)


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """A method at one target density, over its seeds."""

    method: Method
    target: float
    seeds: int
    quality: Spread
    density: Spread
    weight_share: Spread
    flops_per_token: float
    against_dense: Spread | None  # per seed: accuracy in points, perplexity as a ratio less 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        spreads = {"quality": self.quality, "density": self.density, "weight_share": self.weight_share}
        values = {name: {"mean": s.mean, "deviation": s.deviation} for name, s in spreads.items()}
        against = self.against_dense
        return {
            "method": self.method.name,
            "target": self.target,
            "seeds": self.seeds,
            **values,
            "flops_per_token": self.flops_per_token,
            "against_dense": None if against is None else {"mean": against.mean, "deviation": against.deviation},
            "granularity": self.method.granularity.value,
            "needs": self.method.needs.value,
            "is_oracle": self.method.is_oracle,
        }


HEADINGS = ("Method", "Target", "Density", "Weight bytes", "{metric}", "Against dense", "FFN FLOPs per token", "Seeds")


def comparison_rows(results: Sequence[PointResult], metric: Metric) -> tuple[ComparisonRow, ...]:
    """One row per method and target, in the order in which they first appear; dense first, the control last."""
    dense = {result.seed: result.quality for result in results if result.method == "dense"}
    groups: dict[tuple[str, float], list[PointResult]] = {}
    for result in results:
        groups.setdefault((result.method, result.target), []).append(result)
    rows = [_row(group, dense, metric) for group in groups.values()]
    return tuple(sorted(rows, key=lambda row: -(0.5 if row.method.only_density is None else row.method.only_density)))


def _row(group: Sequence[PointResult], dense: dict[int, float], metric: Metric) -> ComparisonRow:
    differences = [_difference(r.quality, dense[r.seed], metric) for r in group if r.seed in dense]
    return ComparisonRow(
        method=find_method(group[0].method),
        target=group[0].target,
        seeds=len(group),
        quality=Spread.of([result.quality for result in group]),
        density=Spread.of([result.density for result in group]),
        weight_share=Spread.of([result.weight_share for result in group]),
        flops_per_token=fmean(result.flops_per_token for result in group),
        against_dense=Spread.of(differences) if differences else None,
    )


def _difference(quality: float, dense: float, metric: Metric) -> float:
    return quality / dense - 1 if metric is Metric.PERPLEXITY else quality - dense


def cells(row: ComparisonRow, metric: Metric) -> tuple[str, ...]:
    """A row as text."""
    against = "" if row.method.name == "dense" or row.against_dense is None else _against(row.against_dense, metric)
    return (
        row.method.title + (" (oracle)" if row.method.is_oracle and "oracle" not in row.method.title else ""),
        percent(row.target, 0),
        _shares(row.density),
        _shares(row.weight_share),
        _quality(row.quality, metric),
        against,
        flops_text(row.flops_per_token),
        str(row.seeds),
    )


def headings(metric: Metric) -> tuple[str, ...]:
    return tuple(heading.format(metric=f"Test {metric}") for heading in HEADINGS)


def render_comparison(rows: Sequence[ComparisonRow], metric: Metric, title: str) -> Table:
    """For the terminal."""
    table = Table(title=title, caption=NOTE)
    for number, heading in enumerate(headings(metric)):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        table.add_row(*cells(row, metric), end_section=following is not None and following.method is not row.method)
    return table


def markdown(rows: Sequence[ComparisonRow], metric: Metric, title: str) -> str:
    """The same as a page."""
    lines = [headings(metric), ("---", *("---:" for _ in HEADINGS[1:])), *(cells(row, metric) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{table}\n\n{NOTE}\n"


NOTE = (
    "Means over seeds, +- one sample standard deviation. Density: active neurons. Weight bytes: share of the dense "
    "FFNs' that a token reads, routers included. Both are measured on the test split, padding left out."
)


def _shares(spread: Spread) -> str:
    return (
        percent(spread.mean) if spread.deviation is None else f"{percent(spread.mean)} ± {100 * spread.deviation:.1f}"
    )


def _quality(spread: Spread, metric: Metric) -> str:
    if metric is Metric.PERPLEXITY:
        return f"{spread.mean:.2f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2f}")
    return _shares(spread)


def _against(spread: Spread, metric: Metric) -> str:
    unit = "%" if metric is Metric.PERPLEXITY else "points"
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}"
    return f"{100 * spread.mean:+.1f}{deviation} {unit}"
